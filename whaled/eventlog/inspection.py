"""Looks at every row of a log, as its readers do, beside a daemon or without one.

Rows are read a page at a time, each in a transaction of its own: the daemon's write-ahead log can be copied back
meanwhile, and of a log of any size no more than a page is in memory.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from msgspec import Struct

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import files, schema
from whaled.eventlog.codec import MISMATCH, Row, shown
from whaled.eventlog.damage import Damage, DamagedRowError, Table, merged, of_events
from whaled.eventlog.pages import MISSING, Pages, Reading

BUSY_TIMEOUT_S = 5.0
PAGE_ROWS = 1_000
# Findings that are kept; beyond it they are counted only.
FINDINGS_LIMIT = 10_000

Progress = Callable[[int, int], None]
"""Called with (rows read, rows in all)."""
Gaps = Sequence[tuple[int, int]]
"""First and last offsets of what `whaled repair` has taken out, ascending."""


class Counter(Struct, frozen=True):
    """The row of `log`. Where it is not what was written (`is_sound`), `head` is the newest offset held."""

    epoch: str
    head: int
    created_at: float
    is_sound: bool


class Inspected(Struct, kw_only=True):
    """What a log holds, and what is wrong with it.

    `structure` are SQLite's findings in the file. `damages` are those in rows, the first FINDINGS_LIMIT of them;
    `damaged` counts all. `unverified` counts events without a checksum. `rows` is 0 if rows were not looked at.
    """

    path: Path
    version: int
    counter: Counter
    oldest: int
    gaps: Gaps
    structure: list[str] = []
    damages: list[Damage] = []
    damaged: int = 0
    rows: int = 0
    unverified: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing was found."""
        return not self.structure and not self.damaged

    def found(self, damage: Damage) -> None:
        """Take note of damage, but of no gap."""
        parts = [damage] if damage.problem != MISSING else outside(damage, self.gaps)
        for part in parts:
            self.damaged += part.rows
            last = merged([*self.damages[-1:], part])
            if len(last) == 1 or len(self.damages) < FINDINGS_LIMIT:
                self.damages[-1:] = last


def outside(damage: Damage, gaps: Gaps) -> list[Damage]:
    """The parts of a range of events that are in no gap."""
    parts: list[Damage] = []
    first = damage.first
    for low, high in gaps:
        if high < first:
            continue
        if low > damage.through:
            break
        if low > first:
            parts.append(of_events(first, low - 1, damage.problem))
        first = high + 1
    if first <= damage.through:
        parts.append(of_events(first, damage.through, damage.problem))
    return parts


def inspect(path: Path, progress: Progress, *, is_deep: bool) -> Inspected:
    """Look at a log and change nothing; a daemon may use it. Not deep: at the structure of the file and for missing
    events. Raises OperatorError if there is no file, EventLogError if it is no event log or not even its beginning can
    be read.
    """
    inspection = Inspection(path)
    with files.explained(path, "read the event log"), closing(inspection):
        inspection.open()
        inspection.begin()
        if is_deep:
            inspection.rows(progress)
        else:
            inspection.holes()
        inspection.structure(with_indexes=is_deep)
    return inspection.inspected


