"""A running gateway on a real event log, and clients of it."""

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from kit.whales import alert_draft
from whaled.config.sections import AuthSettings, EventLogSettings, GatewaySettings
from whaled.eventlog.store import EventLog
from whaled.gateway.credential import Authenticator
from whaled.gateway.server import Gateway
from whaled.metrics import Metrics
from whaled.model import Draft, Event

# With the 64 KiB segments of loopback the kernel buffers 3 MB for a client that reads nothing; with these, 50 KB.
SMALL_SEGMENT = 536
PUBLISHED_AT = 1_800_000_000.0  # 2027-01-15T08:00:00Z


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def silent_client(
    url: str, *, receive_buffer: int | None = None, segment_bytes: int | None = None, request: bytes = UPGRADE
) -> socket.socket:
    """Connect a client that requests the upgrade and then reads nothing."""
    host, port = url.removeprefix("ws://").split(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if segment_bytes is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment_bytes)
    try:
        sock.connect((host, int(port)))
        sock.sendall(request)
    except OSError:
        sock.close()
        raise
    return sock


class Rig:
    """A listening gateway and its event log."""

    def __init__(self, log: EventLog, gateway: Gateway, url: str, metrics: Metrics) -> None:
        self.log = log
        self.gateway = gateway
        self.url = url
        self.metrics = metrics

    async def publish(self, *drafts: Draft) -> list[Event]:
        """Commit and publish, as the pipeline does."""
        events = await self.log.append(drafts)
        self.gateway.publish(events)
        return events

    async def alerts(self, *numbers: int, btc: float = 150.0) -> list[Event]:
        """Commit and publish an alert for each number."""
        return await self.publish(*(alert_draft(number, btc, PUBLISHED_AT) for number in numbers))

    def connect(self, path: str = "/", **options: Any) -> connect:
        """Return a client of the `websockets` library: a test of the gateway needs an independent implementation."""
        return connect(self.url + path, proxy=None, compression=None, **options)

    def value(self, metric: str, **labels: str) -> float:
        """Return the value of a metric."""
        value = self.metrics.registry.collectors.get_sample_value(metric, labels)
        assert value is not None, f"no metric {metric} {labels}"
        return value


@asynccontextmanager
async def running_gateway(
    directory: Path,
    *,
    authenticator: Authenticator | None = None,
    auth: AuthSettings | None = None,
    tls: ssl.SSLContext | None = None,
    clock: Callable[[], float] = time.time,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway on port 0 with an event log in `directory`."""
    metrics = Metrics()
    async with EventLog.open(EventLogSettings(path=str(directory / "whaled.db")), metrics.eventlog) as log:
        gateway = Gateway(
            GatewaySettings(port=0, **settings),
            auth or AuthSettings(),
            event_log=log,
            authenticator=authenticator,
            meter=metrics.gateway,
            tls=tls,
            clock=clock,
        )
        async with gateway.serving() as address:
            scheme = "ws" if tls is None else "wss"
            yield Rig(log, gateway, f"{scheme}://{address}", metrics)


async def receive(client: ClientConnection) -> Any:
    """Return the next frame, parsed as JSON."""
    return json.loads(await client.recv())


async def receive_type(client: ClientConnection, kind: str) -> Any:
    """Return the next frame of a type; frames of other types are skipped."""
    while True:
        frame = await receive(client)
        if frame["type"] == kind:
            return frame


async def ask(client: ClientConnection, **message: Any) -> None:
    """Send a command."""
    await client.send(json.dumps(message))


async def closed_with(client: Any) -> tuple[int, str]:
    """Read until the server closes, and return its code and reason."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionClosed):
            async for _ in client:
                pass
    return client.close_code, client.close_reason


async def offsets(client: Any, count: int) -> list[int]:
    return [(await receive_type(client, "whale_alert"))["position"]["offset"] for _ in range(count)]


def stuffed_client(rig: Rig) -> socket.socket:
    """Connect a client that requests the upgrade and then reads nothing, with a small receive buffer."""
    return silent_client(rig.url, receive_buffer=4096)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a test has no hook into what it watches from outside
            await asyncio.sleep(0.001)
