"""The writing connection. Only one thread uses it; the sqlite3 module refuses any other thread."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog
from msgspec.structs import astuple

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import checksums, files, firstpage, schema
from whaled.eventlog.codec import Codec
from whaled.eventlog.damage import (
    COUNTER,
    MISMATCH,
    MISSING,
    Damage,
    DamagedRowError,
    Gaps,
    Report,
    Table,
    counter_problem,
    lost_before,
    of_gap,
)
from whaled.eventlog.rows import Queries, damaged_event
from whaled.model import Draft, Event, Kind, Scan, Whale

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Above this size the write-ahead log is checkpointed, after the commit has returned. SQLite (whose default is also
# 4 MiB) would checkpoint inside the commit and delay that one event.
CHECKPOINT_BYTES = 4 * 1024 * 1024
# If these checkpoints do not keep up, SQLite checkpoints at this many pages (64 MiB): the write-ahead log is bounded.
AUTOCHECKPOINT_PAGES = 16_384

LONG_AGO = -9e99  # `high_at` before the first event
# Each of the three maxima is the end of an index and takes microseconds. Only damaged rows have numbers beyond 2^62.
NEXT_WHALE = """
    SELECT 1 + max(
        coalesce((SELECT max(id) FROM whales WHERE id < 1 << 62), 0),
        coalesce((SELECT max(whale) FROM events WHERE whale < 1 << 62), 0),
        coalesce((SELECT max(whale) FROM spends WHERE whale < 1 << 62), 0)
    )"""
NEWEST_ROWS = 1_000  # at most this many of the newest rows are read to find an intact `high_at`


@dataclass(frozen=True, slots=True)
class Opened:
    """The state of the database at opening. `gaps` are the first and last offsets that `whaled repair` removed."""

    epoch: str
    head: int
    oldest: int
    gaps: tuple[tuple[int, int], ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The result of one transaction: the new events of each call, the newest offset, the duration."""

    events: tuple[list[Event], ...]
    head: int
    seconds: float
    size_bytes: int
    wants_checkpoint: bool


