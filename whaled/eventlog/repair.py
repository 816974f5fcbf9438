"""Takes damaged rows out of a log: writes what is intact into a new file, and keeps the damaged one beside it.

Nothing is changed in place, so a kill at any moment leaves either the old log or the new one. Epoch and offsets stay.
What was taken out is a gap (table `gaps`): a client whose position lies before it is answered `recovered: false`, all
others resume as if nothing had been. Only where epoch and newest offset themselves are damaged does a new epoch begin.
"""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TextIO

from msgspec import Struct

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import backup, checksums, files, restore, schema
from whaled.eventlog.codec import Row
from whaled.eventlog.damage import Damage, Table
from whaled.eventlog.inspection import FINDINGS_LIMIT, Inspected, Inspection, Progress, inspect
from whaled.model import Scan

ADVICE = {
    **backup.ADVICE,
    LogFailure.CORRUPT: "So little of the file is left that nothing can be saved. Restore a backup, or move the file "
    "away: whaled begins a new log",
}
COMMIT_ROWS = 10_000
TWICE = "another event has the same transaction, kind and reference"
COLUMNS = {
    Table.EVENTS: ("offset", "kind", "ref", "at", "high_at", "body", "checksum", "txid", "alert", "addresses",
                   "whale_checksum", "whale"),
    Table.SPENDS: ("txid", "outpoint", "whale", "checksum"),
    Table.BLOCKS: (*Scan.__struct_fields__, "checksum"),
    Table.STATE: ("key", "value", "checksum"),
}  # fmt: skip


class Repaired(Struct, frozen=True):
    """What was found, and what was done: None for the files if there was nothing to do.

    `aside` is the damaged log as it was, `taken_out` lists the damaged rows, as far as they can be read.
    """

    inspected: Inspected
    epoch: str
    aside: Path | None = None
    taken_out: Path | None = None

    @property
    def is_renewed(self) -> bool:
        """Whether a new epoch began."""
        return self.epoch != self.inspected.counter.epoch


def repair(path: Path, *, now: float, progress: Progress) -> Repaired:
    """Take out what is damaged. Raises EventLogError if a daemon uses the log, or if nothing can be saved of it."""
    path = path.resolve()
    backup.require_file(path, "there is no event log here; --config or --db-path says where it is")
    lock = files.DaemonLock(path)
    lock.take()
    try:
        found = inspect(path, progress, is_deep=True)
        if found.is_whole:
            return Repaired(found, found.counter.epoch)
        with backup.directory_beside(path) as directory:
            return _repair(path, directory, now, progress)
    finally:
        lock.release()


def _repair(path: Path, directory: Path, now: float, progress: Progress) -> Repaired:
    copy, listed = directory / path.name, directory / "taken-out.jsonl"
    for file in (copy, listed):
        files.ensure_exists(file)
    with files.explained(path, "repair the event log", ADVICE):
        with (
            listed.open("w") as out,
            closing(files.connect(copy, "rw", backup.BUSY_TIMEOUT_S)) as db,
            closing(Salvage(path, db, out)) as salvage,
        ):
            db.execute("PRAGMA journal_mode = OFF")  # what breaks off here is thrown away
            db.execute("PRAGMA synchronous = OFF")
            schema.migrate(db, copy, now=now)
            salvage.open()
            salvage.begin()
            salvage.structure(with_indexes=True)
            salvage.rows(progress)
            epoch = salvage.finish(now)
        with closing(backup.open_alone(copy)) as db:
            files.look_through(db, copy)
    for file in (copy, listed):
        with backup.on_disk(file) as descriptor:
            files.give_to(descriptor, files.owner(path))
    aside = _name_aside(path, now)
    taken_out = aside.with_name(f"{aside.name}.jsonl")
    backup.put_in_place(listed, taken_out)
    _replace(path, copy, aside)
    return Repaired(salvage.inspected, epoch, aside, taken_out)


