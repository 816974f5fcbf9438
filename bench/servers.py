"""The Python servers under test, each as a process: `python -m bench.servers gateway|broadcast|tasks`.

They print their port and then process the same commands from stdin as limit.c.
"""

import asyncio
import json
import logging
import resource
import sys
from collections.abc import Callable, Coroutine, Sequence

import structlog
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

from bench import messages
from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.gateway.server import Gateway
from whaled.metrics import Metrics
from whaled.model import Event, UpstreamState

EPOCH = "benchbenchbench0"
# All servers ping at the same interval, so that their keepalive costs are equal.
PING_INTERVAL_S = 30.0


class MemoryLog:
    """An event log in memory, since only delivery is measured. Keeps the newest events for clients that fall behind."""

    KEPT = 1000

    def __init__(self) -> None:
        self.epoch = EPOCH
        self.head = messages.FIRST_OFFSET  # the number of the first message is 1
        self.oldest = self.whole_from = self.head + 1
        self._events: list[Event] = []

    def append(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)
        del self._events[: -self.KEPT]
        self.head = event.offset
        self.oldest = self.whole_from = self._events[0].offset

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Return events with after < offset <= through."""
        return [event for event in self._events if after < event.offset <= through][:limit]

    async def offset_before(self, at: float) -> int:
        """Return the newest offset older than a time."""
        return max((event.offset for event in self._events if event.at < at), default=self.oldest - 1)


async def process_commands(port: int, publish: Callable[[int], None], clients: Callable[[], int]) -> None:
    """Print the port and process commands until stdin ends."""
    respond({"port": port})
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        match line.split():
            case [b"publish", count, first, rate]:
                began = loop.time()
                for index in range(int(count)):
                    await asyncio.sleep(began + index / float(rate) - loop.time())
                    publish(int(first) + index)
                respond({"published": int(count)})
            case [b"usage"]:
                usage = resource.getrusage(resource.RUSAGE_SELF)
                respond({"user_us": usage.ru_utime * 1e6, "system_us": usage.ru_stime * 1e6, "clients": clients()})
            case unknown:
                raise ValueError(unknown)


def respond(response: dict[str, float]) -> None:
    """Print a line of JSON."""
    print(json.dumps(response), flush=True)


async def gateway() -> None:
    """Run whaled's gateway as the daemon does, without the link to a backend, detection and disk."""
    unlimited = 1_000_000
    settings = GatewaySettings(
        port=0,
        ping_interval=PING_INTERVAL_S,
        max_connections=unlimited,
        max_connections_per_address=unlimited,
        max_unauthenticated=unlimited,
        compression=True,  # for clients that offer it
    )
    log = MemoryLog()
    server = Gateway(settings, AuthSettings(enabled=False), event_log=log, authenticator=None, meter=Metrics().gateway)
    server.publish_upstream_state(UpstreamState.CONNECTED)
    filler = messages.padding(EPOCH)

    def publish(number: int) -> None:
        event = messages.event(number, filler)
        log.append(event)
        server.publish((event,))

    async with server.serving() as address:
        await process_commands(int(address.rpartition(":")[2]), publish, lambda: server.hub.live_members)


async def bare_broadcast() -> None:
    """Run the simplest server with the `websockets` library: its server, a set of connections, its broadcast()."""
    connections: set[ServerConnection] = set()

    async def serve_client(connection: ServerConnection) -> None:
        connections.add(connection)
        try:
            await connection.wait_closed()
        finally:
            connections.discard(connection)

    filler = messages.padding(EPOCH)

    def publish(number: int) -> None:
        payload = messages.frame(number, EPOCH, filler)[4:]
        broadcast(connections, payload.decode())

    async with serve(
        serve_client, "127.0.0.1", 0, compression=None, ping_interval=PING_INTERVAL_S, ping_timeout=PING_INTERVAL_S
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await process_commands(port, publish, lambda: len(connections))


async def task_per_client() -> None:
    """Run a server of the most common design: a queue per client, and a task that sends its messages."""
    queues: set[asyncio.Queue[str]] = set()

    async def serve_client(connection: ServerConnection) -> None:
        queue = asyncio.Queue[str]()  # unbounded: the measurement is too short to exhaust memory
        queues.add(queue)
        try:
            while True:
                await connection.send(await queue.get())
        except ConnectionClosed:
            pass
        finally:
            queues.discard(queue)

    filler = messages.padding(EPOCH)

    def publish(number: int) -> None:
        payload = messages.frame(number, EPOCH, filler)[4:].decode()
        for queue in queues:
            queue.put_nowait(payload)

    async with serve(
        serve_client, "127.0.0.1", 0, compression=None, ping_interval=PING_INTERVAL_S, ping_timeout=PING_INTERVAL_S
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await process_commands(port, publish, lambda: len(queues))


SERVERS: dict[str, Callable[[], Coroutine[None, None, None]]] = {
    "gateway": gateway,
    "broadcast": bare_broadcast,
    "tasks": task_per_client,
}


def main(arguments: Sequence[str]) -> None:
    """Run one server until its stdin ends."""
    # The daemon logs a line per client, which would mix with the responses here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(SERVERS[arguments[0]]())


if __name__ == "__main__":
    main(sys.argv[1:])
