"""The proof that a whale would get through: a transaction of whaled's own goes all the way, again and again.

Its frame is decoded, judged, stored (and taken back in the same transaction), encoded and written to a socket by the
very code that serves whales and clients. Only the last step differs: the socket is our own. So a canary never reaches a
client, takes no offset and is in no history.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from whaled.config import sections
from whaled.errors import CanaryFailure, EventLogError

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# More than a canary's alert takes, so that it is read in one piece.
READ_BYTES = 64 * 1024


class CanaryMeter(Protocol):
    """What is counted of canaries."""

    def sent(self) -> None:
        """A canary was started."""
        ...

    def arrived(self, seconds: float, at: float) -> None:
        """A canary arrived."""
        ...

    def failed(self, reason: CanaryFailure) -> None:
        """A canary did not arrive in time, or broke on the way."""
        ...


class _Data(Struct):
    transaction_id: str


class _Alert(Struct):
    data: _Data


_decode = msgspec.json.Decoder(_Alert).decode


class Subscriber:
    """The member of the hub that canaries are delivered to: one end of a pair of sockets, read at the other."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.fd = near.fileno()
        self._far = far
        self._expected = ""
        self.arrived = asyncio.Event()

    @classmethod
    @contextmanager
    def connected(cls) -> Iterator["Subscriber"]:
        """Listen on the running loop until left."""
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            far.setblocking(False)
            subscriber = cls(near, far)
            loop = asyncio.get_running_loop()
            loop.add_reader(far, subscriber.read)
            try:
                yield subscriber
            finally:
                loop.remove_reader(far)

    def expect(self, txid: str) -> None:
        """Wait for this one from now on."""
        self._expected = txid
        self.arrived.clear()

    def read(self) -> None:
        """Something came in."""
        frame = self._far.recv(READ_BYTES)
        try:
            alert = _decode(frame[frame.index(b"{") :])
        except (ValueError, msgspec.DecodeError):
            log.warning("a canary arrived unreadable", frame_bytes=len(frame))
            return
        if alert.data.transaction_id == self._expected:
            self.arrived.set()

    # --- what the hub asks of a member ---

    def write_behind(self, data: bytes) -> bool:  # noqa: ARG002 - the hub's interface
        """Nothing is queued: a canary that cannot be written is lost, and is missed."""
        return True

    def write_rest(self, rest: bytes) -> None:
        """Nothing is queued."""

    def fell_behind(self, cursor: int) -> None:
        """There is nothing to go on from."""


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
        # The start counts as an arrival: the first canary has its time too.
        self._last = monotonic()

    def is_alive(self) -> bool:
        """Whether a canary has arrived lately: within an interval and the time it may take."""
        return self._monotonic() - self._last <= self.settings.interval + self.settings.deadline

    async def run(self) -> None:
        """Send one after the other until cancelled. One that hangs holds up the next: nothing piles up behind it."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                began = self._monotonic()
                txid = secrets.token_hex(32)
                self._subscriber.expect(txid)
                self._meter.sent()
                flight = tasks.create_task(self._fly(txid), name="canary flight")
                patience_s = self.settings.deadline
                while not (await asyncio.wait({flight}, timeout=patience_s))[0]:
                    self._late(began)
                    patience_s = self.settings.interval
                if flight.result():
                    await self._arrival(began)
                await asyncio.sleep(max(0.0, began + self.settings.interval - self._monotonic()))

    async def _fly(self, txid: str) -> bool:
        """Whether it is on its way to the subscriber."""
        try:
            await self._send(txid)
        except EventLogError as error:
            log.error("canary failed", problem=str(error))  # noqa: TRY400 - the message says what to mend
        except Exception:
            # A bug on the way: whales meet it too, and the watchdog is told by silence.
            log.exception("canary failed")
        else:
            return True
        self._meter.failed(CanaryFailure.ERROR)
        return False

    async def _arrival(self, began: float) -> None:
        try:
            async with asyncio.timeout(self.settings.deadline):
                await self._subscriber.arrived.wait()
        except TimeoutError:
            self._late(began)
            return
        self._last = self._monotonic()
        self._meter.arrived(self._last - began, self._clock())

    def _late(self, began: float) -> None:
        self._meter.failed(CanaryFailure.LATE)
        log.error("canary late: an alert would be too", seconds=round(self._monotonic() - began, 1))
