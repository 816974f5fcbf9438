"""The load process: clients that the attack must not affect, and new clients. Reads commands and responds in JSON.

`open` connects all. `gather FIRST COUNT S` waits at most S seconds until all have received these whales, and returns
latencies, lost, doubled and cut. `newcomers` lets valid new clients arrive until `arrivals`, which waits for the last
one and returns the time that each took.
"""

import asyncio
import gc
import json
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.attack.payloads import LOOPBACK, frame, message, request
from bench.messages import MARK

OPENINGS_AT_ONCE = 20
OPEN_LIMIT_S = 20.0
# A new client that takes longer counts as not accepted.
NEWCOMER_LIMIT_S = 5.0
NEWCOMER_EVERY_S = 0.1
LOOK_S = 0.02
NEWCOMER_ADDRESS = "127.0.200.1"
VICTIM_ADDRESSES = 4
_MARK = MARK.encode()
_ALERT = b'"whale_alert"'


@dataclass(frozen=True, slots=True)
class Order:
    """The daemon's port, and the tokens of the clients."""

    port: int
    tokens: list[str]
    tls: bool = False
    newcomer_address: str = NEWCOMER_ADDRESS


@dataclass
class Gathered:
    """The deliveries of a range of whales."""

    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    received: int = 0
    lost: int = 0
    doubled: int = 0
    cut: int = 0


@dataclass
class Arrival:
    """A new client: whether its token was in the header, and after how long it was accepted, None if never."""

    in_header: bool
    after_ms: float | None


class Client(asyncio.Protocol):
    """A client that reads frames as they arrive."""

    def __init__(self, first: bytes, on_alert: "Callable[[Client, bytes, int], None] | None" = None) -> None:
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.numbers: set[int] = set()
        self.doubled = 0
        self.is_cut = False
        self._first = first
        self._on_alert = on_alert
        self._rest = b""
        self._is_upgraded = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._first)

    def data_received(self, data: bytes) -> None:
        """Process the complete frames."""
        now = time.monotonic_ns()
        rest = self._rest + data if self._rest else data
        if not self._is_upgraded:
            head, found, rest = rest.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return
            if head[9:12] != b"101":
                self.lose()
                return
            self._is_upgraded = True
        at = 0
        while len(rest) - at >= 2:
            size, start = rest[at + 1] & 0x7F, at + 2
            if size == 126:
                size, start = int.from_bytes(rest[start : start + 2], "big"), start + 2
            elif size == 127:
                size, start = int.from_bytes(rest[start : start + 8], "big"), start + 8
            if len(rest) < start + size:
                break
            self._take(rest[at] & 0x0F, rest[start : start + size], now)
            at = start + size
        self._rest = rest[at:]

    def _take(self, opcode: int, payload: bytes, now: int) -> None:
        if opcode == 9:
            assert self.transport is not None
            self.transport.write(frame(payload, 10))
        elif opcode == 1:
            if b'"welcome"' in payload and not self.welcome.done():
                self.welcome.set_result(None)
            elif self._on_alert is not None and _ALERT in payload:
                self._on_alert(self, payload, now)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - the interface
        """Handle the end of the connection, whichever side closed it."""
        self.lose()

    def lose(self) -> None:
        """Mark the client as not connected."""
        self.is_cut = True
        if not self.welcome.done():
            self.welcome.set_exception(ConnectionResetError())
            self.welcome.exception()

    def abort(self) -> None:
        """Abort the connection."""
        if self.transport is not None:
            self.transport.abort()


