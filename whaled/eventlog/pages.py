"""Events in the order of their offsets, for replays; one client may ask for all of a log of any size.

A page is bounded in rows and in bytes, and says how far the log was read, whatever was in it: rows that are damaged or
missing count as read.
"""

import sqlite3

from msgspec import Struct

from whaled.eventlog import files
from whaled.eventlog.codec import Row
from whaled.eventlog.damage import MISSING, UNREADABLE, Damage, DamagedRowError, of_events
from whaled.eventlog.rows import Rows, damaged_event
from whaled.model import Event

# Alerts and addresses of one page, as JSON; an event that is larger makes a page alone. 500 usual events are 450 KiB.
PAGE_BYTES = 1024 * 1024
# Damaged rows that are passed over to find one with a time. Beyond them a replay starts earlier than it had to.
NEAR_ROWS = 1_000


class OutOfOrderError(Exception):
    """SQLite gave rows in no order: a page of the file is in the place of another one."""


class Page(Struct, frozen=True):
    """Intact events, ascending. The log was read up to and with offset `through`; `is_whole` if nothing was skipped."""

    events: list[Event]
    through: int
    is_whole: bool


class Pages(Rows):
    """Pages of events, and where a time begins."""

    def page(self, after: int, through: int, limit: int) -> Page:
        """Read at most `limit` rows with after < offset <= through, and at most PAGE_BYTES of them."""
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
        """Go on behind what was read: where one page of the file is damaged, its neighbours may be sound."""
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
            reading.size += len(row[8]) + len(row[9])
        except DamagedRowError as error:
            reading.damages.append(damaged_event(row, str(error)))

    @staticmethod
    def _is_pruned(db: sqlite3.Connection, damage: Damage, after: int) -> bool:
        """Whether retention has removed these events: they are missing at the start, and so is all before them."""
        if damage.problem != MISSING or damage.first != after + 1:
            return False
        return db.execute("SELECT 1 FROM events WHERE offset BETWEEN 1 AND ? LIMIT 1", (after,)).fetchone() is None

    def offset_before(self, at: float) -> int:
        """The greatest offset that is, like all before it, older than `at`; one below the oldest if there is none.

        What is damaged has no time: it is taken to be younger, so that a replay after the offset comes across it.
        """
        with self._snapshot("look up a time") as db:
            (head,) = db.execute("SELECT head FROM log").fetchone()
            (low,) = db.execute("SELECT coalesce(min(offset) - 1, ?) FROM events WHERE offset > 0", (head,)).fetchone()
            high = head
            # high_at never falls: bisection is exact, and spares every commit an index.
            while low < high:
                middle = (low + high + 1) // 2
                found = self._high_at_near(db, low, middle, high)
                if found is None:
                    break
                offset, high_at = found
                if not low < offset <= high:
                    break  # the rows are in no order
                if high_at < at:
                    low = offset
                elif offset <= middle:
                    high = offset - 1
                else:
                    break
        return int(low)

    def _high_at_near(self, db: sqlite3.Connection, low: int, middle: int, high: int) -> tuple[int, float] | None:
        """Offset and `high_at` of the first intact event from `middle` down to `low`, else up to `high`."""
        for which, bounds in (
            ("WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset DESC", (low, middle)),
            ("WHERE e.offset > ? AND e.offset <= ? ORDER BY e.offset", (middle, high)),
        ):
            for row in db.execute(f"{self._queries.columns} {which} LIMIT {NEAR_ROWS}", bounds):
                try:
                    found = self._codec.columns(row)
                except DamagedRowError as error:
                    self._report(damaged_event(row, str(error)))
                else:
                    return found
        return None


class Reading:
    """How far a page is."""

    __slots__ = ("cursor", "damages", "events", "size")

    def __init__(self, cursor: int) -> None:
        self.cursor = cursor
        self.events: list[Event] = []
        self.damages: list[Damage] = []
        self.size = 0

    def skip_to(self, offset: int) -> None:
        """Note as missing what lies between the cursor and an offset."""
        if offset > self.cursor + 1:
            self.damages.append(of_events(self.cursor + 1, offset - 1, MISSING))
            self.cursor = offset - 1
