"""Copies every intact row of a damaged log into a new one, and lists every row that is lost.

Rows are read from the leaves of the file (`rawfile`), not through its B-trees: in every table, a damaged page costs
only the rows on it. Which rows these were is known from intact indexes, and from the offsets, which have no holes.
Whales are copied first, then events, which refer to them, then the other rows. A row of `spends` can be restored from
its index alone, except for its checksum.

Free pages belong to no tree. They hold rows that retention removed, or those of a table that was dropped. From them,
only events that retention has not removed are copied, and the whales of those events.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import islice
from typing import Any

from msgspec import Struct

from whaled.eventlog import checksums, schema
from whaled.eventlog.codec import Codec, shown
from whaled.eventlog.damage import MISSING, NO_GAP, UNREADABLE, DamagedRowError, Gaps, Table, of_events, outside
from whaled.eventlog.inspection import NO_EVENT, Inspected, Progress, unread
from whaled.eventlog.lost import Lost, bounded, spend_key
from whaled.eventlog.rawfile import RawFile, Record
from whaled.model import Scan

TWICE = "another event has the same transaction, kind and reference"
NO_WHALE_LEFT = "its whale is not in the log any more"
NOT_KNOWN = "more rows may be lost: which ones cannot be read"
BEYOND = "its offset is impossible"
COMMIT_ROWS = 10_000
SAMPLE = 5  # number of rows from which the shape of a page is determined
# A range of missing events up to this length is listed one line per event; a longer range takes a single line.
LISTED_RANGE = 100_000
NUMBERED = re.compile(rb"(.*)#([1-9][0-9]{0,17})", re.DOTALL)
OUTPOINT = re.compile(rb"[0-9a-f]{64}:[0-9]{1,10}")
TABLES = (Table.EVENTS, Table.WHALES, Table.SPENDS, Table.BLOCKS, Table.STATE)
# The numbers of stored columns of a row; rows of older versions have no checksum and so one column less. An event of a
# version before 5 has no repeat number either, but the end "#2" of its ref.
WHALE_COLUMNS = {4, 5}
EVENT_COLUMNS = {7, 8, 9}
SCAN_COLUMNS = {len(Scan.__struct_fields__), len(Scan.__struct_fields__) + 1}
REALS = frozenset({"mined_at", "scanned_at", "lead_s"})

# The values of a damaged record may have any type; `Codec` verifies them.
Values = tuple[Any, ...]


class Shape(IntEnum):
    """The tables and indexes to which a page may belong, judged by its rows.

    Stored per page, so that each pass decodes only the pages that concern it.
    """

    NONE = 0
    UNKNOWN = 1
    WHALES = 2  # and `log`
    EVENTS = 3  # and `blocks` and `state`
    SPENDS = 4
    INDEXES = 5


class Outcome(Struct, frozen=True):
    """The numbers of saved and lost rows of a table.

    `unverified` counts the saved rows that come from an index, which has no checksums. If `is_known` is False, more
    rows may be lost than are counted.
    """

    table: Table
    saved: int
    lost: int
    unverified: int
    is_known: bool


class Salvaged(Struct, frozen=True):
    """The new log: its epoch and newest offset, and the rows of each table."""

    epoch: str
    head: int
    is_renewed: bool
    outcomes: list[Outcome]

    @property
    def saved(self) -> int:
        """Return the number of saved rows in all tables."""
        return sum(each.saved for each in self.outcomes)

    @property
    def lost(self) -> int:
        """Return the number of lost rows in all tables."""
        return sum(each.lost for each in self.outcomes)


class Salvage:
    """Fills `db`, a new log without rows, from the pages of a damaged one. `lost` lists the rows that are lost."""

    def __init__(self, raw: RawFile, db: sqlite3.Connection, inspected: Inspected) -> None:
        self.lost = Lost(db)
        self._raw = raw
        self._db = db
        self._inspected = inspected
        self._codec = Codec()
        self._inserted = 0
        self._unverified = 0
        self._counters: list[tuple[int, str, float]] = []

    def run(self, now: float, progress: Progress) -> Salvaged:
        """Copy all rows that can be saved, and list the others. Raises sqlite3.Error or OSError."""
        db, raw = self._db, self._raw
        db.execute("CREATE TABLE scratch.freed (whale INTEGER PRIMARY KEY)")
        db.execute("BEGIN")
        used = [number for number in range(2, raw.pages + 1) if number not in raw.free]
        freed = sorted(number for number in raw.free if 1 < number <= raw.pages)
        shapes = bytearray(raw.pages + 1)
        passes: tuple[tuple[Sequence[int], Shape, Callable[[Record], None]], ...] = (
            (used, Shape.WHALES, self._whale_or_counter),
            (used, Shape.EVENTS, self._event_scan_or_note),
            (freed, Shape.WHALES, self._freed_whale),
            (freed, Shape.EVENTS, self._freed_event),
            (used, Shape.SPENDS, self._spend),
            (used, Shape.INDEXES, self._index_entry),
        )
        done, total = 0, sum(len(numbers) for numbers, _, _ in passes)
        for numbers, shape, take in passes:
            if take == self._spend:
                self._drop_whales_without_events()
            for number in numbers:
                done += 1
                progress(done, total)
                shapes[number] = shapes[number] or shape_of(raw.records(number))
                if shapes[number] in {shape, Shape.UNKNOWN}:
                    for record in raw.records(number):
                        take(record)
        return self._finish(now)

    def _insert(self, statement: str, values: tuple[object, ...]) -> int:
        """Insert a row; return the number of inserted rows: 0 if it already existed."""
        self._inserted += 1
        if self._inserted % COMMIT_ROWS == 0:
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")
        return self._db.execute(statement, values).rowcount

    # --- tables with row numbers ---

    def _whale_or_counter(self, record: Record) -> None:
        number, values = record
        match values:
            case (None, bytes() as txid, bytes() as alert, bytes() as addresses, *rest) if number and len(rest) < 2:
                self._keep_whale(number, txid, alert, addresses, *rest)
            case (None, bytes() as epoch, int() as head, int() | float() as at, *rest) if number == 1 and len(rest) < 2:
                if schema.is_sound(epoch, head, float(at), *rest):
                    self._counters.append((head, epoch.decode(), float(at)))

    def _keep_whale(self, number: int, txid: bytes, alert: bytes, addresses: bytes, checksum: Any = None) -> None:
        try:
            self._codec.whale(txid, alert, addresses, checksum)
            texts = (txid.decode(), alert.decode(), addresses.decode())
        except (DamagedRowError, UnicodeDecodeError) as error:
            columns = {"id": number, "txid": txid, "alert": alert, "addresses": addresses}
            self.lost.add(Table.WHALES, number, str(error), columns)
            return
        self._insert(
            "INSERT OR IGNORE INTO whales (id, txid, alert, addresses, checksum) VALUES (?, ?, ?, ?, ?)",
            (number, *texts, checksums.of_whale(txid, alert, addresses)),
        )

    def _freed_whale(self, record: Record) -> None:
        number, values = record
        match values:
            case (None, bytes() as txid, bytes() as alert, bytes() as addresses, int() as checksum) if number:
                if checksum == checksums.of_whale(txid, alert, addresses) and not self._is_held(number):
                    self._keep_whale(number, txid, alert, addresses, checksum)
                    self._insert("INSERT OR IGNORE INTO scratch.freed VALUES (?)", (number,))

    def _event_scan_or_note(self, record: Record) -> None:
        number, values = record
        if number is None:
            self._note(values)
        elif not values or values[0] is not None:
            return
        elif len(values) in EVENT_COLUMNS:
            self._keep_event(number, values)
        elif len(values) in SCAN_COLUMNS:
            self._keep_scan(number, values)

    def _freed_event(self, record: Record) -> None:
        offset, values = record
        if offset and len(values) in EVENT_COLUMNS - {7} and values[0] is None and isinstance(values[-1], int):
            pruned = self._noted(schema.PRUNED_MARK)
            first = pruned + 1 if pruned is not None else self._inspected.oldest
            if first <= offset <= self._inspected.counter.head:
                self._keep_event(offset, values, is_freed=True)

    def _keep_event(self, offset: int, values: Values, *, is_freed: bool = False) -> None:
        whale, kind, ref, repeat, at, high_at, body, checksum = event_columns(values)
        at, high_at = _real(at), _real(high_at)
        txid, *of_whale = self._whale(whale)
        problem = self._problem((offset, kind, ref, repeat, at, high_at, body, checksum, txid, *of_whale, whale))
        if problem is None and self._insert(
            "INSERT OR IGNORE INTO events (offset, whale, kind, ref, repeat, at, high_at, body, checksum) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(offset, whale, kind.decode(), ref.decode(), repeat, at, high_at, body and body.decode()),
                checksums.of_event(offset, kind, ref, repeat, at, high_at, body, txid),
            ),
        ):
            return
        if not is_freed:
            columns = {
                "offset": offset, "whale": whale, "txid": txid, "kind": kind, "ref": ref, "repeat": repeat, "at": at,
                "high_at": high_at, "body": body, "checksum": checksum,
            }  # fmt: skip
            # Either damaged, or not inserted because this event or a conflicting one already exists.
            self.lost.add(Table.EVENTS, offset, problem or TWICE, columns, whale=whale)

    def _problem(self, row: Values) -> str | None:
        """Return the problem of a row in the format of `Codec.event`, or None."""
        counter = self._inspected.counter
        last = counter.head if counter.is_sound else schema.MAX_OFFSET
        if not 1 <= row[0] <= last:
            return BEYOND
        try:
            self._codec.event(row)
            body = row[6]
            if body is not None:
                body.decode()
        except (DamagedRowError, UnicodeDecodeError) as error:
            return str(error)
        return None

    def _whale(self, number: object) -> Values:
        query = (
            "SELECT CAST(txid AS BLOB), CAST(alert AS BLOB), CAST(addresses AS BLOB), checksum FROM whales WHERE id = ?"
        )
        found = self._db.execute(query, (number,)).fetchone() if isinstance(number, int) else None
        return found or (None, None, None, None)

    def _keep_scan(self, height: int, values: Values) -> None:
        names = Scan.__struct_fields__
        row = [height, *values[1:]]
        checksum = row.pop() if len(row) > len(names) else None
        row = [_real(value) if name in REALS else value for name, value in zip(names, row, strict=True)]
        try:
            self._codec.scan((*row, checksum))
        except DamagedRowError as error:
            self.lost.add(Table.BLOCKS, height, str(error), dict(zip(names, row, strict=True)))
            return
        texts = [value.decode() if isinstance(value, bytes) else value for value in row]
        self._insert(
            f"INSERT OR IGNORE INTO blocks VALUES ({', '.join('?' * (len(texts) + 1))})",  # noqa: S608 - constants
            (*texts, checksums.of_values(*texts)),
        )

    def _drop_whales_without_events(self) -> None:
        """Delete whales without events: retention finds whales by the events it removes, and would never find these."""
        query = (
            "SELECT id, txid, alert, addresses, EXISTS (SELECT 1 FROM scratch.freed WHERE whale = id) FROM whales "
            "WHERE id > ? AND NOT EXISTS (SELECT 1 FROM events AS e WHERE e.whale = whales.id) ORDER BY id LIMIT 1000"
        )
        last = -(2**63)
        while rows := self._db.execute(query, (last,)).fetchall():
            for number, txid, alert, addresses, is_freed in rows:
                if not is_freed:
                    columns = {"id": number, "txid": txid, "alert": alert, "addresses": addresses}
                    self.lost.add(Table.WHALES, number, NO_EVENT, columns)
                self._db.execute("DELETE FROM whales WHERE id = ?", (number,))
            last = rows[-1][0]

    # --- tables that are an index, and indexes ---

    def _note(self, values: Values) -> None:
        match values:
            case (bytes() as key, bytes() as value, *rest) if len(rest) < 2:
                checksum = rest[0] if rest else None
            case _:
                return
        try:
            self._codec.state((key, value, checksum))
            name = key.decode()
        except (DamagedRowError, UnicodeDecodeError) as error:
            self.lost.add(Table.STATE, shown(key), str(error), {"key": key, "value": value})
            return
        self._insert(
            "INSERT OR IGNORE INTO state (key, value, checksum) VALUES (?, ?, ?)",
            (name, value.decode(), checksums.of_values(key, value)),
        )

    def _spend(self, record: Record) -> None:
        match record.values:
            case (bytes() as outpoint, int() as whale, *rest) if is_spend(outpoint, rest):
                self._keep_spend(outpoint, whale, rest[0] if rest else None)

    def _keep_spend(self, outpoint: bytes, whale: int, checksum: Any) -> None:
        problem = None if self._is_held(whale) else NO_WHALE_LEFT
        try:
            self._codec.spend((b"", outpoint, whale, checksum))
        except DamagedRowError as error:
            problem = str(error)
        if problem is not None:
            columns = {"outpoint": outpoint, "whale": whale}
            self.lost.add(Table.SPENDS, spend_key(outpoint, whale), problem, columns)
            return
        self._insert(
            "INSERT OR IGNORE INTO spends (outpoint, whale, checksum) VALUES (?, ?, ?)",
            (outpoint.decode(), whale, checksums.of_spend(outpoint, whale)),
        )

    def _index_entry(self, record: Record) -> None:
        """Use an index entry to list a row that is lost, or to restore a row of `spends`."""
        match record.values:
            case (int() as whale, bytes() as kind, bytes() as ref, *repeat, int() as offset) if len(repeat) < 2:
                if 1 <= offset <= self._inspected.counter.head and not self._has("events", "offset", offset):
                    columns = {"offset": offset, "whale": whale, "kind": kind, "ref": ref}
                    self.lost.add(Table.EVENTS, offset, UNREADABLE, columns, whale=whale)
            case (bytes() as txid, int() as number) if b":" not in txid:
                if number > 0 and not self._is_held(number):
                    self.lost.add(Table.WHALES, number, UNREADABLE, {"id": number, "txid": txid})
            case (int() as whale, bytes() as outpoint):
                self._spend_of_an_index(outpoint, whale)

    def _spend_of_an_index(self, outpoint: bytes, whale: int) -> None:
        key = spend_key(outpoint, whale)
        query = "SELECT 1 FROM spends WHERE outpoint = CAST(? AS TEXT) AND whale = ?"
        if self._db.execute(query, (outpoint, bounded(whale))).fetchone() or self.lost.has(Table.SPENDS, key):
            return
        # If all rows of the table can be read, an index entry without a row is itself damaged.
        lacks_rows = unread(Table.SPENDS) in self._inspected.structure
        if lacks_rows and self._is_held(whale) and OUTPOINT.fullmatch(outpoint):
            insert = "INSERT OR IGNORE INTO spends (outpoint, whale) VALUES (?, ?)"
            self._unverified += self._insert(insert, (outpoint.decode(), whale))
        else:
            self.lost.add(Table.SPENDS, key, UNREADABLE, {"outpoint": outpoint, "whale": whale})

    # --- the end ---

    def _finish(self, now: float) -> Salvaged:
        db = self._db
        epoch, head, created_at, is_renewed = self._counter
        first = self._first()
        holes = self._holes(first, head)
        self._list_missing(holes)
        self.lost.add_whales()
        self.lost.remove_saved()
        for row in self._inspected.wrong_gaps:
            self.lost.add(Table.GAPS, row[0], NO_GAP, dict(zip(("first", "through"), row, strict=True)))
        for table in self._inspected.unknown:
            self.lost.add(Table(table), "", NOT_KNOWN, {}, rows=0)
        db.execute(
            "UPDATE log SET epoch = ?, head = ?, created_at = coalesce(?, created_at)", (epoch, head, created_at)
        )
        schema.seal_log(db)
        db.executemany("INSERT INTO gaps (first, through, found_at) VALUES (?, ?, ?)", ((*hole, now) for hole in holes))
        schema.put_state(db, schema.PRUNED_MARK, str(first - 1))
        db.execute("COMMIT")
        tables = (*TABLES, Table.GAPS) if self._inspected.wrong_gaps else TABLES
        return Salvaged(epoch, head, is_renewed, [self._outcome(table) for table in tables])

    def _outcome(self, table: Table) -> Outcome:
        (saved,) = self._db.execute(f"SELECT count(*) FROM {table.value}").fetchone()  # noqa: S608 - a constant
        unverified = self._unverified if table is Table.SPENDS else 0
        return Outcome(table, saved, self.lost.rows(table), unverified, table not in self._inspected.unknown)

    @cached_property
    def _counter(self) -> tuple[str, int, float | None, bool]:
        """Return epoch, newest offset, creation time, and whether the epoch is new."""
        found = self._inspected.counter
        if found.is_sound:
            return found.epoch, found.head, found.created_at, False
        if self._counters:
            head, epoch, created_at = max(self._counters)
            return epoch, head, created_at, False
        (newest,) = self._db.execute("SELECT coalesce(max(offset), 0) FROM events").fetchone()
        notes = [self._noted(key) or 0 for key in (schema.PRUNED_MARK, schema.VERIFIED_MARK)]
        return schema.new_epoch(), max(newest, found.head, *notes), None, True

    def _first(self) -> int:
        """Return the first offset that retention has not removed."""
        pruned = self._noted(schema.PRUNED_MARK)
        if pruned is not None:
            return pruned + 1
        (first,) = self._db.execute("SELECT min(offset) FROM events").fetchone()
        gap = next((low for low, _ in self._inspected.gaps), None)
        known = [each for each in (first, self.lost.first_event(), gap) if each is not None]
        return min(known, default=self._counter[1] + 1)

    def _holes(self, first: int, head: int) -> Gaps:
        query = (
            "SELECT offset + 1, following - 1 FROM (SELECT offset, lead(offset, 1, ?2) OVER (ORDER BY offset) "
            "AS following FROM (SELECT ?1 AS offset UNION SELECT offset FROM events WHERE offset > ?1)) "
            "WHERE following > offset + 1"
        )
        return self._db.execute(query, (first - 1, head + 1)).fetchall()

    def _list_missing(self, holes: Gaps) -> None:
        """List the missing events of which only the offsets are known."""
        for low, high in holes:
            for part in outside(of_events(low, high, MISSING), self._inspected.gaps):
                if part.rows > LISTED_RANGE:
                    columns = {"offset": part.first, "through": part.through}
                    self.lost.add(Table.EVENTS, part.first, MISSING, columns, rows=part.rows)
                    continue
                for offset in range(part.first, part.through + 1):
                    self.lost.add(Table.EVENTS, offset, MISSING, {"offset": offset})

    def _noted(self, key: str) -> int | None:
        return schema.noted_offset(self._db, key)

    def _is_held(self, whale: int) -> bool:
        return self._has("whales", "id", whale)

    def _has(self, table: str, key: str, value: int) -> bool:
        query = f"SELECT 1 FROM {table} WHERE {key} = ?"  # noqa: S608 - constants
        return self._db.execute(query, (bounded(value),)).fetchone() is not None


def event_columns(values: Values) -> Values:
    """Return whale, kind, ref, repeat number, at, high_at, body and checksum of a stored row of `events`."""
    if len(values) == max(EVENT_COLUMNS):
        return values[1:]
    _, whale, kind, ref, at, high_at, body, *rest = values
    repeat = 1
    if isinstance(ref, bytes) and (match := NUMBERED.fullmatch(ref)):
        ref, repeat = match[1], int(match[2])
    return whale, kind, ref, repeat, at, high_at, body, rest[0] if rest else None


def is_spend(outpoint: bytes, rest: Sequence[object]) -> bool:
    """Return whether (outpoint, number, *rest) is a row of `spends`.

    An entry of the index on txids also consists of a text and a number, but its text has no colon.
    """
    return len(rest) == 1 or (not rest and b":" in outpoint)


def shape_of(records: Iterable[Record]) -> Shape:
    """Return the most common shape among the first rows of a page, of which some may be damaged."""
    shapes = Counter(_shape(record) for record in islice(records, SAMPLE))
    return shapes.most_common(1)[0][0] if shapes else Shape.UNKNOWN


def _shape(record: Record) -> Shape:
    number, values = record
    if number is not None:
        if len(values) in WHALE_COLUMNS:
            return Shape.WHALES
        return Shape.EVENTS if len(values) in EVENT_COLUMNS | SCAN_COLUMNS else Shape.UNKNOWN
    match values:
        case (bytes(), bytes(), *_):
            return Shape.EVENTS
        case (bytes() as outpoint, int(), *rest) if is_spend(outpoint, rest):
            return Shape.SPENDS
        case (bytes() | int(), bytes() | int(), *_):
            return Shape.INDEXES
    return Shape.UNKNOWN


def _real(value: Any) -> Any:
    """Convert an integer to float: SQLite stores a real number without a fraction as an integer."""
    return float(value) if isinstance(value, int) else value
