"""A read-only connection for one thread, which skips and reports damaged rows.

Each row is decoded as SQLite steps to it. The interpreter lock is released between two rows, so the event loop never
waits for more than one of them.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from whaled.eventlog import files, schema
from whaled.eventlog.codec import Codec, Row
from whaled.eventlog.damage import Damage, DamagedRowError, Report, of_events
from whaled.model import Scan

T = TypeVar("T")


class Queries:
    """SELECT statements with their columns in the order that `Codec` expects.

    For files of versions before 4, which have no checksums, the statements select NULL instead; for files of versions
    before 5, which have the repeat number in the ref, 1.
    """

    def __init__(self, version: int) -> None:
        of = "{}.checksum" if version >= schema.CHECKSUMS_VERSION else "NULL"
        event, whale = of.format("e"), of.format("w")
        repeat = "e.repeat" if version >= schema.REPEATS_VERSION else "1"
        columns = f"e.offset, e.kind, e.ref, {repeat}, e.at, e.high_at, e.body, {event}, w.txid"
        # A LEFT JOIN also returns events whose whale is missing, so that they can be reported and skipped.
        tables = "FROM events AS e LEFT JOIN whales AS w ON w.id = e.whale"
        self.events = f"SELECT {columns}, w.alert, w.addresses, {whale}, e.whale {tables}"
        self.columns = f"SELECT {columns} {tables}"
        self.whales = f"SELECT w.txid, w.alert, w.addresses, {whale} FROM whales AS w"  # noqa: S608 - constants
        self.spends = (
            f"SELECT w.txid, s.outpoint, s.whale, {of.format('s')} "  # noqa: S608 - constants
            "FROM spends AS s JOIN whales AS w ON w.id = s.whale"
        )
        # The inspection reads all rows of `spends`, also those whose whale is missing.
        self.all_spends = self.spends.replace(" JOIN ", " LEFT JOIN ")
        self.blocks = f"SELECT {', '.join(Scan.__struct_fields__)}, {of.format('b')} FROM blocks AS b"  # noqa: S608 - constants
        self.state = f"SELECT s.key, s.value, {of.format('s')} FROM state AS s"  # noqa: S608 - constants


class Rows:
    """A connection opened read-only, so that no bug in a reader can change the log."""

    def __init__(self, path: Path, busy_timeout_s: float, report: Report) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._report = report
        self._codec = Codec()
        self._queries = Queries(schema.NEWEST_VERSION)
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the connection. Raises EventLogError."""
        with files.explained(self._path, "open the event log for reading"):
            db = self._connection = files.connect(self._path, "ro", self._busy_timeout_s)
            self._queries = Queries(schema.version_of(db))
            files.read_rows(db)

    def close(self) -> None:
        """Close the connection. Safe after a failed open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def interrupt(self) -> None:
        """Interrupt the running query. This is the only method that other threads may call."""
        if self._connection is not None:
            self._connection.interrupt()

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None, "the reader is used between open and close only"
        return self._connection

    @contextmanager
    def _snapshot(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Run several statements against the same state of the database."""
        with files.explained(self._path, doing):
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.execute("ROLLBACK")

    def _intact(
        self,
        doing: str,
        query: str,
        parameters: tuple[object, ...],
        read: Callable[[Row], T],
        damaged: Callable[[Row, str], Damage],
    ) -> Iterator[T]:
        """Yield the rows of a query as decoded by `read`. Skip damaged rows and report each as `damaged` describes."""
        with files.explained(self._path, doing):
            for row in self._db.execute(query, parameters):
                try:
                    value = read(row)
                except DamagedRowError as error:
                    self._report(damaged(row, str(error)))
                else:
                    yield value


def damaged_event(row: Row, problem: str) -> Damage:
    """Return the damage for a row of `Queries.events` or `Queries.columns`."""
    return of_events(int(row[0]), int(row[0]), problem)
