"""The event log's connections, each with its one thread.

All disk I/O runs on them. With a write-ahead log, readers and the writer do not block each other. One thread writes.
The reads are split over four threads, so that a read which precedes a commit or decides what a client receives next
never waits for one that goes through many events:

- look-ups by txid, outpoint, height and key, which precede a commit;
- look-ups by time, which find where a client's replay begins;
- pages of replays;
- searches through all events, and the check of the file.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import structlog

from whaled.config.sections import EventLogSettings
from whaled.eventlog import queries
from whaled.eventlog.damage import Damage
from whaled.eventlog.pages import Pages
from whaled.eventlog.rows import Rows
from whaled.eventlog.writer import Writer

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")
Args = TypeVarTuple("Args")

# At most this many damage reports wait for the event loop; it takes them when the job that found them ends.
FOUND_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Threads:
    """The connections, each with its one thread. They append damage to `found`, and the event loop removes it."""

    writer: Writer
    lookups: Rows
    times: Pages
    pages: Pages
    searches: Rows
    found: deque[Damage]
    write_thread: ThreadPoolExecutor
    lookup_thread: ThreadPoolExecutor
    time_thread: ThreadPoolExecutor
    page_thread: ThreadPoolExecutor
    search_thread: ThreadPoolExecutor

    @property
    def readers(self) -> tuple[tuple[Rows, ThreadPoolExecutor], ...]:
        """Return the reading connections, each with its thread."""
        return (
            (self.lookups, self.lookup_thread),
            (self.times, self.time_thread),
            (self.pages, self.page_thread),
            (self.searches, self.search_thread),
        )

    def close(self) -> Future[None]:
        """Close every connection on its own thread, after the jobs already submitted there; the writer last."""
        closed = [thread.submit(reader.close) for reader, thread in self.readers]
        writer_closed = self.write_thread.submit(self.writer.close, *closed)
        for thread in (self.write_thread, *(thread for _, thread in self.readers)):
            thread.shutdown(wait=False)
        return writer_closed


def threads_for(settings: EventLogSettings) -> Threads:
    """Make the connections, not opened yet, and their threads."""
    # Resolved, so that two names for the same file share one lock.
    path = Path(settings.path).resolve()
    found: deque[Damage] = deque(maxlen=FOUND_LIMIT)
    options = (path, settings.busy_timeout, found.append)

    def thread(name: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"eventlog-{name}")

    return Threads(
        writer=Writer(*options),
        lookups=Rows(*options),
        times=Pages(*options),
        pages=Pages(*options),
        searches=Rows(*options),
        found=found,
        write_thread=thread("writer"),
        lookup_thread=thread("lookups"),
        time_thread=thread("times"),
        page_thread=thread("pages"),
        search_thread=thread("searches"),
    )


def on_thread(thread: ThreadPoolExecutor, function: Callable[[*Args], T], *args: *Args) -> asyncio.Future[T]:
    """Run a synchronous function on one of the threads."""
    return asyncio.get_running_loop().run_in_executor(thread, function, *args)


async def check_within(limit_s: float, threads: Threads) -> bool:
    """Check the file for damage, for at most `limit_s` seconds. Return whether the check reached the end."""
    timer = asyncio.get_running_loop().call_later(limit_s, threads.searches.interrupt)
    try:
        is_complete = await on_thread(threads.search_thread, queries.check, threads.searches)
    finally:
        timer.cancel()
    if not is_complete:
        logger.warning("eventlog_check_unfinished", limit_s=limit_s)
    return is_complete
