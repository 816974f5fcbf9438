"""Pages of the event log for replays: read one at a time for all clients in turn, and cached.

A page starts at a multiple of its size, so replays that start at different offsets share pages. The memory of the cache
is limited in total. A slow client holds no page.
"""

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from msgspec import Struct

from whaled.gateway import messages
from whaled.gateway.deflate import Deflater
from whaled.gateway.framing import text_frame
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Event

# The memory limit of the cache, and the estimates it is based on: an event, decoded and encoded, and each address.
KEPT_BYTES = 8 * 1024 * 1024
EVENT_BYTES = 4096
ADDRESS_BYTES = 112
# Reading and sending a page takes about a millisecond. If only one source reads, several pages are read at once.
PAGE_EVENTS = 100


class LogReader(Protocol):
    """The part of the event log that replays use."""

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Return events with after < offset <= through, oldest first, at most `limit`."""
        ...


class LostError(Exception):
    """Events that the client has not received were removed by retention during the replay, or cannot be read."""


class Page(Struct):
    """Events ordered by offset, with their plain and compressed frames, which are made on demand."""

    events: list[Event]
    frames: list[bytes | None]
    smaller: list[bytes | None]
    size_bytes: int

    @classmethod
    def of(cls, events: list[Event]) -> "Page":
        """Return a page of these events."""
        addresses = sum([len(event.whale.addresses) for event in events])
        count = len(events)
        return cls(events, [None] * count, [None] * count, EVENT_BYTES * count + ADDRESS_BYTES * addresses)

    def frame(self, index: int, epoch: str, matched_addresses: tuple[str, ...] = ()) -> bytes:
        """Return the frame of an event. A frame without matched addresses is encoded once for all clients."""
        if matched_addresses:
            return text_frame(messages.event(self.events[index], epoch, matched_addresses))
        frame = self.frames[index]
        if frame is None:
            frame = self.frames[index] = text_frame(messages.event(self.events[index], epoch))
        return frame

    def compressed(self, index: int, frame: bytes, deflater: Deflater, *, is_shared: bool) -> bytes:
        """Return the compressed form of an event's frame. If `is_shared`, it is made once for all clients."""
        if not is_shared:
            return deflater.frame(frame)
        smaller = self.smaller[index]
        if smaller is None:
            smaller = self.smaller[index] = deflater.frame(frame)
        return smaller

    @property
    def newest(self) -> int:
        """The offset of the last event, 0 if there is none."""
        return self.events[-1].offset if self.events else 0


class _Request(Struct):
    """A request for a page, and the number of replays that wait for it."""

    done: asyncio.Future[Page]
    waiting: int = 0


# The offset before the first event of a page, and its size.
_Span = tuple[int, int]


