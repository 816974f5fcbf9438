"""Helpers shared by several tests: whales to publish, and a running gateway on a real event log."""

import hashlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from whaled.config.sections import AuthSettings, EventLogSettings, GatewaySettings
from whaled.eventlog.store import EventLog
from whaled.gateway.server import Gateway
from whaled.gateway.session import Authenticator
from whaled.metrics import Metrics
from whaled.model import Alert, Draft, Event, Flow, Kind, Shape, Source, Status, Update, Whale

SAT = 100_000_000


def txid(number: int) -> str:
    """Return a realistic txid, a different one for each number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def whale(number: int, btc: float = 150.0, *, addresses: tuple[str, ...] = ()) -> Whale:
    """Return a whale of `btc` BTC."""
    return Whale(
        Alert(
            transaction_id=txid(number),
            btc_value=btc,
            value_sat=round(btc * SAT),
            moved_sat=None,
            fee_sat=1470,
            usd_value=None,
            btc_usd=None,
            fee_rate=10.5,
            vsize=141,
            urgency_score=None,
            flow_type=Flow.UNKNOWN,
            exchange_addresses=(),
            confidence_score=None,
            from_labels=(),
            to_labels=(),
            shape=Shape.TRANSFER,
            reasons=(),
            input_count=1,
            output_count=2,
            rbf_enabled=False,
            predicted_confirmation_block=None,
            detection_timestamp="2026-01-01T00:00:00+00:00",
            status=Status.PENDING,
            source=Source.LIVE,
        ),
        addresses,
    )


def alert_draft(
    number: int, btc: float = 150.0, at: float = 1_800_000_000.0, *, addresses: tuple[str, ...] = ()
) -> Draft:
    """Return an alert that is not in the log yet."""
    return Draft(kind=Kind.ALERT, at=at, whale=whale(number, btc, addresses=addresses))


def confirmed_draft(number: int, btc: float = 150.0, at: float = 1_800_000_600.0) -> Draft:
    """Return the confirmation of a whale."""
    update = Update(transaction_id=txid(number), status=Status.CONFIRMED, btc_value=btc, block_height=800_000)
    return Draft(kind=Kind.CONFIRMED, at=at, whale=whale(number, btc), ref="b" * 64, update=update)


# With the 64 KiB segments of loopback the kernel buffers 3 MB for a client that reads nothing; with these, 50 KB.
SMALL_SEGMENT = 536


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
        return await self.publish(*(alert_draft(number, btc) for number in numbers))

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
            clock=clock,
        )
        async with gateway.serving(tls=tls) as address:
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
