"""The writing connection. One thread uses it; sqlite3 itself refuses any other."""

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

# Above this the write-ahead log is copied into the database once the commit has been answered: SQLite would do it
# inside the commit (4 MiB is its default too), and make that one event wait.
CHECKPOINT_BYTES = 4 * 1024 * 1024
# Should our checkpoints not keep up, SQLite does it itself at this many pages (64 MiB): the write-ahead log is bounded.
AUTOCHECKPOINT_PAGES = 16_384

LONG_AGO = -9e99  # `high_at` before the first event
# The three are ends of indexes: microseconds. Beyond 2^62 there are only damaged numbers.
NEXT_WHALE = """
    SELECT 1 + max(
        coalesce((SELECT max(id) FROM whales WHERE id < 1 << 62), 0),
        coalesce((SELECT max(whale) FROM events WHERE whale < 1 << 62), 0),
        coalesce((SELECT max(whale) FROM spends WHERE whale < 1 << 62), 0)
    )"""
NEWEST_ROWS = 1_000  # how far back an intact event is searched for, for its `high_at`


@dataclass(frozen=True, slots=True)
class Opened:
    """What the database held when it was opened. `gaps` are what `whaled repair` took out, first and last offsets."""

    epoch: str
    head: int
    oldest: int
    gaps: tuple[tuple[int, int], ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Committed:
    """What one transaction stored: the new events of each call, the newest offset, how long it took."""

    events: tuple[list[Event], ...]
    head: int
    seconds: float
    size_bytes: int
    wants_checkpoint: bool


class Writer:
    """Offsets come from the counter in the database, inside the transaction, so that a transaction that failed leaves
    no hole.
    """

    def __init__(self, path: Path, busy_timeout_s: float, report: Report) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._report = report
        self._lock = files.DaemonLock(path)
        self._codec = Codec()
        self._queries = Queries(has_checksums=True)
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._newest: tuple[int, float] | None = None  # head and its `high_at`, after a commit

    def open(self, now: float) -> Opened:
        """Lock out other daemons; make or migrate the database. Raises EventLogError."""
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
            # The file shrinks to this when it starts over, so that its size says how much is not copied yet.
            db.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES}")
            files.read_rows(db)
            epoch, head = self._sound_counter(now)
            (oldest,) = db.execute(
                "SELECT coalesce(min(offset), ?) FROM events WHERE offset > 0", (head + 1,)
            ).fetchone()
            gaps, wrong = schema.gaps(db, head)
            for row in wrong:
                self._report(of_gap(*row))
            self._look_before(oldest, gaps)
        if before == 0:
            logger.info("event log made", path=str(self._path), epoch=epoch)
        elif before < after:
            logger.info("event log migrated", path=str(self._path), from_version=before, to_version=after)
        if is_copy:
            logger.warning(
                "event log is a backup put in place: it has a new epoch, no position is honoured",
                path=str(self._path),
                epoch=epoch,
                head=head,
            )
        held = tuple(gap for gap in gaps if gap[1] >= oldest)
        return Opened(epoch, head, oldest, held, files.size_bytes(self._path))

    def _look_before(self, oldest: int, gaps: Gaps) -> None:
        """Report events that are missing before the oldest one although retention did not remove them."""
        with self._transaction("look for what retention removed") as db:
            pruned = schema.pruned_offset(db)
            if pruned is None:
                # Older versions did not note it: what is there is where it begins.
                schema.put_state(db, schema.PRUNED_MARK, str(oldest - 1))
                return
        for damage in lost_before(oldest, pruned, gaps):
            self._report(damage)

    def _sound_counter(self, now: float) -> tuple[str, int]:
        """Epoch and head. Where their row is damaged, a new epoch begins behind the newest event: which offsets clients
        know is not known any more. An event beyond an intact counter is damaged, and in the way of those to come.
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

        What failed is not in the log, with one exception that no program can rule out: if the disk failed in the fsync
        itself, it may be found there after a restart.
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
        """Insert as `append` does, take it back, and commit the time of it instead: all of the way to the disk, and
        nothing is left but a mark. Returns the event that it would have been, and whether a checkpoint is due.
        """
        with self._transaction("rehearse") as db:
            (head,) = db.execute("SELECT head FROM log").fetchone()
            db.execute("SAVEPOINT rehearsal")
            event = self._insert(db, draft, head + 1, draft.at)
            db.execute("ROLLBACK TO rehearsal")
            db.execute("RELEASE rehearsal")
            if event is None:
                raise self._corrupt(f"it has the whale {draft.whale.alert.transaction_id}, which nobody sent")
            schema.put_state(db, schema.CANARY_MARK, str(draft.at))
        return event, files.wal_bytes(self._path) > CHECKPOINT_BYTES

    def prune(self, before: int) -> tuple[int, int]:
        """Delete the events below an offset, and the whales no event speaks of any more. Returns (deleted, size)."""
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
        """Store a small text under a key. Raises EventLogError."""
        with self._transaction("store state") as db:
            schema.put_state(db, key, value)

    def put_scan(self, scan: Scan) -> None:
        """Store what the scan of a block found. Raises EventLogError."""
        with self._transaction("store a block scan") as db:
            values = astuple(scan)
            db.execute(
                f"INSERT OR REPLACE INTO blocks VALUES ({', '.join('?' * (len(values) + 1))})",  # noqa: S608 - constants
                (*values, checksums.of_values(*values)),
            )

    def forget_scan(self, height: int) -> None:
        """The block at this height is to be scanned again. Raises EventLogError."""
        with self._transaction("forget a block scan") as db:
            db.execute("DELETE FROM blocks WHERE height = ?", (height,))

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, as far as readers allow; the next commit starts it over."""
        with files.explained(self._path, "checkpoint the event log"):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self, *readers_closed: Future[None]) -> None:
        """Once all readers are done: checkpoint, close, let other daemons in. Also after an open that failed."""
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
            db.execute("PRAGMA busy_timeout = 0")  # a backup that is reading must not hold up the stop
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            # Nothing is lost: the write-ahead log stays beside the database and is read at the next start.
            logger.warning("event log not checkpointed at close", path=str(self._path), error=str(error))
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
                # SQLite has rolled back by itself after some failures (a full disk, an I/O error).
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _insert(self, db: sqlite3.Connection, draft: Draft, offset: int, high_at: float) -> Event | None:
        """The event, or None if it is in the log already.

        An alert is a duplicate as long as its whale is known, that is while any event about it is held.
        """
        whale = draft.whale
        txid = whale.alert.transaction_id
        key = txid.encode()
        known = db.execute("SELECT id, alert, addresses, checksum FROM whales WHERE txid = ?", (txid,)).fetchone()
        if known is None:
            whale_id = self._insert_whale(db, key, whale)
            whale = Whale(whale.alert, whale.addresses)  # as a reader would get it
        elif draft.kind is Kind.ALERT:
            return None
        else:
            # Live delivery and replay must filter alike: an update goes with the alert that is in the log.
            whale_id, *columns = known
            try:
                whale = self._codec.whale(key, *columns)
            except DamagedRowError as error:
                self._report(Damage(table=Table.WHALES, row=txid, problem=str(error)))
                whale = Whale(whale.alert, whale.addresses)
        body = None if draft.update is None else self._codec.json(draft.update)
        # Zero is added because SQLite stores no -0.0: the checksum must be that of what is read.
        checksum = checksums.of_event(
            offset, draft.kind.value.encode(), draft.ref.encode(), draft.at + 0.0, high_at + 0.0, body, key
        )
        text = None if body is None else body.decode()
        inserted = db.execute(
            "INSERT INTO events (offset, whale, kind, ref, at, high_at, body, checksum) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (whale, kind, ref) DO NOTHING",
            (offset, whale_id, draft.kind.value, draft.ref, draft.at, high_at, text, checksum),
        ).rowcount
        if not inserted:
            if known is None:  # a new whale: the event that is in its way is another one's
                raise self._corrupt(f"an index of events names whale {whale_id}, which was not there")
            return None
        return Event(offset=offset, kind=draft.kind, at=draft.at, whale=whale, ref=draft.ref, update=draft.update)

    def _insert_whale(self, db: sqlite3.Connection, txid: bytes, whale: Whale) -> int:
        """The number of the new row: one that no event and no outpoint names, also of whales that are lost."""
        alert, addresses = self._codec.json(whale.alert), self._codec.json(whale.addresses)
        number = int(db.execute(NEXT_WHALE).fetchone()[0])
        db.execute(
            "INSERT INTO whales (id, txid, alert, addresses, checksum) VALUES (?, ?, ?, ?, ?)",
            (number, txid.decode(), alert.decode(), addresses.decode(), checksums.of_whale(txid, alert, addresses)),
        )
        # OR IGNORE: a backend that names an outpoint twice must not end the daemon.
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
        """`high_at` of the newest event held that is intact. Known from the last commit, as long as that was ours."""
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
        """SQLite goes on writing into a deleted file without a word; all of it would be gone at the end."""
        if files.inode(self._path) != self._inode:
            raise EventLogError(
                f"{self._path}: the event log was deleted, moved or replaced while whaled was using it. "
                "Put it back if you can (with its -wal file), then start whaled again",
                reason=LogFailure.IO,
            )
