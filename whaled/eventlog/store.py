"""The event loop's interface to the durable event log. An event is published only after its commit here.

All disk I/O runs on threads. Each thread has its own connection; with a write-ahead log, readers and the writer do not
block each other. One thread writes. The reads are split over four threads, so that a read which precedes a commit or
decides what a client receives next never waits for one that goes through many events:

- look-ups by txid, outpoint, height and key, which precede a commit;
- look-ups by time, which find where a client's replay begins;
- pages of replays;
- searches through all events, and the check of the file.

A damaged row is skipped, counted and logged; it never ends the daemon. `whole_from` then lies after that row, and a
replay that begins before it reports that events are missing.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar, TypeVarTuple

import structlog

from whaled.config.sections import EventLogSettings
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import schema
from whaled.eventlog.damage import Damage, KnownDamage, merged
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.pages import Page, Pages
from whaled.eventlog.reader import Reader
from whaled.eventlog.rows import Rows
from whaled.eventlog.writer import Committed, Opened, Writer
from whaled.model import Draft, Event, Position, Scan, Whale
from whaled.whales.lifecycle import Step

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Offsets removed in one transaction. An append waits for at most one such transaction, which takes some milliseconds.
PRUNE_BATCH = 200
# How far the clock may be ahead of the newest block before retention distrusts it. Blocks come every ten minutes, at
# most hours apart, and a block's time is at most two hours ahead. The backend's clock would prove less: the backend
# usually runs on the same machine.
AHEAD_LIMIT_S = 86_400.0
# Txids or outpoints per query: a mempool snapshot with 300,000 of them must not block the other look-ups.
TXID_CHUNK = 2_000
# How long the check may delay the start; systemd allows 90 s. The check of a log with a million events (0.9 GB) took
# 0.5 s from memory and 13 s from a cold, slow disk. Damage that the check did not reach is still found on reading.
CHECK_LIMIT_S = 10.0
# At most this many damage reports wait for the event loop; it takes them when the job that found them ends.
FOUND_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Threads:
    """The connections, each with its one thread. They append damage to `found`, and the event loop removes it."""

    writer: Writer
    lookups: Reader
    times: Pages
    pages: Pages
    searches: Reader
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


@dataclass(frozen=True, slots=True)
class WaitingAppend:
    """A call of `append` whose transaction has not finished."""

    drafts: tuple[Draft, ...]
    outcome: asyncio.Future[list[Event]]


class EventLog:
    """An open event log, made by `EventLog.open`.

    Every coroutine here may raise EventLogError. End the process after one: an event that is not stored must not be
    published. The message names the fault and what the operator has to do.

    `epoch` is a random id made with the database. `head` is the newest committed offset, 0 before the first event.
    `oldest` is the oldest offset still held, head + 1 if none is. No damaged or missing event is known at or after
    `whole_from`, which is never below `oldest`. All of them change on the event loop only.
    """

    def __init__(self, *, threads: Threads, opened: Opened, retention_s: float, meter: EventLogMeter) -> None:
        self.epoch = opened.epoch
        self.head = opened.head
        self.oldest = opened.oldest
        self._threads = threads
        self._newest_damage = max((through for _, through in opened.gaps), default=0)
        self._known_damage = KnownDamage(opened.gaps)
        self._retention_s = retention_s
        self._meter = meter
        meter.head.set_function(lambda: self.head)
        meter.oldest.set_function(lambda: self.oldest)
        # Bounded by the number of tasks that append: each waits for the outcome of its own call.
        self._waiting: list[WaitingAppend] = []
        self._is_committing = False
        self._is_closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: EventLogSettings, meter: EventLogMeter, clock: Callable[[], float] = time.time
    ) -> AsyncIterator[Self]:
        """Open or create the database and check it. On exit, commit the waiting appends, then close the files.

        Raises EventLogError if the database is in use by another whaled, was made by a newer version or by another
        program, is damaged, or is not writable.
        """
        threads = threads_for(settings)
        try:
            try:
                opened = await on_thread(threads.write_thread, threads.writer.open, clock())
                for reader, thread in threads.readers:
                    await on_thread(thread, reader.open)
                await check_within(CHECK_LIMIT_S, threads)
            except EventLogError as error:
                meter.failed(error.reason)
                raise
            meter.size(opened.size_bytes)
            meter.directory(Path(settings.path).parent)
            event_log = cls(threads=threads, opened=opened, retention_s=settings.retention, meter=meter)
            logger.info("eventlog_opened", path=settings.path, head=event_log.head, oldest=event_log.oldest)
            event_log._note_damage()
            try:
                yield event_log
            finally:
                event_log._refuse_from_now_on()
        finally:
            # Each thread runs its jobs in order, so appends submitted earlier are committed first. All closing jobs
            # are submitted at once: a cancellation here can neither leave files open nor release the lock too early.
            await asyncio.shield(asyncio.wrap_future(threads.close()))

    @property
    def whole_from(self) -> int:
        """Return the first offset after all known damage and gaps; `oldest` if there are none."""
        return max(self.oldest, self._newest_damage + 1)

    @property
    def position(self) -> Position:
        """Return the position of the newest committed event."""
        return Position(self.epoch, self.head)

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Store drafts in one transaction. Return the new events, in offset order, after the fsync.

        A draft that the log already holds is skipped and takes no offset: one with the same txid, kind and ref, or an
        alert for a whale that has any event in the log. Calls that wait at the same time share one transaction, and
        fail together.

        If the caller is cancelled while its transaction runs, the events may still be stored: `head` then advances
        although no caller received them. A publisher notices because the next offset is not the one it expects.
        """
        self._refuse_if_closed()
        if not drafts:
            return []
        call = WaitingAppend(tuple(drafts), asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if not self._is_committing:
            self._commit()
        return await call.outcome

    async def rehearse(self, draft: Draft) -> Event:
        """Pass a draft through the same steps as `append`, including the fsync, without keeping it.

        Returns the event that `append` would have returned; its offset is not assigned.
        """
        event, wants_checkpoint = await self._write(self._threads.writer.rehearse, draft)
        if not self._is_committing:
            self._commit(checkpoint=wants_checkpoint)
        return event

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Return the events with after < offset <= through, ascending, at most `limit`; empty only if there are none.

        Offsets absent from the result, up to its last event or (if it is empty) up to `through` or `head`, were
        removed by retention or are damaged.
        """
        self._refuse_if_closed()
        require_limit(limit)
        events: list[Event] = []
        cursor = after
        while cursor < min(through, self.head) and (not events or cursor < after + limit):
            page = await self.page(cursor, through, limit if cursor >= after + limit else after + limit - cursor)
            events += page.events
            cursor = page.through
        return events

    async def page(self, after: int, through: int, limit: int) -> Page:
        """Return one page of the events with after < offset <= through: at most `limit` rows and about 1 MiB.

        Damaged rows count towards `limit`. Read the next page after the offset `Page.through`.
        """
        require_limit(limit)
        return await self._on(self._threads.page_thread, self._threads.pages.page, after, through, limit)

    async def offset_before(self, at: float) -> int:
        """Return the greatest offset such that it and all offsets before it are older than `at` (Unix seconds).

        A replay after that offset misses no event since `at`. Returns `oldest` - 1 if no event is older.
        """
        return await self._on(self._threads.time_thread, self._threads.times.offset_before, at)

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """Return the stored whales by txid, without an entry for unknown ones. Sees every append that has returned."""
        known: dict[str, Whale] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            known.update(await self._look_up(self._threads.lookups.whales, chunk))
        return known

    async def rivals(self, outpoints: Iterable[str]) -> dict[str, list[str]]:
        """Return, by outpoint, the txids of the whales that spend it, oldest first; no entry if none is known."""
        found: dict[str, list[str]] = {}
        rest = iter(outpoints)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.rivals, chunk))
        return found

    async def outpoints(self, txids: Iterable[str]) -> dict[str, list[str]]:
        """Return, by txid, the outpoints that the whale spends; no entry for whales of a schema version before 3."""
        found: dict[str, list[str]] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.outpoints, chunk))
        return found

    async def pending(self, after: int, limit: int) -> list[Event]:
        """Return the newest event of each whale without an outcome, ascending, with offset > `after`, at most `limit`.

        A restarted daemon continues to follow these whales. `after` serves for paging and to leave out old events.
        """
        require_limit(limit)
        return await self._search(self._threads.searches.pending, after, limit)

    async def histories(self, txids: Iterable[str]) -> dict[str, list[Step]]:
        """Return, by txid, each event held about the whale, in offset order."""
        found: dict[str, list[Step]] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.histories, chunk))
        return found

    async def newest_alert(self) -> Event | None:
        """Return the newest alert, or None if none is held."""
        return await self._search(self._threads.searches.newest_alert)

    async def confirmed_in(self, block_hash: str) -> list[Whale]:
        """Return the whales whose newest event confirms them in this block. Reads through all events."""
        return await self._search(self._threads.searches.confirmed_in, block_hash)

    async def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """Return txid and number of events of the whales whose newest event is `replaced` or `dropped`.

        Newest first, at most `limit`; a newest event older than `at` (Unix seconds) does not count.
        """
        require_limit(limit)
        return await self._search(self._threads.searches.gone_since, at, limit)

    async def scans(self, low: int, high: int) -> list[Scan]:
        """Return the scans of the blocks between two heights, both included, ascending."""
        return await self._look_up(self._threads.lookups.scans, low, high)

    async def newest_scans(self, limit: int, below: int = schema.NO_HEIGHT) -> list[Scan]:
        """Return the scans of the highest blocks below a height, descending, at most `limit`."""
        require_limit(limit)
        return await self._look_up(self._threads.lookups.newest_scans, limit, below)

    async def put_scan(self, scan: Scan) -> None:
        """Store the result of a block scan; returns after the fsync."""
        await self._write(self._threads.writer.put_scan, scan)

    async def forget_scan(self, height: int) -> None:
        """Remove the scan of the block at this height, so that the block is scanned again."""
        await self._write(self._threads.writer.forget_scan, height)

    async def prune(self, now: float, *, follows_blocks: bool = True) -> int:
        """Remove events older than the retention, oldest first, in batches. Return the number of removed events.

        If blocks are followed, a `now` more than a day after the newest scanned block is replaced by the end of that
        day, with a warning: a clock that jumped ahead must not empty the log.

        `oldest` advances; `head` and the numbering stay, even if no event is left. A whale stays known while any event
        about it is held. After that it is removed: a transaction that outlives the retention in the mempool would be
        alerted again after a restart (nodes drop a transaction after 14 days by default).
        """
        if follows_blocks:
            now = await self._proven(now)
        boundary = await self._search(self._threads.searches.first_to_keep, now - self._retention_s, now)
        removed = 0
        while self.oldest < boundary:
            self._refuse_if_closed()
            upto = min(self.oldest + PRUNE_BATCH, boundary)
            job = on_thread(self._threads.write_thread, self._threads.writer.prune, upto)
            job.add_done_callback(partial(self._apply_prune, upto))
            # Shielded: cancelling the caller must not keep `oldest` from following the database.
            deleted, _ = await asyncio.shield(job)
            removed += deleted
        return removed

    async def _proven(self, now: float) -> float:
        """Return `now`, at most a day after the newest scanned block; unchanged if no block has been scanned."""
        newest = await self._search(self._threads.searches.latest_scan)
        if newest is None or now - newest.mined_at <= AHEAD_LIMIT_S:
            return now
        logger.warning(
            "retention_suspended",
            height=newest.height,
            ahead_s=now - newest.mined_at,
        )
        return newest.mined_at + AHEAD_LIMIT_S

    async def state(self, key: str) -> str | None:
        """Return the text stored under a key, or None."""
        return await self._look_up(self._threads.lookups.state, key)

    async def set_state(self, key: str, value: str) -> None:
        """Store a short text under a key; returns after the fsync."""
        await self._write(self._threads.writer.set_state, key, value)

    async def check(self) -> None:
        """Check the whole file for damage, without a time limit. Searches wait meanwhile."""
        await self._search(self._threads.searches.check)

    def _commit(self, *, checkpoint: bool = False) -> None:
        """Submit the waiting appends to the writer; if there are none and `checkpoint` is set, a checkpoint."""
        calls = [call for call in self._waiting if not call.outcome.cancelled()]
        self._waiting.clear()
        if calls:
            # No caller holds the future of the transaction, so none can cancel it: `_apply_commit` always runs.
            job = on_thread(self._threads.write_thread, self._threads.writer.append, [call.drafts for call in calls])
            job.add_done_callback(partial(self._apply_commit, calls))
            self._is_committing = True
        elif checkpoint and not self._is_closed:
            on_thread(self._threads.write_thread, self._threads.writer.checkpoint).add_done_callback(
                self._apply_checkpoint
            )

    def _apply_commit(self, calls: Sequence[WaitingAppend], job: asyncio.Future[Committed]) -> None:
        """Apply the outcome of a transaction. Runs on the event loop before any waiting caller resumes."""
        self._is_committing = False
        error = job.exception()
        if error is None:
            committed = job.result()
            stored = committed.head - self.head
            self.head = committed.head
            if stored:
                self._meter.committed(stored, committed.seconds)
                self._meter.size(committed.size_bytes)
            for call, events in zip(calls, committed.events, strict=True):
                if not call.outcome.done():
                    call.outcome.set_result(events)
        else:
            self._count_failure(error)
            for call in calls:
                if not call.outcome.done():
                    call.outcome.set_exception(error)
        self._commit(checkpoint=error is None and job.result().wants_checkpoint)

    def _apply_prune(self, upto: int, job: asyncio.Future[tuple[int, int]]) -> None:
        error = job.exception()
        if error is not None:
            self._count_failure(error)
            return
        removed, size_bytes = job.result()
        self.oldest = max(self.oldest, upto)
        self._known_damage.forget_before(self.oldest)
        self._meter.damaged(self._known_damage.rows)
        self._meter.pruned(removed)
        self._meter.size(size_bytes)

    def _apply_checkpoint(self, job: asyncio.Future[None]) -> None:
        error = job.exception()
        if error is not None:
            # Nothing is lost, and the next commit tries again. If the disk is full, the next append fails and reports.
            self._count_failure(error)
            logger.warning("eventlog_checkpoint_failed", error=str(error))

    async def _look_up(self, function: Callable[[*Args], T], *args: *Args) -> T:
        return await self._on(self._threads.lookup_thread, function, *args)

    async def _search(self, function: Callable[[*Args], T], *args: *Args) -> T:
        return await self._on(self._threads.search_thread, function, *args)

    async def _write(self, function: Callable[[*Args], T], *args: *Args) -> T:
        return await self._on(self._threads.write_thread, function, *args)

    async def _on(self, thread: ThreadPoolExecutor, function: Callable[[*Args], T], *args: *Args) -> T:
        self._refuse_if_closed()
        try:
            return await on_thread(thread, function, *args)
        except EventLogError as error:
            self._count_failure(error)
            raise
        finally:
            self._note_damage()

    def _note_damage(self) -> None:
        """Count and log the damage that the threads found: each row once, with one log line for all of it."""
        reported = [self._threads.found.popleft() for _ in range(len(self._threads.found))]
        new = {damage: rows for damage in merged(reported) if (rows := self._known_damage.add(damage))}
        if not new:
            return
        self._newest_damage = max(self._newest_damage, *(damage.through for damage in new))
        rows = sum(new.values())
        first = next(iter(new))
        self._meter.damaged(self._known_damage.rows)
        logger.error(
            "eventlog_rows_damaged",
            table=first.table.value,
            row=first.row,
            problem=first.problem,
            rows=rows,
        )

    def _count_failure(self, error: BaseException) -> None:
        if isinstance(error, EventLogError):
            self._meter.failed(error.reason)

    def _refuse_from_now_on(self) -> None:
        self._is_closed = True
        self._commit()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise EventLogError("the event log is closed", reason=LogFailure.CLOSED)


def require_limit(limit: int) -> None:
    """Raise ValueError if `limit` is below 1: SQLite treats a negative limit as no limit."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")


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
        lookups=Reader(*options),
        times=Pages(*options),
        pages=Pages(*options),
        searches=Reader(*options),
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
        is_complete = await on_thread(threads.search_thread, threads.searches.check)
    finally:
        timer.cancel()
    if not is_complete:
        logger.warning("eventlog_check_unfinished", limit_s=limit_s)
    return is_complete
