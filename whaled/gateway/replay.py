"""Delivery from the log, for a client that resumes or fell behind, until it has caught up and goes live."""

import asyncio
from typing import NamedTuple, Protocol

from whaled.gateway import wire
from whaled.gateway.hub import Hub, Member, slices
from whaled.model import Event
from whaled.whales.filters import Filter

# Pages read at the same time, over all clients: the log has one reader, more would only wait in its queue.
CONCURRENT_PAGES = 8


class LogReader(Protocol):
    """What replay needs of the event log."""

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, oldest first, at most `limit`."""
        ...


class Receiver(Member, Protocol):
    """A connection that is being replayed to."""

    @property
    def unsent(self) -> int:
        """Bytes the kernel has not taken yet."""
        ...

    def write(self, frame: bytes) -> None:
        """Send complete frames."""
        ...

    async def drained(self) -> None:
        """Wait until nothing is unsent."""
        ...


class TooSlowError(Exception):
    """The client did not take a page in time."""


class LostError(Exception):
    """Events the client has not seen were removed by retention while it was catching up, or are damaged."""


class _Page(NamedTuple):
    """What came of a page: how far the log has been read, the newest offset sent (0: none), how many frames."""

    cursor: int
    told: int
    frames: int


class Replay:
    """Pages the log to one client at a time per call; calls run side by side."""

    def __init__(self, *, log: LogReader, hub: Hub, page: int, slice_bytes: int, slow_timeout_s: float) -> None:
        self._log = log
        self._hub = hub
        self._page = page
        self._slice_bytes = slice_bytes
        self._slow_timeout_s = slow_timeout_s
        self._slots = asyncio.Semaphore(CONCURRENT_PAGES)
        self._last_slot = asyncio.Semaphore(1)
        self.is_short_of_memory = False

    async def run(self, receiver: Receiver, chosen: Filter, cursor: int) -> int:
        """Send what passes `chosen` after `cursor`, then join the hub. Returns how many frames were sent.

        No gap and no double: the last look at the head and joining the hub happen without an await between them.

        While a client takes its time nothing is held for it but what is unsent: the rest of its page is read again. A
        page of events takes some MiB, and hundreds of clients may be slow at once.
        """
        sent = 0
        told = cursor
        await self._drain(receiver)
        while cursor < self._hub.head:
            async with self._last_slot if self.is_short_of_memory else self._slots:
                page = self._send(receiver, chosen, await self._page_after(cursor))
            cursor = page.cursor
            told = page.told or told
            sent += page.frames
            await self._drain(receiver)
        if told < self._hub.head:
            # Nothing matched at the end: without this the next resume would read the same events again.
            receiver.write(wire.position_frame(self._hub.position))
        self._hub.join(receiver, chosen)
        return sent

    async def _page_after(self, cursor: int) -> list[Event]:
        events = await self._log.between(cursor, self._hub.head, self._page)
        # Offsets have no holes: more offsets than events is one that is not held any more, or damaged.
        if not events or events[-1].offset - cursor != len(events):
            raise LostError
        return events

    def _send(self, receiver: Receiver, chosen: Filter, events: list[Event]) -> "_Page":
        """Write what passes, as far as the kernel takes it. A function of its own: when it returns, nothing of the page
        is held any more.
        """
        frames = ((event, wire.event_frame(event, self._hub.epoch)) for event in events if chosen.matches(event))
        told = sent = 0
        for joined in slices(frames, self._slice_bytes):
            receiver.write(joined.data)
            self._hub.delivered(joined)
            told = joined.newest
            sent += joined.alerts + joined.updates
            if receiver.unsent:
                return _Page(told, told, sent)
        return _Page(events[-1].offset, told, sent)

    async def _drain(self, receiver: Receiver) -> None:
        try:
            async with asyncio.timeout(self._slow_timeout_s):
                await receiver.drained()
        except TimeoutError:
            raise TooSlowError from None