class Inspection(Pages):
    """Reads all of a log. `keep` is called with each intact row, `lose` with each damaged one and what is wrong.

    Everything here may raise EventLogError where not even the beginnings of the file can be read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, BUSY_TIMEOUT_S, self._found)
        self._inspected: Inspected | None = None

    @property
    def inspected(self) -> Inspected:
        """What was found up to now."""
        assert self._inspected is not None, "begin first"
        return self._inspected

    def _found(self, damage: Damage) -> None:
        self.inspected.found(damage)

    def keep(self, table: Table, row: Row) -> None:
        """An intact row."""

    def lose(self, table: Table, row: Row, problem: str) -> None:
        """A damaged row, as far as it can be read."""

    def begin(self) -> None:
        """Read what the log says of itself."""
        with files.explained(self._path, "read the event log"):
            version = schema.identify(self._db, self._path)
        if version == 0:
            raise EventLogError(f"{self._path}: this database is empty, no event log", reason=LogFailure.FOREIGN)
        counter = self._counter()
        gaps: Gaps = []
        if version >= schema.CHECKSUMS_VERSION:
            gaps = self._try("SELECT first, through FROM gaps ORDER BY first") or []
        oldest = self._try("SELECT min(offset) FROM events WHERE offset > 0")
        self._inspected = Inspected(
            path=self._path,
            version=version,
            counter=counter,
            oldest=(oldest[0][0] if oldest else 1) or counter.head + 1,
            gaps=gaps,
        )
        if not counter.is_sound:
            self._found(Damage(table=Table.LOG, row="the counter", problem=MISMATCH))

    def structure(self, *, with_indexes: bool) -> None:
        """Let SQLite look through the file; with indexes that takes several times as long."""
        try:
            self.inspected.structure = files.faults_of(self._db, with_indexes=with_indexes)
        except sqlite3.DatabaseError as error:
            if not files.is_damage(error):
                with files.explained(self._path, "check the event log"):
                    raise
            self.inspected.structure = [str(error)]

    def holes(self) -> None:
        """Find missing events without reading the others."""
        query = (
            "SELECT offset, following FROM (SELECT offset, lead(offset, 1, ?1) OVER (ORDER BY offset) AS following "
            "FROM events WHERE offset BETWEEN 1 AND ?1) WHERE following > offset + 1"
        )
        for offset, following in self._try(query, (self.inspected.counter.head + 1,)) or []:
            self._found(of_events(offset + 1, following - 1, MISSING))

    def rows(self, progress: Progress) -> None:
        """Read every row."""
        found = self.inspected
        head = found.counter.head
        spends = self._try("SELECT count(*) FROM spends")
        of_all = head - found.oldest + 1 + (spends[0][0] if spends else 0)
        cursor = found.oldest - 1
        while cursor < head:
            cursor = self.page(cursor, head, PAGE_ROWS).through
            progress(cursor - found.oldest + 1, of_all)
        self._spends(lambda rows: progress(min(of_all, cursor - found.oldest + 1 + rows), of_all))
        self._small()
        progress(of_all, of_all)

    def _head(self, db: sqlite3.Connection) -> int:
        counter = self.inspected.counter
        return super()._head(db) if counter.is_sound else counter.head

    def _take(self, reading: Reading, row: Row) -> None:
        damages = len(reading.damages)
        super()._take(reading, row)
        reading.events.clear()
        self.inspected.rows += 1
        self.inspected.unverified += row[6] is None
        # One before it may be missing; the row itself is the last one noted.
        if len(reading.damages) > damages and reading.damages[-1].first == row[0]:
            self.lose(Table.EVENTS, row, reading.damages[-1].problem)
        else:
            self.keep(Table.EVENTS, row)

    def _spends(self, progress: Callable[[int], None]) -> None:
        if self.inspected.version < schema.SPENDS_VERSION:
            return
        # Compared as text, but bound as bytes: it may be no UTF-8.
        query = (
            f"{self._queries.spends} WHERE (s.outpoint, s.whale) > (CAST(? AS TEXT), ?) ORDER BY s.outpoint, s.whale"
        )
        last: tuple[bytes, int] = (b"", 0)
        rows = 0
        while page := self._try(f"{query} LIMIT {PAGE_ROWS}", last):
            for row in page:
                self._look(Table.SPENDS, shown(row[1]), row, self._codec.spend)
            last = (page[-1][1], page[-1][2])
            rows += len(page)
            progress(rows)

    def _small(self) -> None:
        version = self.inspected.version
        for row in self._try(f"{self._queries.state} ORDER BY s.key") or []:
            self._look(Table.STATE, shown(row[0]), row, self._codec.state)
        if version >= schema.BLOCKS_VERSION:
            for row in self._try(f"{self._queries.blocks} ORDER BY height") or []:
                self._look(Table.BLOCKS, f"height {row[0]}", row, self._codec.scan)

    def _look(self, table: Table, name: str, row: Row, read: Callable[[Row], object]) -> None:
        self.inspected.rows += 1
        try:
            read(row)
        except DamagedRowError as error:
            self._found(Damage(table=table, row=name, problem=str(error)))
            self.lose(table, row, str(error))
        else:
            self.keep(table, row)

    def _counter(self) -> Counter:
        rows = self._try("SELECT created_at FROM log")
        counter = schema.counter(self._db) if rows else None
        if counter is not None and rows:
            return Counter(*counter, rows[0][0], is_sound=True)
        newest = self._try("SELECT max(offset) FROM events WHERE offset BETWEEN 1 AND ?", (schema.MAX_OFFSET,))
        return Counter("", (newest[0][0] if newest else 0) or 0, 0.0, is_sound=False)

    def _try(self, query: str, parameters: Sequence[object] = ()) -> list[Row] | None:
        """The rows of a query, None if the file is damaged there; that is for SQLite's own check to name."""
        with files.explained(self._path, "read the event log"):
            try:
                return self._db.execute(query, tuple(parameters)).fetchall()
            except sqlite3.DatabaseError as error:
                if not files.is_damage(error):
                    raise
                return None
