"""The list of the rows that a repair cannot save, each once, with its key and all columns that are known."""

import json
import math
import sqlite3
from collections.abc import Mapping
from typing import TextIO

from whaled.eventlog.codec import shown
from whaled.eventlog.damage import MISSING, Table

KEYS = {
    Table.EVENTS: "offset",
    Table.WHALES: "id",
    Table.SPENDS: "outpoint || ' ' || whale",
    Table.BLOCKS: "height",
    Table.STATE: "key",
}
SMALLEST, LARGEST = -(2**63), 2**63 - 1  # the range of an integer column


class Lost:
    """The list of lost rows, kept in a temporary table on disk: all rows of a large log may be lost."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        db.execute("PRAGMA temp_store = FILE")
        db.execute("ATTACH DATABASE '' AS scratch")
        db.execute(
            "CREATE TABLE scratch.lost (place TEXT, key, problem TEXT, line TEXT, whale INTEGER, "
            "rows INTEGER, PRIMARY KEY (place, key)) WITHOUT ROWID"
        )

    def add(
        self, table: Table, key: object, problem: str, columns: Mapping[str, object], *, whale: object = None,
        rows: int = 1,
    ) -> None:  # fmt: skip
        """List a row, unless one with its key is listed. `whale` is the row number of an event's whale."""
        line = json.dumps({name: json_value(value) for name, value in columns.items()})
        self._db.execute(
            "INSERT OR IGNORE INTO scratch.lost (place, key, problem, line, whale, rows) VALUES (?, ?, ?, ?, ?, ?)",
            (table.value, bounded(key), problem, line, bounded(whale) if isinstance(whale, int) else None, rows),
        )

    def has(self, table: Table, key: object) -> bool:
        """Return whether a row is listed."""
        query = "SELECT 1 FROM scratch.lost WHERE place = ? AND key = ?"
        return self._db.execute(query, (table.value, bounded(key))).fetchone() is not None

    def add_whales(self) -> None:
        """List the missing whales to which the lost events refer."""
        self._db.execute(
            "INSERT OR IGNORE INTO scratch.lost (place, key, problem, line, rows) SELECT 'whales', whale, ?, "
            "json_object('id', whale), 1 FROM scratch.lost WHERE place = 'events' AND whale IS NOT NULL "
            "AND whale NOT IN (SELECT id FROM whales)",
            (MISSING,),
        )

    def remove_saved(self) -> None:
        """Remove the rows that were saved later, from another page or from an index."""
        for table, key in KEYS.items():
            self._db.execute(
                f"DELETE FROM scratch.lost WHERE place = ? AND key IN (SELECT {key} FROM {table.value})",  # noqa: S608 - constants
                (table.value,),
            )

    def first_event(self) -> int | None:
        """Return the lowest listed offset, or None."""
        query = "SELECT min(key) FROM scratch.lost WHERE place = 'events' AND key > 0"
        first: int | None = self._db.execute(query).fetchone()[0]
        return first

    def rows(self, table: Table) -> int:
        """Return the number of listed rows of a table."""
        query = "SELECT coalesce(sum(rows), 0) FROM scratch.lost WHERE place = ?"
        return int(self._db.execute(query, (table.value,)).fetchone()[0])

    def write(self, out: TextIO) -> None:
        """Write each row as a line of JSON."""
        rows = self._db.execute("SELECT place, problem, line FROM scratch.lost ORDER BY place, key")
        out.writelines(
            json.dumps({"table": place, "problem": problem, "row": json.loads(line)}) + "\n"
            for place, problem, line in rows
        )


def spend_key(outpoint: bytes, whale: int) -> str:
    """Return the key of a row of `spends`."""
    return f"{shown(outpoint)} {whale}"


def bounded(value: object) -> object:
    """Clamp an integer to the range of an SQLite column; return other values unchanged."""
    return max(SMALLEST, min(value, LARGEST)) if isinstance(value, int) else value


def json_value(value: object) -> object:
    """Convert a column value for JSON: valid UTF-8 becomes text, other bytes hex, a non-finite number its repr."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"hex": value.hex()}
    return value
