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
from whaled.eventlog import files, firstpage, schema
from whaled.eventlog.codec import Row, shown
from whaled.eventlog.damage import (
    COUNTER,
    MISMATCH,
    MISSING,
    Damage,
    DamagedRowError,
    Gaps,
    Table,
    counter_problem,
    lost_before,
    merged,
    of_events,
    of_gap,
    outside,
)
from whaled.eventlog.pages import Pages, Reading

BUSY_TIMEOUT_S = 5.0
PAGE_ROWS = 1_000
# Findings that are kept; beyond it they are counted only.
FINDINGS_LIMIT = 10_000

# Tables of which rows may be lost without a trace; offsets have no holes, so that `events` is none of them.
TRACELESS = ("whales", "spends", "blocks", "state")
# The keys of those that have them twice, by the table and by an index of it.
KEYS = {
    "whales": (
        "SELECT id FROM whales NOT INDEXED ORDER BY id",
        "SELECT txid FROM whales INDEXED BY sqlite_autoindex_whales_1 ORDER BY txid",
    ),
    "spends": (
        "SELECT outpoint, whale FROM spends NOT INDEXED ORDER BY outpoint, whale",
        "SELECT whale, outpoint FROM spends INDEXED BY spends_by_whale ORDER BY whale, outpoint",
    ),
}
NO_EVENT = "there is no event about it any more, and retention did not remove it"

Progress = Callable[[int, int], None]
"""Called with (rows read, rows in all)."""


def unread(table: str) -> str:
    """The fault of a table of which a damaged page hides rows."""
    return f"table {table} cannot be read to its end"


