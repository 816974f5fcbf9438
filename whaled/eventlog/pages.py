"""Pages of events in offset order, for replays. A client may request the whole log, whatever its size.

A page is bounded in rows and in bytes. It states up to which offset the log was read; damaged and missing rows count as
read.
"""

import sqlite3

from msgspec import Struct

from whaled.eventlog import files
from whaled.eventlog.codec import Row
from whaled.eventlog.damage import MISSING, UNREADABLE, Damage, DamagedRowError, of_events
from whaled.eventlog.rows import Rows, damaged_event
from whaled.model import Event

# A page ends once the JSON of its alerts and addresses reaches this size. 500 typical events have 450 KiB.
PAGE_BYTES = 1024 * 1024
# At most this many damaged rows are skipped to find a row with a valid time. After that the search stops, and a replay
# begins earlier than necessary.
NEAR_ROWS = 1_000


class OutOfOrderError(Exception):
    """SQLite returned rows out of order: a page of the file is in another page's place."""


class Page(Struct, frozen=True):
    """Intact events in ascending order.

    The log was read up to offset `through`, included. `is_whole` is True if no damaged or lost event was skipped.
    """

    events: list[Event]
    through: int
    is_whole: bool


class Pages(Rows):
    """Reads pages of events, and finds the offset at which a time begins."""

    def page(self, after: int, through: int, limit: int) -> Page:
        """Read rows with after < offset <= through: at most `limit`, and none after PAGE_BYTES are reached."""
        with self._snapshot("read events") as db:
            last = min(through, self._head(db))
            if after >= last:
                return Page([], after, is_whole=True)
            reading = Reading(after)
            try:
                self._read(db, reading, last, limit)
            except OutOfOrderError:
                self._read_one_by_one(db, reading, min(last, after + limit))
            except sqlite3.DatabaseError as error:
                if not files.is_damage(error):
                    raise
                self._read_one_by_one(db, reading, min(last, after + limit))
            damages = [each for each in reading.damages if not self._is_pruned(db, each, after)]
        for each in damages:
            self._report(each)
        return Page(reading.events, reading.cursor, is_whole=not damages)

    def _head(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT head FROM log").fetchone()[0])

    def _read(self, db: sqlite3.Connection, reading: "Reading", last: int, limit: int) -> None:
        query = f"{self._queries.events} WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset LIMIT ?"
        start, take, rows = reading.cursor, self._take, 0
        for rows, row in enumerate(db.execute(query, (start, last, limit)), 1):  # noqa: B007 - used behind the loop
            if row[0] <= reading.cursor:
                raise OutOfOrderError
            take(reading, row)
            if reading.size >= PAGE_BYTES:
                return
        if rows < limit:
            reading.skip_to(last + 1)

    def _read_one_by_one(self, db: sqlite3.Connection, reading: "Reading", last: int) -> None:
        """Continue after the rows already read, offset by offset: pages next to a damaged one may be intact."""
        query = f"{self._queries.events} WHERE e.offset = ?"
        for offset in range(reading.cursor + 1, last + 1):
            try:
                row = db.execute(query, (offset,)).fetchone()
            except sqlite3.DatabaseError as error:
                if not files.is_damage(error):
                    raise
                reading.damages.append(of_events(offset, offset, UNREADABLE))
                reading.cursor = offset
                continue
            if row is None:
                reading.skip_to(offset + 1)
            else:
                self._take(reading, row)
            if reading.size >= PAGE_BYTES:
                return

    def _take(self, reading: "Reading", row: Row) -> None:
        if row[0] != reading.cursor + 1:
            reading.skip_to(row[0])
        reading.cursor = row[0]
        try:
            reading.events.append(self._codec.event(row))
            reading.size += len(row[9]) + len(row[10])  # alert and addresses
        except DamagedRowError as error:
            reading.damages.append(damaged_event(row, str(error)))

    @staticmethod
    def _is_pruned(db: sqlite3.Connection, damage: Damage, after: int) -> bool:
        """Return whether retention has removed these events: they are missing, and so is every event before them."""
        if damage.problem != MISSING or damage.first != after + 1:
            return False
        return db.execute("SELECT 1 FROM events WHERE offset BETWEEN 1 AND ? LIMIT 1", (after,)).fetchone() is None

    def offset_before(self, at: float) -> int:
        """Return the greatest offset such that it and all offsets before it are older than `at` (Unix seconds).

        Returns one below the oldest offset if there is none. A damaged event has no time and is taken to be newer, so
        that a replay after the returned offset includes it.
        """
        with self._snapshot("look up a time") as db:
            (head,) = db.execute("SELECT head FROM log").fetchone()
            (low,) = db.execute("SELECT coalesce(min(offset) - 1, ?) FROM events WHERE offset > 0", (head,)).fetchone()
            high = head
            # high_at never decreases, so bisection is exact, and commits need not maintain an index.
            while low < high:
                middle = (low + high + 1) // 2
                found = self._high_at_near(db, low, middle, high)
                if found is None:
                    break
                offset, high_at = found
                if not low < offset <= high:
                    break  # the rows are out of order
                if high_at < at:
                    low = offset
                elif offset <= middle:
                    high = offset - 1
                else:
                    break
        return int(low)

    def _high_at_near(self, db: sqlite3.Connection, low: int, middle: int, high: int) -> tuple[int, float] | None:
        """Return offset and `high_at` of the first intact event from `middle` down to `low`, else up to `high`."""
        for clauses, bounds in (
            ("WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset DESC", (low, middle)),
            ("WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset", (middle, high)),
        ):
            for row in db.execute(f"{self._queries.columns} {clauses} LIMIT {NEAR_ROWS}", bounds):
                try:
                    found = self._codec.columns(row)
                except DamagedRowError as error:
                    self._report(damaged_event(row, str(error)))
                else:
                    return found
        return None


class Reading:
    """The state of a page while it is read."""

    __slots__ = ("cursor", "damages", "events", "size")

    def __init__(self, cursor: int) -> None:
        self.cursor = cursor
        self.events: list[Event] = []
        self.damages: list[Damage] = []
        self.size = 0

    def skip_to(self, offset: int) -> None:
        """Record the events between the cursor and an offset as missing, and move the cursor in front of the offset."""
        if offset > self.cursor + 1:
            self.damages.append(of_events(self.cursor + 1, offset - 1, MISSING))
            self.cursor = offset - 1