class Pages:
    """The reader and cache of pages. `run` reads them; `head` returns the newest offset to read.

    `keeps` is False while memory is short: then no page is cached.
    """

    def __init__(self, *, log: LogReader, share: LoopShare, head: Callable[[], int], at_once: int) -> None:
        self.resize(at_once)
        self.keeps = True
        self._log = log
        self._share = share
        self._head = head
        self._kept: OrderedDict[int, Page] = OrderedDict()
        self._kept_bytes = 0
        self._replays = 0
        self._requests: dict[_Span, _Request] = {}
        # The requests of each source. Sources take turns, however many replays each has.
        self._turns: dict[str, deque[_Span]] = {}
        self._requested = asyncio.Event()

    def resize(self, at_once: int) -> None:
        """Set how many events are read at once while nothing else waits."""
        self.at_once = at_once
        self.size = min(at_once, PAGE_EVENTS)

    @property
    def kept_bytes(self) -> int:
        """The approximate memory of the cached pages."""
        return self._kept_bytes

    def forget(self) -> None:
        """Drop all cached pages."""
        self._kept.clear()
        self._kept_bytes = 0

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Count a replay while the body runs. Pages are dropped when the last replay ends."""
        self._replays += 1
        try:
            yield
        finally:
            self._replays -= 1
            if not self._replays:
                self.forget()

    def used(self, cursor: int) -> None:
        """Drop the page that ends at `cursor` if only one replay is running, which no longer needs it.

        The next page then reuses its memory, which is a fifth faster.
        """
        start = self._start(cursor - 1)
        if self._replays == 1 and start in self._kept and self._kept[start].newest == cursor:
            self._drop(start)

    def kept(self, cursor: int) -> Page | None:
        """Return the page with the event after `cursor`, if it is cached."""
        page = self._kept.get(self._start(cursor))
        if page is None or page.newest <= cursor:
            return None
        return page

    async def read(self, cursor: int, source: str) -> Page:
        """Read the page with the event after `cursor`, when it is the turn of `source`. Raises LostError."""
        span = self._start(cursor), self.size
        request = self._requests.get(span)
        if request is None:
            request = self._requests[span] = _Request(asyncio.get_running_loop().create_future())
        self._turns.setdefault(source, deque()).append(span)
        self._requested.set()
        request.waiting += 1
        try:
            page = await asyncio.shield(request.done)
        finally:
            request.waiting -= 1
            if not request.waiting and self._requests.get(span) is request:
                del self._requests[span]  # no replay waits for it any more, so it will not be read
        if page.newest <= cursor:
            raise LostError
        return page

    async def run(self) -> None:
        """Read requested pages until cancelled. Raises EventLogError."""
        while True:
            span = self._next()
            if span is None:
                self._requested.clear()
                await self._requested.wait()
                continue
            # Wait for a turn in the lane: pending alerts go first, and earlier pages are sent before the next is read.
            await self._share.run(Lane.REPLAY, _nothing)
            # Replays that request this page from now on may need events newer than this read returns, so they get a
            # new request.
            request = self._requests.pop(span, None)
            if request is None:
                continue
            began = time.perf_counter()
            request.done.set_result(await self._read(*span))
            # The reader thread held the interpreter lock in the meantime, so its time counts like work of the loop.
            self._share.worked_elsewhere(Lane.REPLAY, time.perf_counter() - began)
            del request  # otherwise this frame would keep the page

    async def _read(self, start: int, size: int) -> Page:
        """Read a page, and the following ones too if nothing else waits."""
        count = size if self._turns or self._others_wait() else self.at_once
        events = await self._log.between(start, min(start + count, self._head()), count)
        pages = _split(events, size)
        # Add the first page last, so that it is evicted last: pages read ahead are worth little without it.
        for number in reversed(pages):
            self._keep(number, pages[number])
        return pages.get(start) or Page.of([])

    def _start(self, cursor: int) -> int:
        return cursor - cursor % self.size

    def _next(self) -> _Span | None:
        """Return the next page to read, taking sources in turn; None if no request is left."""
        while self._turns:
            source = next(iter(self._turns))
            spans = self._turns.pop(source)
            span = spans.popleft()
            if spans:
                self._turns[source] = spans
            if span in self._requests:
                return span
        return None

    def _keep(self, start: int, page: Page) -> None:
        self._drop(start)
        if not self.keeps:
            return
        self._kept[start] = page
        self._kept_bytes += page.size_bytes
        while self._kept_bytes > KEPT_BYTES:
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= gone.size_bytes

    def _drop(self, start: int) -> None:
        page = self._kept.pop(start, None)
        if page is not None:
            self._kept_bytes -= page.size_bytes

    def _others_wait(self) -> bool:
        return any(self._share.waiting(lane) for lane in Lane if lane is not Lane.REPLAY)


def _split(events: list[Event], size: int) -> dict[int, Page]:
    """Split events into pages, keyed by the offset before the first event of the page."""
    pages: dict[int, Page] = {}
    begin = 0
    while begin < len(events):
        # Offsets may be missing where events cannot be read.
        number = (events[begin].offset - 1) // size * size
        end = bisect_right(events, number + size, lo=begin, key=lambda event: event.offset)
        pages[number] = Page.of(events[begin:end])
        begin = end
    return pages


def _nothing() -> None:
    """Do nothing. Only the time at which this job runs matters."""