class Counter(Struct, frozen=True):
    """The row of `log`. Where it is not what was written (`problem`), `head` is the newest offset there was, as far as
    the log proves it; `newest` is the newest one held.
    """

    epoch: str
    head: int
    created_at: float
    problem: str = ""
    newest: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether it is what was written."""
        return not self.problem


class Inspected(Struct, kw_only=True):
    """What a log holds, and what is wrong with it.

    `structure` are SQLite's findings in the file. `damages` are those in rows, the first FINDINGS_LIMIT of them;
    `damaged` counts all. `unverified` counts events without a checksum. `rows` is 0 if rows were not looked at.
    `wrong_gaps` are rows of `gaps` that no repair wrote. `unknown` are the tables that may have lost rows of which
    nothing is left, not even a key.
    """

    path: Path
    version: int
    counter: Counter
    oldest: int
    gaps: Gaps
    wrong_gaps: Gaps
    structure: list[str] = []
    damages: list[Damage] = []
    damaged: int = 0
    rows: int = 0
    unverified: int = 0
    unknown: set[str] = set()

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


def inspect(path: Path, progress: Progress, *, is_deep: bool) -> Inspected:
    """Look at a log and change nothing; a daemon may use it. Not deep: at the structure of the file and for missing
    events. Raises OperatorError if there is no file, EventLogError if it is no event log or not even its beginning can
    be read.
    """
    inspection = Inspection(path)
    with firstpage.named(path), files.explained(path, "read the event log"), closing(inspection):
        inspection.open()
        inspection.begin()
        if is_deep:
            inspection.rows(progress)
        else:
            inspection.holes()
        inspection.orphans()
        inspection.structure(with_indexes=is_deep)
    return inspection.inspected


class Inspection(Pages):
    """Reads all of a log. Everything here may raise EventLogError where not even the beginnings of the file can be
    read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, BUSY_TIMEOUT_S, self._found)
        self._inspected: Inspected | None = None
        self._usable: set[str] = set()
        self._unread: list[str] = []

    @property
    def inspected(self) -> Inspected:
        """What was found up to now."""
        assert self._inspected is not None, "begin first"
        return self._inspected

    def _found(self, damage: Damage) -> None:
        self.inspected.found(damage)

    def begin(self) -> None:
        """Read what the log says of itself."""
        with files.explained(self._path, "read the event log"):
            version = schema.identify(self._db, self._path)
            if version == 0:
                raise EventLogError(f"{self._path}: this database is empty, no event log", reason=LogFailure.FOREIGN)
            self._usable = schema.usable_tables(self._db, version)
        counter = self._counter()
        gaps, wrong = self._gaps(counter.head) if version >= schema.CHECKSUMS_VERSION else ([], [])
        oldest = self._try("SELECT min(offset) FROM events WHERE offset > 0", (), "events")
        pruned = self._noted(schema.PRUNED_MARK)
        if not oldest and "events" in self._usable:  # to be looked for one by one
            oldest = [((pruned or 0) + 1,)]
        self._inspected = Inspected(
            path=self._path,
            version=version,
            counter=counter,
            oldest=(oldest[0][0] if oldest else 0) or counter.head + 1,
            gaps=gaps,
            wrong_gaps=wrong,
        )
        if not counter.is_sound:
            problem = counter_problem(counter.problem, counter.newest, counter.head)
            self._found(Damage(table=Table.LOG, row=COUNTER, problem=problem))
        for row in wrong:
            self._found(of_gap(*row))
        for damage in lost_before(self._inspected.oldest, pruned, gaps):
            self._found(damage)

    def _gaps(self, head: int) -> tuple[Gaps, Gaps]:
        if self._usable.issuperset({"gaps", "events"}):
            try:
                return schema.gaps(self._db, head)
            except sqlite3.DatabaseError as error:
                if not files.is_damage(error):
                    raise
            self._note_unread("gaps")
        return [], []

    def structure(self, *, with_indexes: bool) -> None:
        """Let SQLite look through the file; with indexes that takes several times as long."""
        try:
            found = files.faults_of(self._db, with_indexes=with_indexes)
        except sqlite3.DatabaseError as error:
            if not files.is_damage(error):
                with files.explained(self._path, "check the event log"):
                    raise
            found = [str(error)]
        self.inspected.structure = found + self._unread
        if with_indexes and self.inspected.structure:
            self.inspected.unknown = {table for table in TRACELESS if not self._is_known(table)}

    def _is_known(self, table: str) -> bool:
        """Whether the key of each row can be read, of the table or of an index."""
        if table not in self._usable:
            return False
        if table not in KEYS:
            return self._is_sound(table)
        by_table, by_index = KEYS[table]
        return self._is_ascending(by_index) or self._is_ascending(by_table)

    def _is_sound(self, table: str) -> bool:
        try:
            return [row[0] for row in self._db.execute(f"PRAGMA quick_check({table})")] in (["ok"], [b"ok"])
        except sqlite3.DatabaseError:
            return False

    def _is_ascending(self, query: str) -> bool:
        """Whether all keys can be read, each greater than the one before."""
        last: Row = ()
        try:
            for row in self._db.execute(query):
                if row <= last:
                    return False
                last = row
        except (sqlite3.DatabaseError, TypeError):  # also where the index is missing, or a value is of a wrong type
            return False
        return True

    def holes(self) -> None:
        """Find missing events without reading the others."""
        query = (
            "SELECT offset, following FROM (SELECT offset, lead(offset, 1, ?1) OVER (ORDER BY offset) AS following "
            "FROM events WHERE offset BETWEEN 1 AND ?1) WHERE following > offset + 1"
        )
        for offset, following in self._try(query, (self.inspected.counter.head + 1,), "events"):
            self._found(of_events(offset + 1, following - 1, MISSING))

    def orphans(self) -> None:
        """Find whales without an event: retention forgets them, so events were lost. Those that damaged or missing
        events account for are not listed again.
        """
        query = (
            "SELECT w.txid FROM whales AS w WHERE NOT EXISTS (SELECT 1 FROM events AS e WHERE e.whale = w.id) "
            "ORDER BY w.id LIMIT ?"
        )
        whales = self._try(query, (FINDINGS_LIMIT,), "whales", "events")
        if len(whales) > sum(each.rows for each in self.inspected.damages if each.first):
            for (txid,) in whales:
                self._found(Damage(table=Table.WHALES, row=shown(txid), problem=NO_EVENT))

    def rows(self, progress: Progress) -> None:
        """Read every row."""
        found = self.inspected
        head = found.counter.head
        spends = self._try("SELECT count(*) FROM spends NOT INDEXED", (), "spends") if "spends" in self._usable else []
        of_all = head - found.oldest + 1 + (spends[0][0] if spends else 0)
        cursor = found.oldest - 1
        while cursor < head and {"events", "whales"} <= self._usable:
            cursor = self.page(cursor, head, PAGE_ROWS).through
            progress(cursor - found.oldest + 1, of_all)
        self._spends(lambda rows: progress(min(of_all, cursor - found.oldest + 1 + rows), of_all))
        self._small()
        progress(of_all, of_all)

    def _head(self, db: sqlite3.Connection) -> int:
        counter = self.inspected.counter
        return super()._head(db) if counter.is_sound else counter.head

    def _take(self, reading: Reading, row: Row) -> None:
        super()._take(reading, row)
        reading.events.clear()
        self.inspected.rows += 1
        self.inspected.unverified += row[6] is None

    def _spends(self, progress: Callable[[int], None]) -> None:
        # Compared as text, but bound as bytes: it may be no UTF-8.
        behind = "(s.outpoint, s.whale) > (CAST(? AS TEXT), ?)"
        query = f"{self._queries.all_spends} WHERE {behind} ORDER BY s.outpoint, s.whale"
        last: tuple[bytes, int] = (b"", 0)
        rows = 0
        while page := self._try(f"{query} LIMIT {PAGE_ROWS}", last, "spends", "whales"):
            for row in page:
                self._look(Table.SPENDS, shown(row[1]), row, self._codec.spend)
            end = (page[-1][1], page[-1][2])
            if [type(each) for each in end] != [bytes, int] or end <= last:  # a page is in the place of another one
                self._note_unread(Table.SPENDS)
                break
            last = end
            rows += len(page)
            progress(rows)

    def _small(self) -> None:
        for row in self._try(f"{self._queries.state} ORDER BY s.key", (), "state"):
            self._look(Table.STATE, shown(row[0]), row, self._codec.state)
        for row in self._try(f"{self._queries.blocks} ORDER BY height", (), "blocks"):
            self._look(Table.BLOCKS, f"height {row[0]}", row, self._codec.scan)

    def _look(self, table: Table, name: str, row: Row, read: Callable[[Row], object]) -> None:
        self.inspected.rows += 1
        try:
            read(row)
        except DamagedRowError as error:
            self._found(Damage(table=table, row=name, problem=str(error)))

    def _counter(self) -> Counter:
        rows = self._try("SELECT created_at FROM log", (), "log")
        counter = schema.counter(self._db) if rows else None
        if counter is not None:
            return Counter(*counter, rows[0][0])
        held = self._try("SELECT max(offset) FROM events WHERE offset BETWEEN 1 AND ?", (schema.MAX_OFFSET,), "events")
        newest = (held[0][0] if held else 0) or 0
        noted = [self._noted(key) or 0 for key in (schema.PRUNED_MARK, schema.VERIFIED_MARK)]
        return Counter("", max(newest, *noted), 0.0, problem=MISMATCH if rows else MISSING, newest=newest)

    def _noted(self, key: str) -> int | None:
        if "state" not in self._usable:
            return None
        try:
            return schema.noted_offset(self._db, key)
        except sqlite3.DatabaseError as error:
            if not files.is_damage(error):
                raise
            return None

    def _try(self, query: str, parameters: Sequence[object], *tables: str) -> list[Row]:
        """The rows of a query, none if a table is missing or the file is damaged there, which is noted."""
        if not self._usable.issuperset(tables):
            return []
        with files.explained(self._path, "read the event log"):
            try:
                return self._db.execute(query, tuple(parameters)).fetchall()
            except sqlite3.DatabaseError as error:
                if not files.is_damage(error):
                    raise
        self._note_unread(tables[0])
        return []

    def _note_unread(self, table: str) -> None:
        if unread(table) not in self._unread:
            self._unread.append(unread(table))
