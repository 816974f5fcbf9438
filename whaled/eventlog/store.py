"""The event loop's interface to the durable event log. An event is published only after its commit here.

All disk I/O runs on the threads of `threads`. A damaged row is skipped, counted and logged; it never ends the daemon.
`whole_from` then lies after that row, and a replay that begins before it reports that events are missing.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar, TypeVarTuple

import structlog

from whaled.bookmarks import Bookmark
from whaled.config.sections import EventLogSettings
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import notes, queries
from whaled.eventlog.damage import KnownDamage, merged
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.pages import Page
from whaled.eventlog.queries import require_limit
from whaled.eventlog.rows import Rows
from whaled.eventlog.threads import Threads, check_within, on_thread, threads_for
from whaled.eventlog.writer import Committed, Opened
from whaled.model import Draft, Event, Position

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
Args = TypeVarTuple("Args")

# Offsets removed in one transaction. An append waits for at most one such transaction, which takes some milliseconds.
PRUNE_BATCH = 200
# How far the clock may be ahead of the newest block before retention distrusts it. Blocks come every ten minutes, at
# most hours apart, and a block's time is at most two hours ahead. The backend's clock would prove less: the backend
# usually runs on the same machine.
AHEAD_LIMIT_S = 86_400.0
# Keys per query: a mempool snapshot with 300,000 transactions must not block the other look-ups.
KEYS_AT_ONCE = 2_000
# How long the check may delay the start; systemd allows 90 s. The check of a log with a million events (0.9 GB) took
# 0.5 s from memory and 13 s from a cold, slow disk. Damage that the check did not reach is still found on reading.
CHECK_LIMIT_S = 10.0


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
        self._is_closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: EventLogSettings, meter: EventLogMeter, clock: Callable[[], float] = time.time
    ) -> AsyncIterator[Self]:
        """Open or create the database and check it. On exit, finish the appends under way, then close the files.

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
                event_log._is_closed = True
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

        A draft that the log already holds is skipped and takes no offset: one with the same txid, kind, ref and repeat
        number, or an alert for a whale that has any event in the log.

        If the caller is cancelled while its transaction runs, the events may still be stored: `head` then advances
        although no caller received them. A publisher notices because the next offset is not the one it expects.
        """
        self._refuse_if_closed()
        if not drafts:
            return []
        work = self._threads.write_thread.submit(self._threads.writer.append, tuple(drafts))
        job = asyncio.wrap_future(work)
        job.add_done_callback(self._apply_commit)
        try:
            # Shielded: cancelling the caller must not keep `head` from following the database.
            return (await asyncio.shield(job)).events
        except asyncio.CancelledError:
            work.cancel()  # unless it runs already
            raise

    async def rehearse(self, draft: Draft) -> Event:
        """Pass a draft through the same steps as `append`, including the fsync, without keeping it.

        Returns the event that `append` would have returned; its offset is not assigned.
        """
        event, wants_checkpoint = await self._on(
            self._threads.write_thread, lambda: self._threads.writer.rehearse(draft)
        )
        if wants_checkpoint:
            self._checkpoint()
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
        return await self._on(self._threads.page_thread, lambda: self._threads.pages.page(after, through, limit))

    async def offset_before(self, at: float) -> int:
        """Return the greatest offset such that it and all offsets before it are older than `at` (Unix seconds).

        A replay after that offset misses no event since `at`. Returns `oldest` - 1 if no event is older.
        """
        return await self._on(self._threads.time_thread, lambda: self._threads.times.offset_before(at))

    async def read(self, query: Callable[[Rows, *Args], T], *args: *Args) -> T:
        """Run one of the `queries`. It sees every append that has returned."""
        threads = self._threads
        if query in queries.SEARCHES:
            return await self._on(threads.search_thread, lambda: query(threads.searches, *args))
        return await self._on(threads.lookup_thread, lambda: query(threads.lookups, *args))

    async def read_each(self, query: Callable[[Rows, Sequence[K]], dict[str, V]], keys: Iterable[K]) -> dict[str, V]:
        """Run one of the `queries` for any number of keys: some at a time, so that other look-ups go in between."""
        found: dict[str, V] = {}
        rest = iter(keys)
        while chunk := list(islice(rest, KEYS_AT_ONCE)):
            found.update(await self.read(query, chunk))
        return found

    async def write(self, change: Callable[[sqlite3.Connection, *Args], None], *args: *Args) -> None:
        """Run one of the changes of `notes` in a transaction of its own; returns after the fsync."""
        await self._on(self._threads.write_thread, lambda: self._threads.writer.write(lambda db: change(db, *args)))

    async def recall(self, bookmark: Bookmark[T]) -> T | None:
        """Return the value of a bookmark, None if none is stored or if it is damaged."""
        text = await self.read(queries.note, bookmark.key)
        return None if text is None else bookmark.decode(text)

    async def keep(self, bookmark: Bookmark[T], value: T) -> None:
        """Store the value of a bookmark; returns after the fsync."""
        await self.write(notes.keep, bookmark, value)

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
        boundary = await self.read(queries.first_to_keep, now - self._retention_s, now)
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
        newest = await self.read(queries.latest_scan)
        if newest is None or now - newest.mined_at <= AHEAD_LIMIT_S:
            return now
        logger.warning(
            "retention_suspended",
            height=newest.height,
            ahead_s=now - newest.mined_at,
        )
        return newest.mined_at + AHEAD_LIMIT_S

    def _apply_commit(self, job: asyncio.Future[Committed]) -> None:
        """Apply the outcome of a transaction. Runs on the event loop before the caller of `append` resumes."""
        if job.cancelled():
            return
        error = job.exception()
        if error is not None:
            self._count_failure(error)
            return
        committed = job.result()
        stored = committed.head - self.head
        self.head = committed.head
        if stored:
            self._meter.committed(stored, committed.seconds)
            self._meter.size(committed.size_bytes)
        if committed.wants_checkpoint:
            self._checkpoint()

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

    def _checkpoint(self) -> None:
        if not self._is_closed:
            job = on_thread(self._threads.write_thread, self._threads.writer.checkpoint)
            job.add_done_callback(self._apply_checkpoint)

    def _apply_checkpoint(self, job: asyncio.Future[None]) -> None:
        error = job.exception()
        if error is not None:
            # Nothing is lost, and the next commit tries again. If the disk is full, the next append fails and reports.
            self._count_failure(error)
            logger.warning("eventlog_checkpoint_failed", error=str(error))

    async def _on(self, thread: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        self._refuse_if_closed()
        try:
            return await on_thread(thread, job)
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

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise EventLogError("the event log is closed", reason=LogFailure.CLOSED)