class Crowd:
    """The victims and the new clients."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.clients: list[Client] = []
        self.latencies: dict[int, list[float]] = {}
        self.arrivals: list[Arrival] = []
        self._context: ssl.SSLContext | None = None
        if order.tls:
            self._context = ssl._create_unverified_context()  # noqa: SLF001
        self._coming: asyncio.Task[None] | None = None
        self._is_over = False

    async def open(self) -> dict[str, int]:
        """Connect all victims and wait until they are accepted."""
        tokens = self.order.tokens[1:]
        for begin in range(0, len(tokens), OPENINGS_AT_ONCE):
            async with asyncio.timeout(OPEN_LIMIT_S), asyncio.TaskGroup() as tasks:
                for number, token in enumerate(tokens[begin : begin + OPENINGS_AT_ONCE], begin):
                    tasks.create_task(self._join(number, token))
        gc.collect()
        gc.freeze()
        return {"open": sum(not client.is_cut for client in self.clients)}

    async def _join(self, number: int, token: str) -> None:
        client = await self._connect(f"127.0.9.{1 + number % VICTIM_ADDRESSES}", request(token), self._record)
        await client.welcome
        self.clients.append(client)

    async def _connect(
        self, source: str, first: bytes, on_alert: Callable[[Client, bytes, int], None] | None = None
    ) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Client(first, on_alert), LOOPBACK, self.order.port, ssl=self._context, local_addr=(source, 0)
        )
        return client

    def _record(self, client: Client, payload: bytes, now: int) -> None:
        at = payload.find(_MARK)
        if at < 0:
            return
        number, sent = int(payload[at + 16 : at + 32], 16), int(payload[at + 32 : at + 48], 16)
        if number in client.numbers:
            client.doubled += 1
            return
        client.numbers.add(number)
        self.latencies.setdefault(number, []).append((now - sent) / 1e6)

    async def gather(self, first: int, count: int, within_s: float) -> Gathered:
        """Wait for whales `first` to `first + count - 1`."""
        wanted = range(first, first + count)
        end = time.monotonic() + within_s
        # An asyncio.Event per delivery would add to the measured cost.
        while time.monotonic() < end and not self._have(wanted):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        found = sorted(took for number in wanted for took in self.latencies.pop(number, ()))
        gathered = Gathered(
            received=len(found),
            lost=len(self.clients) * count - len(found),
            doubled=sum(client.doubled for client in self.clients),
            cut=self._cut(),
        )
        if found:
            gathered.p50_ms, gathered.p99_ms, gathered.max_ms = (
                found[round(part * (len(found) - 1))] for part in (0.5, 0.99, 1.0)
            )
        return gathered

    def _have(self, wanted: range) -> bool:
        there = len(self.clients) - self._cut()
        return all(len(self.latencies.get(number, ())) >= there for number in wanted)

    def _cut(self) -> int:
        return sum(client.is_cut for client in self.clients)

    def begin_newcomers(self) -> None:
        """Connect a new client every tenth of a second, with its token alternately in the header and in a message."""
        self.arrivals = []
        self._is_over = False
        self._coming = asyncio.create_task(self._come())

    async def end_newcomers(self) -> list[Arrival]:
        """Stop, and wait for the new clients that are still connecting."""
        assert self._coming is not None
        self._is_over = True
        await self._coming
        return self.arrivals

    async def _come(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            number = 0
            while not self._is_over:
                tasks.create_task(self._arrive(in_header=number % 2 == 0))
                number += 1
                await asyncio.sleep(NEWCOMER_EVERY_S)

    async def _arrive(self, *, in_header: bool) -> None:
        token = self.order.tokens[0]
        first = request(token) if in_header else request() + message(type="auth", token=token)
        began, client, after_ms = time.monotonic(), None, None
        try:
            async with asyncio.timeout(NEWCOMER_LIMIT_S):
                client = await self._connect(self.order.newcomer_address, first)
                await client.welcome
            after_ms = 1000 * (time.monotonic() - began)
        except OSError:  # includes TimeoutError
            pass
        finally:
            if client is not None:
                client.abort()
        self.arrivals.append(Arrival(in_header, after_ms))


async def serve(order: Order) -> None:
    """Process commands until stdin ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    crowd = Crowd(order)
    async for line in reader:
        match line.decode().split():
            case ["open"]:
                response: object = await crowd.open()
            case ["gather", first, count, within_s]:
                response = asdict(await crowd.gather(int(first), int(count), float(within_s)))
            case ["newcomers"]:
                crowd.begin_newcomers()
                response = {}
            case ["arrivals"]:
                response = {"arrivals": [asdict(arrival) for arrival in await crowd.end_newcomers()]}
            case _:
                raise ValueError(line)
        print(json.dumps(response), flush=True)


def main() -> None:
    """Run the process. Its order is in a file, since two hundred tokens are too long for a command line."""
    order = Order(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    asyncio.run(serve(order))


if __name__ == "__main__":
    main()
