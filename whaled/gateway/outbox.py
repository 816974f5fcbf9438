"""The frames on their way to one client, and the limit of what may wait for it.

The kernel's socket buffer comes first. What it does not take is queued by the socket, up to `gateway.max_unsent` for
deliveries and up to twice that with answers. A client that exceeds the first limit is served from the event log once
its queue is empty, and one that exceeds the second is closed.
"""

import asyncio
from typing import Protocol

from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway.nosocket import NO_SOCKET

# Deliveries stay within the limit of unsent bytes (`write_behind`, and the slices of a replay). The excess is answers.
WITH_ANSWERS = 2


class Socket(Protocol):
    """The socket as an outbox sees it."""

    fd: int

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        ...

    @property
    def is_plain(self) -> bool:
        """True if frames may be written to `fd` without encryption."""
        ...

    def write(self, data: bytes) -> None:
        """Send data, queueing the bytes that the kernel does not take now."""
        ...


class Settled(Protocol):
    """The holder of the settings in force."""

    settings: GatewaySettings


class OutboxOwner(Protocol):
    """The connection that an outbox belongs to."""

    def fell_behind(self, cursor: int) -> None:
        """Continue from the event log after `cursor`."""
        ...

    def close(self, close: Close) -> None:
        """Start the closing handshake."""
        ...


class Outbox:
    """The writing side of a connection: a `Member` of the hub, and the `Receiver` of a replay.

    It takes frames between `open` and `shut`, and ignores them otherwise. `fd` is the socket's descriptor while a frame
    may be written to it directly: it is -1 under TLS, while bytes are unsent, and while the outbox is not open.
    """

    __slots__ = ("_emptied", "_house", "_is_open", "_owner", "_socket", "fd", "takes_deflate")

    def __init__(self, owner: OutboxOwner, house: Settled) -> None:
        self._owner: OutboxOwner | None = owner  # None once the socket is lost
        self._house = house
        self._socket: Socket = NO_SOCKET
        self._is_open = False
        self._emptied: asyncio.Future[None] | None = None
        self.fd = -1
        self.takes_deflate = False

    # --- its life ---

    def open(self, socket: Socket, *, takes_deflate: bool) -> None:
        """Take frames from now on: the WebSocket is open."""
        self._socket = socket
        self._is_open = True
        self.takes_deflate = takes_deflate
        self._refresh()

    def filled(self) -> None:
        """Handle the first unsent bytes: frames are queued behind them from now on."""
        self.fd = -1

    def emptied(self) -> None:
        """Handle the end of unsent bytes: frames may be written directly again."""
        self._refresh()
        self._wake()

    def shut(self) -> None:
        """Take no more frames: the connection is closing. The unsent bytes are still sent."""
        self._is_open = False
        self.fd = -1

    def lost(self) -> None:
        """Handle the end of the socket, whose descriptor may be reused from now on."""
        self.shut()
        # Break the cycles with the connection: its memory must not wait for the collector.
        self._socket, self._owner = NO_SOCKET, None
        self._wake()

    def _refresh(self) -> None:
        is_direct = self._is_open and self._socket.is_plain and not self._socket.unsent
        self.fd = self._socket.fd if is_direct else -1

    def _wake(self) -> None:
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)
        self._emptied = None

    # --- writing ---

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        return self._socket.unsent

    def write(self, frame: bytes) -> None:
        """Send complete frames. A client that does not read its answers is closed."""
        if not self._is_open:
            return
        self._socket.write(frame)
        self.check()

    def check(self) -> None:
        """Close the connection if more is unsent than deliveries alone may leave."""
        is_over = self._is_open and self._socket.unsent > WITH_ANSWERS * self._house.settings.max_unsent
        if is_over and self._owner is not None:
            self._owner.close(Close.TOO_SLOW)

    def write_rest(self, rest: bytes) -> None:
        """Queue the rest of a frame whose first bytes the kernel has already taken."""
        self._socket.write(rest)

    def write_behind(self, data: bytes) -> bool:
        """Queue data behind the unsent bytes. Return False, queueing nothing, if it would exceed the client's limit."""
        if not self._is_open:
            return True  # a closing connection needs no replay
        unsent = self._socket.unsent
        if unsent and unsent + len(data) > self._house.settings.max_unsent:
            return False
        self._socket.write(data)
        return True

    def fell_behind(self, cursor: int) -> None:
        """Continue from the event log after `cursor`. The hub has removed this outbox from its group."""
        if self._owner is not None:
            self._owner.fell_behind(cursor)

    async def drained(self) -> None:
        """Wait until nothing is unsent or the socket is closed. The caller limits the wait."""
        while self._socket.unsent:
            if self._emptied is None:
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)
