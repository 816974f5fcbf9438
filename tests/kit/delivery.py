"""An event log and clients in memory, for the hub and the replay without a socket."""

import asyncio
from collections.abc import Callable

from whaled.model import Event
from whaled.whales.filters import EVERYTHING, Filter

# A frame has about 700 bytes: four of them fit, and a client that has more unsent lags.
BOUND_BYTES = 3_000


class Log:
    """An event log in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        await asyncio.sleep(0)
        return self.events[after:through][:limit]


class Meter:
    """Counts nothing."""

    def worked(self, *_: object) -> None:
        pass


class Client:
    """A client that reads on request. `start` is the position from which on it has subscribed.

    `deliver` is called with the client and a cursor when it fell behind.
    """

    fd = -1
    takes_deflate = False
    source = "client"

    def __init__(self, deliver: Callable[["Client", int], None] = lambda *_: None) -> None:
        self._deliver = deliver
        self._queued = bytearray()
        self._received = bytearray()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self.charged = 0
        self.chosen = EVERYTHING
        self.start = 0
        self.replay: asyncio.Task[object] | None = None

    @property
    def unsent(self) -> int:
        return len(self._queued)

    def write(self, frame: bytes) -> None:
        self._queued += frame
        self._emptied.clear()

    def write_behind(self, data: bytes) -> bool:
        if self.unsent and self.unsent + len(data) > BOUND_BYTES:
            return False
        self.write(data)
        return True

    def write_rest(self, rest: bytes) -> None:
        raise NotImplementedError

    def fell_behind(self, cursor: int) -> None:
        self._deliver(self, cursor)

    async def drained(self) -> None:
        await self._emptied.wait()

    def charge_replay(self, events: int) -> None:
        self.charged += events

    def read(self) -> None:
        """Read everything queued."""
        self._received += self._queued
        self._queued.clear()
        self._emptied.set()

    def subscribe(self, chosen: Filter, start: int) -> None:
        """Start a subscription: what was received until now belongs to another one."""
        self.read()
        self._received.clear()
        self.chosen, self.start = chosen, start

    @property
    def received(self) -> bytes:
        """What was read of the current subscription."""
        return bytes(self._received)

    @property
    def offsets(self) -> list[int]:
        """Offsets of the events received, in their order."""
        frames = self.received.split(b'{"type":"whale_alert"')[1:]
        return [int(frame.split(b'"offset":')[1].split(b"}")[0]) for frame in frames]
