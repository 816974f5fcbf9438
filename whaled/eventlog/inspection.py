"""Inspection of every row of a log, decoded as its readers decode it, while a daemon runs or not.

Rows are read one page at a time, each page in its own transaction. The daemon can therefore checkpoint its write-ahead
log meanwhile, and at most one page is in memory, whatever the size of the log.
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
# At most this many findings are kept; further ones are only counted.
FINDINGS_LIMIT = 10_000

# Tables that may lose rows without a trace. `events` is not among them, because offsets have no holes.
TRACELESS = ("whales", "spends", "blocks", "state")
# Queries for the keys of tables that store them twice: from the table and from one of its indexes.
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
"""A callback that receives (rows read, rows in total)."""


def unread(table: str) -> str:
    """Return the fault of a table whose rows are partly hidden by a damaged page."""
    return f"table {table} cannot be read to its end"


class Counter(Struct, frozen=True):
    """The row of `log`.

    If the row is damaged, `problem` is the reason, `head` the greatest offset that the log proves to have existed, and
    `newest` the offset of the newest event held.
    """

    epoch: str
    head: int
    created_at: float
    problem: str = ""
    newest: int = 0

    @property
    def is_sound(self) -> bool:
        """Return whether the row is intact."""
        return not self.problem


class Inspected(Struct, kw_only=True):
    """The contents of a log and the faults found in it.

    `structure` holds SQLite's findings about the file. `damages` holds the first FINDINGS_LIMIT findings about rows,
    and `damaged` counts all damaged rows. `unverified` counts events without a checksum. `rows` counts the rows read;
    0 if only the structure was checked. `wrong_gaps` holds rows of `gaps` that no repair can have written. `unknown`
    holds the tables that may have lost rows without a trace, not even a key.
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
        """Return whether no fault was found."""
        return not self.structure and not self.damaged

    def found(self, damage: Damage) -> None:
        """Record damage, except for missing events inside a gap."""
        parts = [damage] if damage.problem != MISSING else outside(damage, self.gaps)
        for part in parts:
            self.damaged += part.rows
            last = merged([*self.damages[-1:], part])
            if len(last) == 1 or len(self.damages) < FINDINGS_LIMIT:
                self.damages[-1:] = last


