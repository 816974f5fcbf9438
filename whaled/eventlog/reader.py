"""The reading connection. One thread uses it; a statement sees every commit that was answered before it began."""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from whaled.errors import EventLogError
from whaled.eventlog import files, schema
from whaled.eventlog.codec import Codec
from whaled.model import Event, Kind, Scan, Whale
from whaled.whales.accuracy import Outcome

EVENTS = (
    "SELECT e.offset, e.kind, e.ref, e.at, e.body, w.txid, w.alert, w.addresses "
    "FROM events AS e JOIN whales AS w ON w.id = e.whale"
)

IS_NEWEST = "NOT EXISTS (SELECT 1 FROM events AS later WHERE later.whale = e.whale AND later.offset > e.offset)"


class Reader:
    """Opened read-only: no mistake here can change the log."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._codec = Codec(path)
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Raises EventLogError."""
        with files.explained(self._path, "open the event log for reading"):
            self._connection = files.connect(self._path, "ro", self._busy_timeout_s)

    def close(self) -> None:
        """Does what is needed after a failed open, too."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def interrupt(self) -> None:
        """End the running query: the one call other threads may make."""
        if self._connection is not None:
            self._connection.interrupt()

    def check(self) -> bool:
        """Look through the whole file; False if interrupted before the end. Raises EventLogError(CORRUPT)."""
        try:
            with files.explained(self._path, "check the event log"):
                files.look_through(self._db, self._path)
        except EventLogError as error:
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                return False
            raise
        return True

    def pending(self, after: int, limit: int) -> list[Event]:
        """See EventLog.pending."""
        return self._events(
            f"WHERE e.offset > ? AND e.kind IN ('alert', 'pending') AND {IS_NEWEST} ORDER BY e.offset LIMIT ?",
            (after, limit),
        )

    def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, ascending, at most `limit`."""
        return self._events("WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset LIMIT ?", (after, through, limit))

    def offset_before(self, at: float) -> int:
        """The greatest offset that is, like all before it, older than `at`; one below the oldest if there is none."""
        with self._snapshot("look up a time") as db:
            (head,) = db.execute("SELECT head FROM log").fetchone()
            (low,) = db.execute("SELECT coalesce(min(offset) - 1, ?) FROM events", (head,)).fetchone()
            high = head
            # Offsets have no holes and high_at never falls: bisection is exact, and spares every commit an index.
            while low < high:
                middle = (low + high + 1) // 2
                (high_at,) = db.execute("SELECT high_at FROM events WHERE offset = ?", (middle,)).fetchone()
                if high_at < at:
                    low = middle
                else:
                    high = middle - 1
        return int(low)

    def first_to_keep(self, cutoff: float, now: float) -> int:
        """The offset pruning stops at: only an event that is older than `cutoff`, or is before one that is, goes.

        A time later than `now` says nothing (some clock was wrong). Such an event goes with an old one after it, and
        stays while there is none: a wrong clock, then or now, must not empty the log.
        """
        young = "SELECT offset FROM events WHERE at BETWEEN ? AND ? ORDER BY offset LIMIT 1"
        old = "SELECT offset + 1 FROM events WHERE offset < ? AND at < ? ORDER BY offset DESC LIMIT 1"
        with self._snapshot("look for old events") as db:
            (end,) = db.execute("SELECT head + 1 FROM log").fetchone()
            found = db.execute(young, (cutoff, now)).fetchone() or db.execute(young, (cutoff, 9e99)).fetchone()
            boundary = int(found[0]) if found else int(end)
            found = db.execute(old, (boundary, cutoff)).fetchone()
        return int(found[0]) if found else 0

    def whales(self, txids: Sequence[str]) -> dict[str, Whale]:
        """The alerts known for these txids."""
        with files.explained(self._path, "read alerts"):
            rows = self._db.execute(
                "SELECT txid, alert, addresses FROM whales WHERE txid IN (SELECT value FROM json_each(?))",
                (msgspec.json.encode(txids).decode(),),
            ).fetchall()
        return {row[0]: self._codec.whale(*row) for row in rows}

    def rivals(self, outpoints: Sequence[str]) -> dict[str, list[str]]:
        """See EventLog.rivals."""
        with files.explained(self._path, "read what whales spend"):
            rows = self._db.execute(
                "SELECT s.outpoint, w.txid FROM spends AS s JOIN whales AS w ON w.id = s.whale "
                "WHERE s.outpoint IN (SELECT value FROM json_each(?)) ORDER BY w.id",
                (msgspec.json.encode(outpoints).decode(),),
            ).fetchall()
        found: dict[str, list[str]] = {}
        for outpoint, txid in rows:
            found.setdefault(outpoint, []).append(txid)
        return found

    def outpoints(self, txids: Sequence[str]) -> dict[str, list[str]]:
        """See EventLog.outpoints."""
        with files.explained(self._path, "read what whales spend"):
            rows = self._db.execute(
                "SELECT w.txid, s.outpoint FROM whales AS w JOIN spends AS s ON s.whale = w.id "
                "WHERE w.txid IN (SELECT value FROM json_each(?))",
                (msgspec.json.encode(txids).decode(),),
            ).fetchall()
        found: dict[str, list[str]] = {}
        for txid, outpoint in rows:
            found.setdefault(txid, []).append(outpoint)
        return found

    def histories(self, txids: Sequence[str]) -> dict[str, list[tuple[Kind, str]]]:
        """See EventLog.histories."""
        with files.explained(self._path, "read histories"):
            rows = self._db.execute(
                "SELECT w.txid, e.kind, e.ref FROM whales AS w JOIN events AS e ON e.whale = w.id "
                "WHERE w.txid IN (SELECT value FROM json_each(?)) ORDER BY e.offset",
                (msgspec.json.encode(txids).decode(),),
            ).fetchall()
        found: dict[str, list[tuple[Kind, str]]] = {}
        for txid, kind, ref in rows:
            found.setdefault(txid, []).append((Kind(kind), ref))
        return found

    def confirmed_in(self, block_hash: str) -> list[Whale]:
        """See EventLog.confirmed_in."""
        events = self._events(
            f"WHERE e.kind = 'confirmed' AND (e.ref = ?1 OR e.ref LIKE ?1 || '#%') AND {IS_NEWEST} ORDER BY e.offset",
            (block_hash,),
        )
        return [event.whale for event in events]

    def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """See EventLog.gone_since."""
        with files.explained(self._path, "read who is gone"):
            rows = self._db.execute(
                "SELECT w.txid, (SELECT count(*) FROM events AS x WHERE x.whale = w.id) "  # noqa: S608 - constants
                "FROM events AS e JOIN whales AS w ON w.id = e.whale "
                f"WHERE e.kind IN ('replaced', 'dropped') AND e.at >= ? AND {IS_NEWEST} ORDER BY e.offset DESC LIMIT ?",
                (at, limit),
            ).fetchall()
        return dict(rows)

    def outcomes(self, since: float) -> list[Outcome]:
        """Every whale that was alerted before it was mined, and whose newest word, not older than `since`, is that it
        is in a block.
        """
        with self._snapshot("read confirmations") as db:
            if schema.identify(db, self._path) == 0:
                return []
            rows = db.execute(
                "SELECT json_extract(w.alert, '$.urgency_score'), json_extract(e.body, '$.blocks_off'), "  # noqa: S608 - constants
                "json_extract(e.body, '$.seconds_to_confirmation') "
                "FROM events AS e JOIN whales AS w ON w.id = e.whale "
                "WHERE e.kind = 'confirmed' AND e.at >= ? AND json_extract(w.alert, '$.status') = 'pending' "
                f"AND {IS_NEWEST}",
                (since,),
            ).fetchall()
        return [Outcome(*row) for row in rows]

    def scans(self, low: int, high: int) -> list[Scan]:
        """See EventLog.scans."""
        with files.explained(self._path, "read block scans"):
            rows = self._db.execute(
                "SELECT * FROM blocks WHERE height BETWEEN ? AND ? ORDER BY height", (low, high)
            ).fetchall()
        return [_scan(row) for row in rows]

    def newest_scans(self, limit: int, below: int = schema.NO_HEIGHT) -> list[Scan]:
        """The highest blocks scanned below a height, descending. The file may be older than this program."""
        with self._snapshot("read block scans") as db:
            if schema.identify(db, self._path) < schema.BLOCKS_VERSION:
                return []
            rows = db.execute(
                "SELECT * FROM blocks WHERE height < ? ORDER BY height DESC LIMIT ?", (below, limit)
            ).fetchall()
        return [_scan(row) for row in rows]

    def latest_scan(self) -> Scan | None:
        """The block scanned that was mined last: not the highest, if the backend followed another chain before."""
        with files.explained(self._path, "read block scans"):
            row = self._db.execute("SELECT * FROM blocks ORDER BY mined_at DESC LIMIT 1").fetchone()
        return None if row is None else _scan(row)

    def unscanned(self) -> tuple[int, int]:
        """How many blocks from the oldest to the newest that were scanned were not, and the height of the oldest."""
        with self._snapshot("count block scans") as db:
            if schema.identify(db, self._path) < schema.BLOCKS_VERSION:
                return 0, 0
            (oldest, newest, count) = db.execute(
                "SELECT coalesce(min(height), 0), coalesce(max(height), -1), count(*) FROM blocks"
            ).fetchone()
        return newest - oldest + 1 - count, oldest

    def state(self, key: str) -> str | None:
        """The text stored under a key."""
        with files.explained(self._path, "read state"):
            row = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None, "the reader is used between open and close only"
        return self._connection

    def _events(self, which: str, parameters: tuple[object, ...]) -> list[Event]:
        with files.explained(self._path, "read events"):
            rows = self._db.execute(f"{EVENTS} {which}", parameters).fetchall()
        return [self._codec.event(row) for row in rows]

    @contextlib.contextmanager
    def _snapshot(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Several statements that see one and the same state."""
        with files.explained(self._path, doing):
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.execute("ROLLBACK")


def _scan(row: tuple[Any, ...]) -> Scan:
    """A row of `blocks`: the columns stand in the order of the fields."""
    return Scan(**dict(zip(Scan.__struct_fields__, row, strict=True)))
