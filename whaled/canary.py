"""The proof that a whale would get through: a transaction of whaled's own goes all the way, again and again.

Its frame is decoded, judged, stored (and taken back in the same transaction), encoded and written by the very code that
serves whales and clients, to a connection that was made for it as a client makes one: through the listener, with TLS
where that is on. Only, the client is whaled itself. So a canary never reaches another client, takes no offset and is in
no history; and what delays newcomers or alerts delays it.
"""

import asyncio
import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Struct
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from whaled.config import sections
from whaled.errors import CanaryFailure, EventLogError

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The certificate is for the names that clients use, and proves nothing to the process that has its key.
URL = "ws://canary.invalid/"


class CanaryMeter(Protocol):
    """What is counted of canaries."""

    def connected(self, seconds: float) -> None:
        """A connection for canaries was made, from connect to `welcome`."""
        ...

    def unreachable(self) -> None:
        """No connection for canaries could be made in time."""
        ...

    def sent(self) -> None:
        """A canary was started."""
        ...

    def arrived(self, seconds: float, at: float) -> None:
        """A canary arrived in time."""
        ...

    def arrived_late(self, at: float) -> None:
        """A canary arrived that has been counted as late."""
        ...

    def failed(self, reason: CanaryFailure) -> None:
        """A canary did not arrive in time, or broke on the way."""
        ...


class Door(Protocol):
    """Where canaries come in: the gateway."""

    tls: ssl.SSLContext | None
    # Names of sockets whose connections are those of canaries.
    expected: set[object]
    # Where clients connect to; None while nothing listens.
    place: tuple[socket.AddressFamily, Any] | None

    def admit(self, sock: socket.socket) -> None:
        """Take a socket as if it had been accepted."""
        ...


class _Data(Struct):
    transaction_id: str


class _Alert(Struct):
    data: _Data


_decode = msgspec.json.Decoder(_Alert).decode


class Line(asyncio.Protocol):
    """A client's end of one connection, which asks for compression or not. `hear` gets every text message."""

    def __init__(self, receive: Callable[[bytes], None], *, compresses: bool) -> None:
        self.is_up = asyncio.Event()
        self.is_lost = False
        self._receive = receive
        self._ws = ClientProtocol(parse_uri(URL), extensions=[ClientPerMessageDeflateFactory()] if compresses else None)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the WebSocket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ws.send_request(self._ws.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Something came in."""
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.is_up.set()  # the first message is the welcome
                self._receive(bytes(event.data))
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the next canary makes another connection
        """The connection is gone."""
        self.is_lost = True

    def hang_up(self) -> None:
        """Close without ado."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._ws.data_to_send()))


class Subscriber:
    """The client that canaries are delivered to."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._line: Line | None = None
        self._expected = ""
        self._compresses = False
        self.arrived = asyncio.Event()

    @classmethod
    @contextmanager
    def connected(cls, door: Door) -> Iterator["Subscriber"]:
        """Hang up when it is left. The connection is made by `connect`."""
        subscriber = cls(door)
        try:
            yield subscriber
        finally:
            if subscriber._line is not None:
                subscriber._line.hang_up()

    async def connect(self, timeout_s: float) -> None:
        """Connect through the listener and hang up the connection before. Raises OSError, TimeoutError.

        If that fails, canaries go over the connection there was, or over a pair of sockets that nobody listened for.
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
        if self._door.place is None:
            raise ConnectionRefusedError("nothing listens")
        family, place = self._door.place
        sock = socket.socket(family)
        name: object = None
        try:
            sock.setblocking(False)
            # The address that is connected to is one of this machine, so it is one to connect from.
            sock.bind((place[0], 0, *place[2:]) if isinstance(place, tuple) else "")
            name = sock.getsockname()
            self._door.expected.add(name)
            await asyncio.get_running_loop().sock_connect(sock, place)
            return await self._agree(sock)
        except BaseException:
            sock.close()
            raise
        finally:
            self._door.expected.discard(name)

    async def _through_a_pair(self) -> Line:
        near, far = socket.socketpair()
        try:
            near.setblocking(False)
            far.setblocking(False)
            self._door.admit(near)
        except OSError:
            near.close()
            far.close()
            raise
        return await self._agree(far)

    async def _agree(self, sock: socket.socket) -> Line:
        """TLS where that is on, and the WebSocket."""
        tls = None
        if self._door.tls is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
        self._compresses = not self._compresses  # by turns, so that both ways are watched
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
        """Wait for this one from now on."""
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
    """Sends canaries and watches them arrive. `settings` may be replaced at any time (reload)."""

    def __init__(
        self,
        settings: sections.Canary,
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
        # The start counts as an arrival: the first canary has its time too.
        self._last = monotonic()

    def is_alive(self) -> bool:
        """Whether a canary has arrived lately: within an interval and the time after which one is lost."""
        settings = self.settings
        return self._monotonic() - self._last <= settings.interval + max(settings.deadline, settings.lost_after)

    async def run(self) -> None:
        """Send one after the other until cancelled. One that hangs holds up the next: nothing piles up behind it."""
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
                await asyncio.sleep(max(0.0, began + self.settings.interval - self._monotonic()))

    async def _connect(self) -> None:
        began = self._monotonic()
        try:
            await self._subscriber.connect(self.settings.deadline)
        except (OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                # Clients cannot connect either. Otherwise it may just be a place that this process does not reach, such
                # as a socket of systemd's in front of a service without a network.
                self._meter.unreachable()
            if not self._is_unreachable:
                self._is_unreachable = True
                logger.warning(
                    "canaries cannot connect as clients do, and go without a new connection",
                    problem=str(error) or f"not within {self.settings.deadline:g} s",
                )
        else:
            self._meter.connected(self._monotonic() - began)
            if self._is_unreachable:
                self._is_unreachable = False
                logger.info("canaries connect again")

    async def _fly(self, txid: str) -> bool:
        """Whether it is on its way to the subscriber."""
        try:
            await self._send(txid)
        except EventLogError as error:
            logger.error("canary failed", problem=str(error))  # noqa: TRY400 - the message says what to mend
        except Exception:
            # A bug on the way: whales meet it too, and the watchdog is told by silence.
            logger.exception("canary failed")
        else:
            return True
        self._meter.failed(CanaryFailure.ERROR)
        return False

    async def _arrival(self, began: float, *, was_late: bool) -> None:
        """Wait for it. A late one is still a sign of life, up to the time after which it is lost."""
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
        logger.error("canary late: an alert would be too", seconds=round(self._monotonic() - began, 1))