def inspect(path: Path, progress: Progress, *, is_deep: bool) -> Inspected:
    """Inspect a log without changing it; a daemon may be using it.

    If not `is_deep`, only check the structure of the file and search for missing events. Raises EventLogError if the
    file does not exist, is not an event log, or cannot be read at all.
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
    """The steps of an inspection. Each may raise EventLogError if the file cannot be read at all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, BUSY_TIMEOUT_S, self._found)
        self._inspected: Inspected | None = None
        self._usable: set[str] = set()
        self._unread: list[str] = []

    @property
    def inspected(self) -> Inspected:
        """Return the findings so far."""
        assert self._inspected is not None, "begin first"
        return self._inspected

    def _found(self, damage: Damage) -> None:
        self.inspected.found(damage)

    def begin(self) -> None:
        """Read schema version, counter, gaps and oldest offset."""
        with files.explained(self._path, "read the event log"):
            version = schema.identify(self._db, self._path)
            if version == 0:
                raise EventLogError(
                    f"{self._path}: this database is empty, not an event log", reason=LogFailure.FOREIGN
                )
            self._usable = schema.usable_tables(self._db, version)
        counter = self._counter()
        gaps, wrong = self._gaps(counter.head) if version >= schema.CHECKSUMS_VERSION else ([], [])
        oldest = self._query("SELECT min(offset) FROM events WHERE offset > 0", (), "events")
        pruned = self._noted(schema.PRUNED_MARK)
        if not oldest and "events" in self._usable:  # events are then searched for offset by offset
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
        """Run SQLite's check of the file; with indexes it takes several times as long."""
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
        """Return whether the keys of all rows can be read, from the table or from an index."""
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
        """Return whether all keys can be read, each greater than the previous one."""
        last: Row = ()
        try:
            for row in self._db.execute(query):
                if row <= last:
                    return False
                last = row
        except (sqlite3.DatabaseError, TypeError):  # also if the index is missing or a value has the wrong type
            return False
        return True

    def holes(self) -> None:
        """Find missing events by their offsets, without decoding the other events."""
        query = (
            "SELECT offset, following FROM (SELECT offset, lead(offset, 1, ?1) OVER (ORDER BY offset) AS following "
            "FROM events WHERE offset BETWEEN 1 AND ?1) WHERE following > offset + 1"
        )
        for offset, following in self._query(query, (self.inspected.counter.head + 1,), "events"):
            self._found(of_events(offset + 1, following - 1, MISSING))

    def orphans(self) -> None:
        """Find whales without an event: retention removes such whales, so their events were lost.

        They are not listed if damaged or missing events already account for them.
        """
        query = (
            "SELECT w.txid FROM whales AS w WHERE NOT EXISTS (SELECT 1 FROM events AS e WHERE e.whale = w.id) "
            "ORDER BY w.id LIMIT ?"
        )
        whales = self._query(query, (FINDINGS_LIMIT,), "whales", "events")
        if len(whales) > sum(each.rows for each in self.inspected.damages if each.first):
            for (txid,) in whales:
                self._found(Damage(table=Table.WHALES, row=shown(txid), problem=NO_EVENT))

    def rows(self, progress: Progress) -> None:
        """Read every row."""
        found = self.inspected
        head = found.counter.head
        spends = (
            self._query("SELECT count(*) FROM spends NOT INDEXED", (), "spends") if "spends" in self._usable else []
        )
        total = head - found.oldest + 1 + (spends[0][0] if spends else 0)
        cursor = found.oldest - 1
        while cursor < head and {"events", "whales"} <= self._usable:
            cursor = self.page(cursor, head, PAGE_ROWS).through
            progress(cursor - found.oldest + 1, total)
        self._spends(lambda rows: progress(min(total, cursor - found.oldest + 1 + rows), total))
        self._small()
        progress(total, total)

    def _head(self, db: sqlite3.Connection) -> int:
        counter = self.inspected.counter
        return super()._head(db) if counter.is_sound else counter.head

    def _take(self, reading: Reading, row: Row) -> None:
        super()._take(reading, row)
        reading.events.clear()
        self.inspected.rows += 1
        self.inspected.unverified += row[7] is None  # the checksum

    def _spends(self, progress: Callable[[int], None]) -> None:
        # Compared as text, but bound as bytes: the outpoint may be invalid UTF-8.
        after = "(s.outpoint, s.whale) > (CAST(? AS TEXT), ?)"
        query = f"{self._queries.all_spends} WHERE {after} ORDER BY s.outpoint, s.whale"
        last: tuple[bytes, int] = (b"", 0)
        rows = 0
        while page := self._query(f"{query} LIMIT {PAGE_ROWS}", last, "spends", "whales"):
            for row in page:
                self._verify(Table.SPENDS, shown(row[1]), row, self._codec.spend)
            end = (page[-1][1], page[-1][2])
            if [type(each) for each in end] != [bytes, int] or end <= last:  # a page is in another page's place
                self._note_unread(Table.SPENDS)
                break
            last = end
            rows += len(page)
            progress(rows)

    def _small(self) -> None:
        for row in self._query(f"{self._queries.state} ORDER BY s.key", (), "state"):
            self._verify(Table.STATE, shown(row[0]), row, self._codec.state)
        for row in self._query(f"{self._queries.blocks} ORDER BY height", (), "blocks"):
            self._verify(Table.BLOCKS, f"height {row[0]}", row, self._codec.scan)

    def _verify(self, table: Table, name: str, row: Row, read: Callable[[Row], object]) -> None:
        self.inspected.rows += 1
        try:
            read(row)
        except DamagedRowError as error:
            self._found(Damage(table=table, row=name, problem=str(error)))

    def _counter(self) -> Counter:
        rows = self._query("SELECT created_at FROM log", (), "log")
        counter = schema.counter(self._db) if rows else None
        if counter is not None:
            return Counter(*counter, rows[0][0])
        held = self._query(
            "SELECT max(offset) FROM events WHERE offset BETWEEN 1 AND ?", (schema.MAX_OFFSET,), "events"
        )
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

    def _query(self, query: str, parameters: Sequence[object], *tables: str) -> list[Row]:
        """Return the rows of a query; none if a table is missing or damaged. Damage is recorded."""
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
