"""Pages of the log for replays: read one at a time, over all clients in turn, and kept for those who read the same.

A page begins at a multiple of its size, so that clients who come from anywhere meet on the same pages. What is kept is
bounded in all; a client that is slow holds no page.
"""

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from msgspec import Struct

from whaled.gateway import wire
from whaled.gateway.deflate import Deflater
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Event

# Memory of the pages that are kept, by a rough count: an event decoded and encoded, and each of its addresses.
KEPT_BYTES = 8 * 1024 * 1024
EVENT_BYTES = 4096
ADDRESS_BYTES = 112
# Reading and sending a page takes about a millisecond. Who reads alone reads several at once.
PAGE_EVENTS = 100


class LogReader(Protocol):
    """What replay needs of the event log."""

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, oldest first, at most `limit`."""
        ...


class LostError(Exception):
    """Events the client has not seen were removed by retention while it was catching up, or cannot be read."""


class Page(Struct):
    """Events in the order of their offsets, each with its frame, plain and compressed, once somebody wants it."""

    events: list[Event]
    frames: list[bytes | None]
    smaller: list[bytes | None]
    size_bytes: int

    @classmethod
    def of(cls, events: list[Event]) -> "Page":
        """A page of these events."""
        addresses = sum([len(event.whale.addresses) for event in events])
        count = len(events)
        return cls(events, [None] * count, [None] * count, EVENT_BYTES * count + ADDRESS_BYTES * addresses)

    def frame(self, index: int, epoch: str, matched_addresses: tuple[str, ...] = ()) -> bytes:
        """The frame of an event, encoded once for all clients but those whose filter names its addresses."""
        if matched_addresses:
            return wire.event_frame(self.events[index], epoch, matched_addresses)
        frame = self.frames[index]
        if frame is None:
            frame = self.frames[index] = wire.event_frame(self.events[index], epoch)
        return frame

    def compressed(self, index: int, frame: bytes, deflater: Deflater, *, is_shared: bool) -> bytes:
        """The compressed form of an event's frame, made once for all clients with the same frame."""
        if not is_shared:
            return deflater.frame(frame)
        smaller = self.smaller[index]
        if smaller is None:
            smaller = self.smaller[index] = deflater.frame(frame)
        return smaller

    @property
    def newest(self) -> int:
        """The offset of its last event, 0 if it has none."""
        return self.events[-1].offset if self.events else 0


class _Request(Struct):
    """A page that replays wait for."""

    done: asyncio.Future[Page]
    waiting: int = 0


# The offset before the first event of a page, and its size.
_Span = tuple[int, int]


class Pages:
    """What replays read. `run` does the reading; `head` is the offset up to which there may be any.

    `keeps` is off while memory is short.
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
        # What each source asked for: they take turns, however many replays one of them has.
        self._turns: dict[str, deque[_Span]] = {}
        self._asked = asyncio.Event()

    def resize(self, at_once: int) -> None:
        """Read at most so many events at once from now on, if nobody else waits."""
        self.at_once = at_once
        self.size = min(at_once, PAGE_EVENTS)

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept, roughly."""
        return self._kept_bytes

    def forget(self) -> None:
        """Keep nothing of what was read."""
        self._kept.clear()
        self._kept_bytes = 0

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A replay reads pages meanwhile."""
        self._replays += 1
        try:
            yield
        finally:
            self._replays -= 1
            if not self._replays:
                self.forget()

    def used(self, cursor: int) -> None:
        """The only replay there is has no more need of the page that ends at `cursor`: its memory serves the next one,
        which is a fifth faster than other memory.
        """
        start = self._start(cursor - 1)
        if self._replays == 1 and start in self._kept and self._kept[start].newest == cursor:
            self._drop(start)

    def kept(self, cursor: int) -> Page | None:
        """The page with the event after `cursor`, if it is at hand."""
        page = self._kept.get(self._start(cursor))
        if page is None or page.newest <= cursor:
            return None
        return page

    async def read(self, cursor: int, source: str) -> Page:
        """The page with the event after `cursor`, when it is the turn of `source`. Raises LostError."""
        span = self._start(cursor), self.size
        request = self._requests.get(span)
        if request is None:
            request = self._requests[span] = _Request(asyncio.get_running_loop().create_future())
        self._turns.setdefault(source, deque()).append(span)
        self._asked.set()
        request.waiting += 1
        try:
            page = await asyncio.shield(request.done)
        finally:
            request.waiting -= 1
            if not request.waiting and self._requests.get(span) is request:
                del self._requests[span]  # nobody waits for it any more: it is not read
        if page.newest <= cursor:
            raise LostError
        return page

    async def run(self) -> None:
        """Read what is asked for, until cancelled. Raises EventLogError."""
        while True:
            span = self._next()
            if span is None:
                self._asked.clear()
                await self._asked.wait()
                continue
            # An alert on its way goes first, and what was read before is sent before.
            await self._share.run(Lane.REPLAY, _nothing)
            # Who asks from now on may want events that are newer than what is read now: that is another request.
            request = self._requests.pop(span, None)
            if request is None:
                continue
            began = time.perf_counter()
            request.done.set_result(await self._read(*span))
            # The thread that read took the interpreter away from the loop meanwhile.
            self._share.worked_elsewhere(Lane.REPLAY, time.perf_counter() - began)
            del request  # and the page with it

    async def _read(self, start: int, size: int) -> Page:
        """Read a page, and those behind it if nobody else waits."""
        count = size if self._turns or self._others_wait() else self.at_once
        events = await self._log.between(start, min(start + count, self._head()), count)
        pages = _split(events, size)
        # The first page is the last one to go: what was read ahead is worth little without it.
        for number in reversed(pages):
            self._keep(number, pages[number])
        return pages.get(start) or Page.of([])

    def _start(self, cursor: int) -> int:
        return cursor - cursor % self.size

    def _next(self) -> _Span | None:
        """The next page that is still wanted, by the turn of the sources."""
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
    """Pages by their starts."""
    pages: dict[int, Page] = {}
    begin = 0
    while begin < len(events):
        # There may be holes, where events cannot be read.
        number = (events[begin].offset - 1) // size * size
        end = bisect_right(events, number + size, lo=begin, key=lambda event: event.offset)
        pages[number] = Page.of(events[begin:end])
        begin = end
    return pages


def _nothing() -> None:
    """Nothing: what counts is when."""
