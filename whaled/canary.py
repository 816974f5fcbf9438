"""Canaries: synthetic whales that pass through the whole daemon periodically and prove that alerts are delivered.

The code that serves whales and clients also decodes a canary's frame, applies the rules, stores the event (and rolls it
back in the same database transaction), encodes it and writes it to a connection. whaled opens that connection to itself
as a client does: through the listener, with TLS if that is enabled. A canary therefore never reaches another client,
takes no offset and is in no history; and whatever delays new clients or alerts also delays canaries.
"""

import asyncio
import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Struct
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from whaled.config.sections import CanarySettings
from whaled.errors import CanaryFailure, EventLogError
from whaled.pause import Pause
from whaled.registry import Registry

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The host name is a placeholder: the certificate is issued for the names that clients use, and verifying it would prove
# nothing to the process that has its key.
URL = "ws://canary.invalid/"


class CanaryMeter:
    """The metrics of canaries, whaled's own transactions, which are the service-level indicator."""

    def __init__(self, registry: Registry) -> None:
        self._sent = registry.counter("canaries_sent", "Canaries started.")
        self._failed = registry.counter(
            "canaries_failed",
            "Canaries that did not arrive in time or met an error, by reason.",
            "reason",
            CanaryFailure,
        )
        self._connect_seconds = registry.histogram(
            "canary_connect_seconds", "Time from the connect of a canary's connection to its welcome."
        )
        self._unreachable = registry.counter(
            "canary_connects_failed", "Failed attempts to open a connection for canaries in time."
        )
        self._seconds = registry.histogram(
            "canary_seconds", "Time from a canary's frame to its arrival at its client, for those in time."
        )
        self._last = registry.gauge("last_canary_timestamp_seconds", "Arrival time of the last canary.")

    def connected(self, seconds: float) -> None:
        """Record a new connection for canaries."""
        self._connect_seconds.observe(seconds)

    def sent(self) -> None:
        """Count a started canary."""
        self._sent.inc()

    def unreachable(self) -> None:
        """Count a failed attempt to open a connection for canaries in time."""
        self._unreachable.inc()

    def arrived(self, seconds: float, at: float) -> None:
        """Record a canary that arrived in time."""
        self._seconds.observe(seconds)
        self._last.set(at)

    def arrived_late(self, at: float) -> None:
        """Record the arrival of a canary that has already been counted as late."""
        self._last.set(at)

    def failed(self, reason: CanaryFailure) -> None:
        """Count a canary that did not arrive in time or met an error."""
        self._failed.labels(reason).inc()


class Endpoint(Protocol):
    """The gateway, as far as canaries need it to connect."""

    tls: ssl.SSLContext | None
    # The local addresses of sockets whose connections are for canaries.
    expected: set[object]
    # The address that clients connect to; None while nothing listens.
    place: tuple[socket.AddressFamily, Any] | None

    def admit(self, sock: socket.socket) -> None:
        """Handle a socket as if the listener had accepted it."""
        ...


class _Data(Struct):
    transaction_id: str


class _Alert(Struct):
    data: _Data


_decode = msgspec.json.Decoder(_Alert).decode


