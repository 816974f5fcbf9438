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
from whaled.eventlog import files, schema
from whaled.eventlog.codec import Codec
from whaled.model import Draft, Event, Kind, Scan, Whale

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Above this the write-ahead log is copied into the database once the commit has been answered: SQLite would do it
# inside the commit (4 MiB is its default too), and make that one event wait.
CHECKPOINT_BYTES = 4 * 1024 * 1024
# Should our checkpoints not keep up, SQLite does it itself at this many pages (64 MiB): the write-ahead log is bounded.
AUTOCHECKPOINT_PAGES = 16_384

LONG_AGO = -9e99  # `high_at` before the first event


@dataclass(frozen=True, slots=True)
class Opened:
    """What the database held when it was opened."""

    epoch: str
    head: int
    oldest: int
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
    """Nothing is kept between calls but the connection: offsets come from the counter in the database, inside the
    transaction, so that a transaction that failed leaves no hole.
    """

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock = files.DaemonLock(path)
        self._codec = Codec(path)
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)

    def open(self, now: float) -> Opened:
        """Lock out other daemons; make or migrate the database. Raises EventLogError."""
        self._lock.take()
        files.ensure_exists(self._path)
        files.refuse_stray_wal(self._path)
        self._inode = files.inode(self._path)
        with files.explained(self._path, "open the event log"):
            db = self._connection = files.open_to_write(self._path, self._busy_timeout_s)
            before, after = schema.migrate(db, self._path, now=now)
            is_copy = schema.is_copy(db)
            if is_copy:
                schema.settle_copy(db, renew=True)
            db.execute(f"PRAGMA wal_autocheckpoint = {AUTOCHECKPOINT_PAGES}")
            # The file shrinks to this when it starts over, so that its size says how much is not copied yet.
            db.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES}")
            epoch, head = db.execute("SELECT epoch, head FROM log").fetchone()
            (oldest,) = db.execute("SELECT coalesce(min(offset), ?) FROM events", (head + 1,)).fetchone()
        if before == 0:
            log.info("event log made", path=str(self._path), epoch=epoch)
        elif before < after:
            log.info("event log migrated", path=str(self._path), from_version=before, to_version=after)
        if is_copy:
            log.warning(
                "event log is a backup put in place: it has a new epoch, no position is honoured",
                path=str(self._path),
                epoch=epoch,
                head=head,
            )
        return Opened(epoch, head, oldest, files.size_bytes(self._path))

    def append(self, calls: Sequence[Sequence[Draft]]) -> Committed:
        """Store the drafts of all calls in one transaction; returns after the fsync. Raises EventLogError.

        What failed is not in the log, with one exception that no program can rule out: if the disk failed in the fsync
        itself, it may be found there after a restart.
        """
        began = time.perf_counter()
        with self._transaction("store events") as db:
            head, high_at = db.execute(
                "SELECT head, coalesce((SELECT high_at FROM events WHERE offset = head), ?) FROM log", (LONG_AGO,)
            ).fetchone()
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
                db.execute("UPDATE log SET head = ?", (head,))
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
            self._put_state(db, schema.CANARY_MARK, str(draft.at))
        assert event is not None, "a canary's txid is its own"
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
        return len(whales), files.size_bytes(self._path)

    def set_state(self, key: str, value: str) -> None:
        """Store a small text under a key. Raises EventLogError."""
        with self._transaction("store state") as db:
            self._put_state(db, key, value)

    def put_scan(self, scan: Scan) -> None:
        """Store what the scan of a block found. Raises EventLogError."""
        with self._transaction("store a block scan") as db:
            db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(scan))

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
            log.warning("event log not checkpointed at close", path=str(self._path), error=str(error))
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
        whale, text = draft.whale, self._codec.text
        txid = whale.alert.transaction_id
        known = db.execute("SELECT id, alert, addresses FROM whales WHERE txid = ?", (txid,)).fetchone()
        if known is None:
            row = (txid, text(whale.alert), text(whale.addresses))
            whale_id = db.execute("INSERT INTO whales (txid, alert, addresses) VALUES (?, ?, ?)", row).lastrowid
            # OR IGNORE: a backend that names an outpoint twice must not end the daemon.
            db.executemany(
                "INSERT OR IGNORE INTO spends (outpoint, whale) VALUES (?, ?)",
                ((outpoint, whale_id) for outpoint in whale.outpoints),
            )
            whale = Whale(whale.alert, whale.addresses)  # as a reader would get it
        elif draft.kind is Kind.ALERT:
            return None
        else:
            # Live delivery and replay must filter alike: an update goes with the alert that is in the log.
            whale_id, alert, addresses = known
            whale = self._codec.whale(txid, alert, addresses)
        body = None if draft.update is None else text(draft.update)
        inserted = db.execute(
            "INSERT INTO events (offset, whale, kind, ref, at, high_at, body) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (whale, kind, ref) DO NOTHING",
            (offset, whale_id, draft.kind.value, draft.ref, draft.at, high_at, body),
        ).rowcount
        if not inserted:
            return None
        return Event(offset=offset, kind=draft.kind, at=draft.at, whale=whale, ref=draft.ref, update=draft.update)

    @staticmethod
    def _put_state(db: sqlite3.Connection, key: str, value: str) -> None:
        db.execute(
            "INSERT INTO state (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def _refuse_if_moved(self) -> None:
        """SQLite goes on writing into a deleted file without a word; all of it would be gone at the end."""
        if files.inode(self._path) != self._inode:
            raise EventLogError(
                f"{self._path}: the event log was deleted, moved or replaced while whaled was using it. "
                "Put it back if you can (with its -wal file), then start whaled again",
                reason=LogFailure.IO,
            )
