"""The durable event log, as the event loop sees it. Nothing is published that is not in here.

All waiting for the disk happens on threads, each with a connection of its own; with a write-ahead log, reading and
writing do not wait for each other. One writes. The others read, so that what comes before a commit, or decides what a
client gets next, never waits for what goes through many events:

- look-ups by txid, outpoint, height and key: they come before a commit;
- times: where a client's replay begins;
- pages of replays;
- searches through all events, and the check of the file.

A damaged row is skipped, counted and logged, and is never the end of the daemon: `whole_from` lies behind it, and who
asks for events before that is answered that some are missing.
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
from typing import Protocol, Self, TypeVar, TypeVarTuple

import structlog

from whaled.config import sections
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import schema
from whaled.eventlog.damage import Damage, KnownDamage, merged
from whaled.eventlog.pages import Page, Pages
from whaled.eventlog.reader import Reader
from whaled.eventlog.rows import Rows
from whaled.eventlog.writer import Committed, Opened, Writer
from whaled.model import Draft, Event, Kind, Position, Scan, Whale

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Offsets removed in one transaction: an append that comes in between waits for one of these, some milliseconds.
PRUNE_BATCH = 200
# How far ahead of the newest block the clock is believed. Blocks come every ten minutes, hours apart at the most, and a
# block's time is at most two hours ahead. The backend's own time says less: mostly it runs on this very machine.
AHEAD_LIMIT_S = 86_400.0
# Txids looked up at once: a mempool snapshot of 300,000 must not keep the reader from everybody else's pages.
TXID_CHUNK = 2_000
# How long the check may hold up the start, well below the 90 s systemd gives. A log of a million events (0.9 GB) took
# 0.5 s from memory and 13 s from a cold, slow disk; what the check did not reach is still refused when it is read.
CHECK_LIMIT_S = 10.0


# Damage that one job may report: the threads find it, the event loop takes it when the job is done.
FOUND_LIMIT = 10_000


class LogMeter(Protocol):
    """Counts what the log does. Called on the event loop."""

    def committed(self, events: int, seconds: float) -> None:
        """A transaction with new events was stored; `seconds` includes the fsync."""
        ...

    def failed(self, reason: LogFailure) -> None:
        """An operation failed."""
        ...

    def pruned(self, events: int) -> None:
        """Retention removed events."""
        ...

    def damaged(self, rows: int) -> None:
        """How many damaged rows are known: readers skip them."""
        ...

    def size(self, size_bytes: int) -> None:
        """What database and write-ahead log take on disk."""
        ...


@dataclass(frozen=True, slots=True)
class Threads:
    """The connections and the one thread of each. `found` is what they report: they append, the event loop takes."""

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
        """The reading connections, each with its thread."""
        return (
            (self.lookups, self.lookup_thread),
            (self.times, self.time_thread),
            (self.pages, self.page_thread),
            (self.searches, self.search_thread),
        )

    def close(self) -> Future[None]:
        """Close everything, each on its thread, behind what was submitted before; the writer last."""
        closed = [thread.submit(reader.close) for reader, thread in self.readers]
        writer_closed = self.write_thread.submit(self.writer.close, *closed)
        for thread in (self.write_thread, *(thread for _, thread in self.readers)):
            thread.shutdown(wait=False)
        return writer_closed


@dataclass(frozen=True, slots=True)
class WaitingAppend:
    """A call of `append` whose transaction has not ended."""

    drafts: tuple[Draft, ...]
    outcome: asyncio.Future[list[Event]]


class EventLog:
    """Made by `EventLog.open`. Every coroutine here may raise EventLogError; after one, end the process: what is not
    stored must not be published, and the message says what the operator has to mend.

    `epoch` is a random id made with the database. `head` is the newest committed offset, 0 before the first; `oldest`
    the oldest offset still held, head + 1 if none is. From `whole_from` on (not below `oldest`) nothing is known to be
    damaged or missing. All of them move on the event loop only.
    """

    def __init__(self, *, threads: Threads, opened: Opened, retention_s: float, meter: LogMeter) -> None:
        self.epoch = opened.epoch
        self.head = opened.head
        self.oldest = opened.oldest
        self._threads = threads
        self._newest_damage = max((through for _, through in opened.gaps), default=0)
        self._known_damage = KnownDamage(opened.gaps)
        self._retention_s = retention_s
        self._meter = meter
        # Bounded by the tasks that append: each waits for its own outcome.
        self._waiting: list[WaitingAppend] = []
        self._is_committing = False
        self._is_closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: sections.EventLog, meter: LogMeter, clock: Callable[[], float] = time.time
    ) -> AsyncIterator[Self]:
        """Open or make the database, and check it. On leaving, what waits is stored, then the files are closed.

        Raises EventLogError: in use by another whaled, newer, not whaled's, damaged, not writable.
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
            event_log = cls(threads=threads, opened=opened, retention_s=settings.retention, meter=meter)
            logger.info("event log open", path=settings.path, head=event_log.head, oldest=event_log.oldest)
            event_log._note_damage()
            try:
                yield event_log
            finally:
                event_log._refuse_from_now_on()
        finally:
            # The thread works in order: what was submitted before is stored before. Submitted in one go, so that a
            # cancellation here cannot leave the files open or let another daemon in too early.
            await asyncio.shield(asyncio.wrap_future(threads.close()))

    @property
    def whole_from(self) -> int:
        """The offset from which on nothing is known to be damaged or missing: `oldest` as long as nothing is."""
        return max(self.oldest, self._newest_damage + 1)

    @property
    def position(self) -> Position:
        """Where the log ends now."""
        return Position(self.epoch, self.head)

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Store drafts in one transaction. Returns, after the fsync, the new events in the order of their offsets.

        Drafts that the log already has are skipped and take no offset: same txid, kind and ref, or an alert for a whale
        of which any event is held. Calls that wait at the same time share a transaction, and its failure.

        If the caller is cancelled while its transaction runs, the events may be stored all the same: `head` then moves
        although nobody was given the events. Who publishes sees that the next offset is not the one expected.
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
        """Take a draft the way of `append`, to the disk and back, and keep nothing of it. Its offset is nobody's."""
        event, wants_checkpoint = await self._write(self._threads.writer.rehearse, draft)
        if not self._is_committing:
            self._commit(checkpoint=wants_checkpoint)
        return event

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, ascending, at most `limit`; empty only if there is none.

        If the first one is not `after` + 1 (or there is none although `through` has been reached), or one does not
        follow the one before it, retention has removed what is missing, or it is damaged.
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
        """As `between`, but of at most `limit` rows, damaged ones included, and 1 MiB; the page says how far the log
        was read: go on after that.
        """
        require_limit(limit)
        return await self._on(self._threads.page_thread, self._threads.pages.page, after, through, limit)

    async def offset_before(self, at: float) -> int:
        """The greatest offset that is, like all before it, older than `at`: replay after it misses nothing since `at`.

        `oldest` - 1 if none is.
        """
        return await self._on(self._threads.time_thread, self._threads.times.offset_before, at)

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """The alerts known for these txids, as they were logged. Sees every append that has returned."""
        known: dict[str, Whale] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            known.update(await self._look_up(self._threads.lookups.whales, chunk))
        return known

    async def rivals(self, outpoints: Iterable[str]) -> dict[str, list[str]]:
        """The txids of the whales that spend each of these outpoints, oldest first; none known, no entry."""
        found: dict[str, list[str]] = {}
        rest = iter(outpoints)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.rivals, chunk))
        return found

    async def outpoints(self, txids: Iterable[str]) -> dict[str, list[str]]:
        """The outpoints that each of these whales spends; no entry for whales stored before they were kept."""
        found: dict[str, list[str]] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.outpoints, chunk))
        return found

    async def pending(self, after: int, limit: int) -> list[Event]:
        """The newest event of every whale of which nothing final has been said, ascending, at most `limit`.

        What a restarted daemon still has to follow. `after` pages, and leaves out what is older than it cares for.
        """
        require_limit(limit)
        return await self._search(self._threads.searches.pending, after, limit)

    async def histories(self, txids: Iterable[str]) -> dict[str, list[tuple[Kind, str]]]:
        """Kind and ref of every event about these whales that is held, in their order."""
        found: dict[str, list[tuple[Kind, str]]] = {}
        rest = iter(txids)
        while chunk := list(islice(rest, TXID_CHUNK)):
            found.update(await self._look_up(self._threads.lookups.histories, chunk))
        return found

    async def newest_alert(self) -> Event | None:
        """The alert that was stored last, None if none is held."""
        return await self._search(self._threads.searches.newest_alert)

    async def confirmed_in(self, block_hash: str) -> list[Whale]:
        """The whales of which the newest word is that they are in this block. Looks through every event."""
        return await self._search(self._threads.searches.confirmed_in, block_hash)

    async def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """The whales of which the newest word, not older than `at`, is that they were replaced or dropped, newest
        first, and how many events there are about each.
        """
        require_limit(limit)
        return await self._search(self._threads.searches.gone_since, at, limit)

    async def scans(self, low: int, high: int) -> list[Scan]:
        """The blocks scanned between two heights, both included, ascending."""
        return await self._look_up(self._threads.lookups.scans, low, high)

    async def newest_scans(self, limit: int, below: int = schema.NO_HEIGHT) -> list[Scan]:
        """The highest blocks scanned below a height, descending, at most `limit`."""
        require_limit(limit)
        return await self._look_up(self._threads.lookups.newest_scans, limit, below)

    async def put_scan(self, scan: Scan) -> None:
        """Store what the scan of a block found; returns after the fsync."""
        await self._write(self._threads.writer.put_scan, scan)

    async def forget_scan(self, height: int) -> None:
        """The block at this height is to be scanned again."""
        await self._write(self._threads.writer.forget_scan, height)

    async def prune(self, now: float, *, follows_blocks: bool = True) -> int:
        """Remove what is older than the retention, oldest first, a batch at a time. Returns how many events.

        A `now` that is more than a day after the newest block scanned is taken for that day, with a warning: a clock
        that jumped ahead must not empty the log. Unless no blocks are followed (any more).

        `oldest` moves up; `head` and the numbering stay, even if nothing is left. A whale stays known as long as any
        event about it is held. After that it is forgotten: a transaction that outlives the retention in the mempool
        would be alerted again after a restart (nodes drop a transaction after 14 days unless told otherwise).
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
        """`now`, as far as the chain bears it out. As it is while no block has been scanned."""
        newest = await self._search(self._threads.searches.latest_scan)
        if newest is None or now - newest.mined_at <= AHEAD_LIMIT_S:
            return now
        logger.warning(
            "the clock is far ahead of the newest block scanned: events are kept until one proves them old",
            height=newest.height,
            ahead_s=now - newest.mined_at,
        )
        return newest.mined_at + AHEAD_LIMIT_S

    async def state(self, key: str) -> str | None:
        """The text stored under a key."""
        return await self._look_up(self._threads.lookups.state, key)

    async def set_state(self, key: str, value: str) -> None:
        """Store a small text under a key; returns after the fsync."""
        await self._write(self._threads.writer.set_state, key, value)

    async def check(self) -> None:
        """Look through the whole file for damage, however long it takes. Searches wait meanwhile."""
        await self._search(self._threads.searches.check)

    def _commit(self, *, checkpoint: bool = False) -> None:
        """Give what waits to the writer; with nothing waiting, let it checkpoint if it wants to."""
        calls = [call for call in self._waiting if not call.outcome.cancelled()]
        self._waiting.clear()
        if calls:
            # The future of the transaction is nobody's to cancel: its outcome always reaches `_apply_commit`.
            job = on_thread(self._threads.write_thread, self._threads.writer.append, [call.drafts for call in calls])
            job.add_done_callback(partial(self._apply_commit, calls))
            self._is_committing = True
        elif checkpoint and not self._is_closed:
            on_thread(self._threads.write_thread, self._threads.writer.checkpoint).add_done_callback(
                self._apply_checkpoint
            )

    def _apply_commit(self, calls: Sequence[WaitingAppend], job: asyncio.Future[Committed]) -> None:
        """On the event loop, before any caller wakes."""
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
            # Nothing is lost and the next commit tries again; if the disk is full, an append will say so.
            self._count_failure(error)
            logger.warning("event log not checkpointed", error=str(error))

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
        """Count and log what the threads have met; each row once, and one line for all that was met together."""
        met = [self._threads.found.popleft() for _ in range(len(self._threads.found))]
        new = {damage: rows for damage in merged(met) if (rows := self._known_damage.add(damage))}
        if not new:
            return
        self._newest_damage = max(self._newest_damage, *(damage.through for damage in new))
        rows = sum(new.values())
        first = next(iter(new))
        self._meter.damaged(self._known_damage.rows)
        logger.error(
            "damaged rows in the event log are skipped: clients that ask for them are told that something is missing. "
            "`whaled check --deep` lists them all, `whaled repair` takes them out",
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
    """A page must have an end: SQLite takes a negative limit for none."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")


def threads_for(settings: sections.EventLog) -> Threads:
    """The connections, not opened yet, and their threads."""
    # Resolved, so that two names of one file have one lock.
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
    """Run a plain function on one of the threads."""
    return asyncio.get_running_loop().run_in_executor(thread, function, *args)


async def check_within(limit_s: float, threads: Threads) -> bool:
    """Look through the file for damage, but not for longer than the limit. Returns whether it got to the end."""
    timer = asyncio.get_running_loop().call_later(limit_s, threads.searches.interrupt)
    try:
        is_complete = await on_thread(threads.search_thread, threads.searches.check)
    finally:
        timer.cancel()
    if not is_complete:
        logger.warning("event log check stopped before the end: the file is large", limit_s=limit_s)
    return is_complete