class Line(asyncio.Protocol):
    """The client's end of one connection, with or without compression. `receive` is called with every text message."""

    def __init__(self, receive: Callable[[bytes], None], *, compresses: bool) -> None:
        self.is_up = asyncio.Event()
        self.is_lost = False
        self._receive = receive
        self._ws = ClientProtocol(parse_uri(URL), extensions=[ClientPerMessageDeflateFactory()] if compresses else None)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the WebSocket handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ws.send_request(self._ws.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Read the messages in the data received."""
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.is_up.set()  # the first message is the welcome
                self._receive(bytes(event.data))
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the next canary makes another connection
        """Mark the connection as lost."""
        self.is_lost = True

    def hang_up(self) -> None:
        """Abort the connection without a closing handshake."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._ws.data_to_send()))


class Subscriber:
    """The client that canaries are delivered to."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._line: Line | None = None
        self._expected = ""
        self._compresses = False
        self.arrived = asyncio.Event()

    @classmethod
    @contextmanager
    def connected(cls, endpoint: Endpoint) -> Iterator["Subscriber"]:
        """Close the connection on exit. `connect` makes it."""
        subscriber = cls(endpoint)
        try:
            yield subscriber
        finally:
            if subscriber._line is not None:
                subscriber._line.hang_up()

    async def connect(self, timeout_s: float) -> None:
        """Connect through the listener and close the previous connection. Raises OSError, TimeoutError.

        If that fails, canaries use the previous connection, or a socket pair that bypasses the listener if that one is
        lost.
        """
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._through_the_listener()
        except (OSError, TimeoutError):
            if self._line is None or self._line.is_lost:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        self._line = await self._through_a_pair()
            raise
        if self._line is not None:
            self._line.hang_up()
        self._line = line

    async def _through_the_listener(self) -> Line:
        if self._endpoint.place is None:
            raise ConnectionRefusedError("nothing listens")
        family, place = self._endpoint.place
        sock = socket.socket(family)
        name: object = None
        try:
            sock.setblocking(False)
            # The listener's address is local, so it can be the source address as well. Binding before the connect makes
            # the socket's name known before the gateway accepts the connection.
            sock.bind((place[0], 0, *place[2:]) if isinstance(place, tuple) else "")
            name = sock.getsockname()
            self._endpoint.expected.add(name)
            await asyncio.get_running_loop().sock_connect(sock, place)
            return await self._agree(sock)
        except BaseException:
            sock.close()
            raise
        finally:
            self._endpoint.expected.discard(name)

    async def _through_a_pair(self) -> Line:
        near, far = socket.socketpair()
        try:
            near.setblocking(False)
            far.setblocking(False)
            self._endpoint.admit(near)
        except OSError:
            near.close()
            far.close()
            raise
        return await self._agree(far)

    async def _agree(self, sock: socket.socket) -> Line:
        """Do the TLS handshake, if TLS is enabled, and the WebSocket handshake."""
        tls = None
        if self._endpoint.tls is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
        self._compresses = not self._compresses  # alternate, so that both kinds of connection are tested
        line = Line(self._receive, compresses=self._compresses)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: line, sock=sock, ssl=tls, server_hostname="canary.invalid" if tls is not None else None
            )
            await line.is_up.wait()
        except BaseException:
            line.hang_up()
            sock.close()
            raise
        return line

    def expect(self, txid: str) -> None:
        """Set the canary to wait for."""
        self._expected = txid
        self.arrived.clear()

    def _receive(self, message: bytes) -> None:
        try:
            alert = _decode(message)
        except msgspec.DecodeError:
            return  # the welcome
        if alert.data.transaction_id == self._expected:
            self.arrived.set()


class Canary:
    """The sender of canaries, which also checks their arrival."""

    def __init__(
        self,
        settings: CanarySettings,
        *,
        send: Callable[[str], Awaitable[None]],
        subscriber: Subscriber,
        meter: CanaryMeter,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._send = send
        self._subscriber = subscriber
        self._meter = meter
        self._clock = clock
        self._monotonic = monotonic
        self._is_unreachable = False
        # The start counts as an arrival, so that the first canary has the same time as any other.
        self._last = monotonic()
        self._pause = Pause()

    def reconfigure(self, settings: CanarySettings) -> None:
        """Apply new settings, also to the canary that is due next.

        If canaries arrive, the change counts as an arrival: the last one may be older than a shorter interval allows,
        and systemd must not restart a daemon for that.
        """
        if self.is_alive():
            self._last = self._monotonic()
        self.settings = settings
        self._pause.changed()

    def is_alive(self) -> bool:
        """Return whether a canary arrived within one interval plus the time after which a canary is lost."""
        settings = self.settings
        return self._monotonic() - self._last <= settings.interval + max(settings.deadline, settings.lost_after)

    def since_arrival_s(self) -> float:
        """Return the seconds since the last canary arrived, or since the start."""
        return self._monotonic() - self._last

    async def run(self) -> None:
        """Send one canary after the other until cancelled. One that hangs delays the next, so that none pile up."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._connect()
                began = self._monotonic()
                txid = secrets.token_hex(32)
                self._subscriber.expect(txid)
                self._meter.sent()
                flight = tasks.create_task(self._fly(txid), name="canary flight")
                patience_s = self.settings.deadline
                was_late = False
                while not (await asyncio.wait({flight}, timeout=patience_s))[0]:
                    was_late = True
                    self._late(began)
                    patience_s = self.settings.interval
                if flight.result():
                    await self._arrival(began, was_late=was_late)
                await self._pause.wait(partial(self._left_s, began))

    def _left_s(self, began: float) -> float:
        """Return the seconds that are left of the interval that began with a canary."""
        return began + self.settings.interval - self._monotonic()

    async def _connect(self) -> None:
        began = self._monotonic()
        try:
            await self._subscriber.connect(self.settings.deadline)
        except (OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                # Clients cannot connect either. Any other error may concern this process only: it cannot reach a socket
                # of systemd's, for example, in a service without a network.
                self._meter.unreachable()
            if not self._is_unreachable:
                self._is_unreachable = True
                logger.warning(
                    "canary_listener_bypassed",
                    problem=str(error) or f"not within {self.settings.deadline:g} s",
                )
        else:
            self._meter.connected(self._monotonic() - began)
            if self._is_unreachable:
                self._is_unreachable = False
                logger.info("canary_listener_restored")

    async def _fly(self, txid: str) -> bool:
        """Send a canary; return False if that failed."""
        try:
            await self._send(txid)
        except EventLogError as error:
            logger.error("canary_failed", problem=str(error))  # noqa: TRY400 - the message describes the problem
        except Exception:
            # The same bug would stop a whale. No ping is sent to the watchdog without canaries that arrive.
            logger.exception("canary_failed")
        else:
            return True
        self._meter.failed(CanaryFailure.ERROR)
        return False

    async def _arrival(self, began: float, *, was_late: bool) -> None:
        """Wait for the canary. A late one still proves that alerts are delivered, until `lost_after` has passed."""
        for wait_s in (self.settings.deadline, self.settings.lost_after):
            try:
                async with asyncio.timeout(began + wait_s - self._monotonic()):
                    await self._subscriber.arrived.wait()
            except TimeoutError:
                if not was_late:
                    self._late(began)
                was_late = True
                continue
            self._last = self._monotonic()
            if was_late:
                self._meter.arrived_late(self._clock())
            else:
                self._meter.arrived(self._last - began, self._clock())
            return

    def _late(self, began: float) -> None:
        self._meter.failed(CanaryFailure.LATE)
        logger.error("canary_late", seconds=round(self._monotonic() - began, 1))