class Writer:
    """The only writer of the event log.

    It takes offsets from the counter in the database inside the transaction, so a failed transaction leaves no hole.
    """

    def __init__(self, path: Path, busy_timeout_s: float, report: Report) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._report = report
        self._lock = files.DaemonLock(path)
        self._codec = Codec()
        self._queries = Queries(schema.NEWEST_VERSION)
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._newest: tuple[int, float] | None = None  # head and its `high_at`, after a commit

    def open(self, now: float) -> Opened:
        """Lock the log against other daemons, then create or migrate the database. Raises EventLogError."""
        self._lock.take()
        files.ensure_exists(self._path)
        files.refuse_stray_wal(self._path)
        self._inode = files.inode(self._path)
        with firstpage.named(self._path), files.explained(self._path, "open the event log"):
            db = self._connection = files.open_to_write(self._path, self._busy_timeout_s)
            before, after = schema.migrate(db, self._path, now=now)
            is_copy = schema.is_copy(db)
            if is_copy:
                schema.settle_copy(db, renew=True)
            db.execute(f"PRAGMA wal_autocheckpoint = {AUTOCHECKPOINT_PAGES}")
            # SQLite truncates the write-ahead log to this when it restarts it: the size shows what is not copied yet.
            db.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES}")
            files.read_rows(db)
            epoch, head = self._sound_counter(now)
            (oldest,) = db.execute(
                "SELECT coalesce(min(offset), ?) FROM events WHERE offset > 0", (head + 1,)
            ).fetchone()
            gaps, wrong = schema.gaps(db, head)
            for row in wrong:
                self._report(of_gap(*row))
            self._report_lost_before(oldest, gaps)
        if before == 0:
            logger.info("eventlog_created", path=str(self._path), epoch=epoch)
        elif before < after:
            logger.info("eventlog_migrated", path=str(self._path), from_version=before, to_version=after)
        if is_copy:
            logger.warning(
                "eventlog_backup_adopted",
                path=str(self._path),
                epoch=epoch,
                head=head,
            )
        held = tuple(gap for gap in gaps if gap[1] >= oldest)
        return Opened(epoch, head, oldest, held, files.size_bytes(self._path))

    def _report_lost_before(self, oldest: int, gaps: Gaps) -> None:
        """Report events that are missing before the oldest one although retention did not remove them."""
        with self._transaction("look for what retention removed") as db:
            pruned = schema.pruned_offset(db)
            if pruned is None:
                # Older versions did not record this offset: the log is taken to begin at its oldest event.
                schema.put_state(db, schema.PRUNED_MARK, str(oldest - 1))
                return
        for damage in lost_before(oldest, pruned, gaps):
            self._report(damage)

    def _sound_counter(self, now: float) -> tuple[str, int]:
        """Return epoch and head, and repair their row if it is damaged.

        In that case the offsets that clients have received are unknown, so a new epoch begins after the newest event.
        If the counter is intact, an event beyond it is damaged and occupies an offset still to be assigned: remove it.
        """
        with self._transaction("look at the counter") as db:
            counter = schema.counter(db)
            if counter is not None:
                epoch, head = counter
                beyond = db.execute("DELETE FROM events WHERE offset > ? RETURNING offset", (head,)).fetchall()
                for (offset,) in beyond:
                    problem = f"its offset is beyond the newest, {head}: it was removed"
                    self._report(Damage(table=Table.EVENTS, row=f"offset {offset}", problem=problem))
                return epoch, head
            (newest,) = db.execute(
                "SELECT coalesce(max(offset), 0) FROM events WHERE offset BETWEEN 1 AND ?", (schema.MAX_OFFSET,)
            ).fetchone()
            noted = [schema.noted_offset(db, key) or 0 for key in (schema.PRUNED_MARK, schema.VERIFIED_MARK)]
            head = max(newest, *noted)
            epoch = schema.new_epoch()
            problem = MISMATCH if db.execute("DELETE FROM log").rowcount else MISSING
            db.execute("INSERT INTO log (id, epoch, head, created_at) VALUES (1, ?, ?, ?)", (epoch, head, now))
            schema.seal_log(db)
        problem = f"{counter_problem(problem, newest, head)}: a new epoch begins after {head}"
        self._report(Damage(table=Table.LOG, row=COUNTER, problem=problem))
        return epoch, head

    def append(self, calls: Sequence[Sequence[Draft]]) -> Committed:
        """Store the drafts of all calls in one transaction; returns after the fsync. Raises EventLogError.

        After a failure none of the drafts is in the log, with one exception that no program can rule out: if the fsync
        itself failed, they may be found in the log after a restart.
        """
        began = time.perf_counter()
        with self._transaction("store events") as db:
            epoch, head, created_at = db.execute("SELECT epoch, head, created_at FROM log").fetchone()
            high_at = self._high_at_of(db, head)
            first = head
            stored: list[list[Event]] = []
            for drafts in calls:
                events: list[Event] = []
                for draft in drafts:
                    event = self._insert(db, draft, head + 1, max(high_at, draft.at))
                    if event is not None:
                        events.append(event)
                        head += 1
                        high_at = max(high_at, draft.at)
                stored.append(events)
            if head > first:
                db.execute("UPDATE log SET head = ?, checksum = ?", (head, checksums.of_log(epoch, head, created_at)))
        self._newest = (head, high_at)
        seconds = time.perf_counter() - began
        return Committed(
            events=tuple(stored),
            head=head,
            seconds=seconds,
            size_bytes=files.size_bytes(self._path),
            wants_checkpoint=files.wal_bytes(self._path) > CHECKPOINT_BYTES,
        )

    def rehearse(self, draft: Draft) -> tuple[Event, bool]:
        """Insert a draft as `append` does, roll it back, and commit its time as a mark instead.

        The commit exercises the whole path to the disk and leaves nothing but the mark. Returns the event that
        `append` would have stored, and whether a checkpoint is due.
        """
        with self._transaction("rehearse") as db:
            (head,) = db.execute("SELECT head FROM log").fetchone()
            db.execute("SAVEPOINT rehearsal")
            event = self._insert(db, draft, head + 1, draft.at)
            db.execute("ROLLBACK TO rehearsal")
            db.execute("RELEASE rehearsal")
            if event is None:
                raise self._corrupt(f"it holds the rehearsed whale {draft.whale.alert.transaction_id}")
            schema.put_state(db, schema.CANARY_MARK, str(draft.at))
        return event, files.wal_bytes(self._path) > CHECKPOINT_BYTES

    def prune(self, before: int) -> tuple[int, int]:
        """Delete the events below an offset, and the whales left without events. Returns (events deleted, size)."""
        with self._transaction("prune events") as db:
            whales = db.execute("DELETE FROM events WHERE offset < ? RETURNING whale", (before,)).fetchall()
            db.executemany(
                "DELETE FROM spends WHERE whale = ?1 AND NOT EXISTS (SELECT 1 FROM events WHERE whale = ?1)",
                set(whales),
            )
            db.executemany(
                "DELETE FROM whales WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM events WHERE whale = ?1)", set(whales)
            )
            db.execute("DELETE FROM gaps WHERE through < ?", (before,))
            schema.put_state(db, schema.PRUNED_MARK, str(before - 1))
            self._newest = None
        return len(whales), files.size_bytes(self._path)

    def set_state(self, key: str, value: str) -> None:
        """Store a short text under a key. Raises EventLogError."""
        with self._transaction("store state") as db:
            schema.put_state(db, key, value)

    def put_scan(self, scan: Scan) -> None:
        """Store the result of a block scan. Raises EventLogError."""
        with self._transaction("store a block scan") as db:
            values = astuple(scan)
            db.execute(
                f"INSERT OR REPLACE INTO blocks VALUES ({', '.join('?' * (len(values) + 1))})",  # noqa: S608 - constants
                (*values, checksums.of_values(*values)),
            )

    def forget_scan(self, height: int) -> None:
        """Remove the scan of the block at this height. Raises EventLogError."""
        with self._transaction("forget a block scan") as db:
            db.execute("DELETE FROM blocks WHERE height = ?", (height,))

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database as far as readers allow; after a full copy it is reused."""
        with files.explained(self._path, "checkpoint the event log"):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self, *readers_closed: Future[None]) -> None:
        """Wait until all readers are closed, then checkpoint, close and release the lock. Safe after a failed open."""
        try:
            for closed in readers_closed:
                closed.exception()
            if self._connection is not None:
                self._close(self._connection)
                self._connection = None
        finally:
            self._lock.release()

    def _close(self, db: sqlite3.Connection) -> None:
        try:
            db.execute("PRAGMA busy_timeout = 0")  # a running backup must not delay the stop
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            # Nothing is lost: the write-ahead log stays next to the database, and the next start reads it.
            logger.warning("eventlog_close_checkpoint_failed", path=str(self._path), error=str(error))
        finally:
            db.close()

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None, "the writer is used between open and close only"
        return self._connection

    @contextlib.contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        db = self._db
        with files.explained(self._path, doing):
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                self._refuse_if_moved()
                db.execute("COMMIT")
            except BaseException:
                # After some failures (a full disk, an I/O error) SQLite has already rolled back.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _insert(self, db: sqlite3.Connection, draft: Draft, offset: int, high_at: float) -> Event | None:
        """Insert a draft. Return its event, or None if the log already holds it.

        An alert is a duplicate while its whale is known, that is, while any event about the whale is held.
        """
        whale = draft.whale
        txid = whale.alert.transaction_id
        key = txid.encode()
        known = db.execute("SELECT id, alert, addresses, checksum FROM whales WHERE txid = ?", (txid,)).fetchone()
        if known is None:
            whale_id = self._insert_whale(db, key, whale)
            whale = Whale(whale.alert, whale.addresses)  # without outpoints, as readers return it
        elif draft.kind is Kind.ALERT:
            return None
        else:
            # Live delivery and replay must filter alike: an update carries the alert that is in the log.
            whale_id, *columns = known
            try:
                whale = self._codec.whale(key, *columns)
            except DamagedRowError as error:
                self._report(Damage(table=Table.WHALES, row=txid, problem=str(error)))
                whale = Whale(whale.alert, whale.addresses)
        body = None if draft.update is None else self._codec.json(draft.update)
        # SQLite stores -0.0 as 0.0, and the checksum must match the value that is read back: adding 0.0 does the same.
        kind, ref, repeat = draft.kind.value, draft.ref, draft.repeat
        checksum = checksums.of_event(
            offset, kind.encode(), ref.encode(), repeat, draft.at + 0.0, high_at + 0.0, body, key
        )
        text = None if body is None else body.decode()
        inserted = db.execute(
            "INSERT INTO events (offset, whale, kind, ref, repeat, at, high_at, body, checksum) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (whale, kind, ref, repeat) DO NOTHING",
            (offset, whale_id, kind, ref, repeat, draft.at, high_at, text, checksum),
        ).rowcount
        if not inserted:
            if known is None:  # a new whale has no events yet: the conflicting row belongs to another whale
                raise self._corrupt(f"an index of events refers to whale {whale_id}, which did not exist")
            return None
        return Event(
            offset=offset, kind=draft.kind, at=draft.at, whale=whale, ref=ref, update=draft.update, repeat=repeat
        )

    def _insert_whale(self, db: sqlite3.Connection, txid: bytes, whale: Whale) -> int:
        """Insert a whale. Return its row number: one that no event or outpoint refers to, not even of a lost whale."""
        alert, addresses = self._codec.json(whale.alert), self._codec.json(whale.addresses)
        number = int(db.execute(NEXT_WHALE).fetchone()[0])
        db.execute(
            "INSERT INTO whales (id, txid, alert, addresses, checksum) VALUES (?, ?, ?, ?, ?)",
            (number, txid.decode(), alert.decode(), addresses.decode(), checksums.of_whale(txid, alert, addresses)),
        )
        # OR IGNORE: a backend that sends the same outpoint twice must not end the daemon.
        db.executemany(
            "INSERT OR IGNORE INTO spends (outpoint, whale, checksum) VALUES (?, ?, ?)",
            ((outpoint, number, checksums.of_spend(outpoint.encode(), number)) for outpoint in whale.outpoints),
        )
        return number

    def _corrupt(self, problem: str) -> EventLogError:
        return EventLogError(
            f"{self._path}: the event log is damaged: {problem}. {files.ADVICE[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )

    def _high_at_of(self, db: sqlite3.Connection, head: int) -> float:
        """Return `high_at` of the newest intact event; from memory if `head` is unchanged since the last commit."""
        if self._newest is not None and self._newest[0] == head:
            return self._newest[1]
        newest = f"{self._queries.columns} WHERE e.offset <= ? ORDER BY e.offset DESC LIMIT {NEWEST_ROWS}"
        for row in db.execute(newest, (head,)):
            try:
                return self._codec.columns(row)[1]
            except DamagedRowError as error:
                self._report(damaged_event(row, str(error)))
        return LONG_AGO

    def _refuse_if_moved(self) -> None:
        """Raise EventLogError if the file was deleted, moved or replaced.

        SQLite would silently continue to write into the deleted file, and all of those events would be lost.
        """
        if files.inode(self._path) != self._inode:
            raise EventLogError(
                f"{self._path}: the event log was deleted, moved or replaced while whaled was using it. "
                "Put it back if you can (with its -wal file), then start whaled again",
                reason=LogFailure.IO,
            )