class Salvage(Inspection):
    """Writes each intact row into a new log, and each damaged one into a list."""

    def __init__(self, path: Path, db: sqlite3.Connection, out: TextIO) -> None:
        super().__init__(path)
        self._new = db
        self._out = out
        self._written = 0
        self._listed = 0

    def keep(self, table: Table, row: Row) -> None:
        """Write a row. Text was decoded once: it is UTF-8."""
        if self._written % COMMIT_ROWS == 0:
            if self._new.in_transaction:
                self._new.execute("COMMIT")
            self._new.execute("BEGIN")
        self._written += 1
        if table is Table.EVENTS:
            self._keep_event(row)
        elif table is Table.SPENDS:
            _, outpoint, whale, _ = row
            self._new.execute(
                "INSERT OR IGNORE INTO spends (outpoint, whale, checksum) "
                "SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM whales WHERE id = ?2)",
                (outpoint.decode(), whale, checksums.of_spend(outpoint, whale)),
            )
        elif table is Table.STATE:
            schema.put_state(self._new, row[0].decode(), row[1].decode())
        else:
            values = [value.decode() if isinstance(value, bytes) else value for value in row[:-1]]
            self._new.execute(
                f"INSERT INTO blocks VALUES ({', '.join('?' * (len(values) + 1))})",  # noqa: S608 - constants
                (*values, checksums.of_values(*values)),
            )

    def _keep_event(self, row: Row) -> None:
        offset, kind, ref, at, high_at, body, _, txid, alert, addresses, _, whale = row
        db = self._new
        db.execute(
            "INSERT OR IGNORE INTO whales (id, txid, alert, addresses, checksum) VALUES (?, ?, ?, ?, ?)",
            (whale, txid.decode(), alert.decode(), addresses.decode(), checksums.of_whale(txid, alert, addresses)),
        )
        checksum = checksums.of_event(offset, kind, ref, at, high_at, body, txid)
        stored = db.execute(
            "INSERT OR IGNORE INTO events (offset, whale, kind, ref, at, high_at, body, checksum) "
            "SELECT ?1, id, ?3, ?4, ?5, ?6, ?7, ?8 FROM whales WHERE id = ?2 AND txid = ?9",
            (offset, whale, kind.decode(), ref.decode(), at, high_at, body and body.decode(), checksum, txid.decode()),
        )
        if not stored.rowcount:
            self._found(Damage(table=Table.EVENTS, row=f"offset {offset}", problem=TWICE, first=offset, through=offset))
            self.lose(Table.EVENTS, row, TWICE)

    def lose(self, table: Table, row: Row, problem: str) -> None:
        """List a row: text as text where it is UTF-8, else as bytes in hex."""
        if self._listed < FINDINGS_LIMIT:
            self._listed += 1
            columns = {name: _json_value(value) for name, value in zip(COLUMNS[table], row, strict=True)}
            self._out.write(json.dumps({"table": table.value, "problem": problem, "row": columns}) + "\n")

    def finish(self, now: float) -> str:
        """Write epoch, newest offset and gaps. Returns the epoch."""
        found = self.inspected
        counter = found.counter
        epoch = counter.epoch if counter.is_sound else schema.new_epoch()
        db = self._new
        if not db.in_transaction:
            db.execute("BEGIN")
        db.execute("UPDATE log SET epoch = ?, head = ?", (epoch, counter.head))
        if counter.is_sound:
            db.execute("UPDATE log SET created_at = ?", (counter.created_at,))
        schema.seal_log(db)
        # Every offset from the oldest on that is not in the new file.
        (oldest,) = db.execute("SELECT min(offset) FROM events").fetchone()
        if oldest is not None:
            db.execute(
                "INSERT INTO gaps (first, through, found_at) SELECT offset + 1, following - 1, ?2 FROM "
                "(SELECT offset, lead(offset, 1, ?1) OVER (ORDER BY offset) AS following FROM events) "
                "WHERE following > offset + 1",
                (counter.head + 1, now),
            )
        db.execute("COMMIT")
        return epoch


def _json_value(value: object) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"hex": value.hex()}
    return value


def _name_aside(path: Path, now: float) -> Path:
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (path.with_name(f"{path.name}.damaged-{stamp}{f'-{n}' if n else ''}") for n in count())
    return next(name for name in names if not os.path.lexists(name))


def _replace(path: Path, copy: Path, aside: Path) -> None:
    """Give the old log a second name, then its first one to the new log: there is no moment without a log."""
    restore.gather(path)
    if files.wal_bytes(path):
        raise EventLogError(
            f"{path}: its write-ahead log cannot be brought into it. {ADVICE[LogFailure.LOCKED]}",
            reason=LogFailure.LOCKED,
        )
    with backup.file_errors(aside):
        try:
            os.link(path, aside)
        except OSError:  # a file system without links
            shutil.copy2(path, copy.with_name(aside.name))
            with backup.on_disk(copy.with_name(aside.name)):
                pass
            copy.with_name(aside.name).replace(aside)
    backup.put_in_place(copy, path)
    for suffix in restore.SIDE_FILES:
        # Empty by now. A program that still has the old log open goes on using them; the new log must not.
        path.with_name(path.name + suffix).unlink(missing_ok=True)
