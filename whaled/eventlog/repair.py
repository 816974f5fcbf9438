"""Takes damaged rows out of a log: writes what is intact into a new file, and keeps the damaged one beside it.

Nothing is changed in place, so a kill at any moment leaves either the old log or the new one. Epoch and offsets stay.
What was taken out is a gap (table `gaps`): a client whose position lies before it is answered `recovered: false`, all
others resume as if nothing had been. Only where epoch and newest offset themselves are damaged does a new epoch begin.
"""

import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from msgspec import Struct

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import backup, files, restore, schema
from whaled.eventlog.inspection import Inspected, Progress, inspect
from whaled.eventlog.rawfile import RawFile
from whaled.eventlog.salvage import Salvage, Salvaged

ADVICE = {
    **backup.ADVICE,
    LogFailure.CORRUPT: "So little of the file is left that nothing can be saved. Restore a backup, or move the file "
    "away: whaled begins a new log",
}


class Repaired(Struct, frozen=True):
    """What was found, and what was done: None if there was nothing to do.

    `aside` is the damaged log as it was, `taken_out` lists the rows that are lost, as far as they are known; both are
    None in a rehearsal.
    """

    inspected: Inspected
    salvaged: Salvaged | None = None
    aside: Path | None = None
    taken_out: Path | None = None

    @property
    def is_renewed(self) -> bool:
        """Whether a new epoch began."""
        return self.salvaged is not None and self.salvaged.is_renewed


def repair(path: Path, *, now: float, progress: Progress) -> Repaired:
    """Take out what is damaged. Raises EventLogError if a daemon uses the log, or if nothing can be saved of it."""
    path = path.resolve()
    backup.require_file(path, "there is no event log here; --config or --db-path says where it is")
    lock = files.DaemonLock(path, is_daemon=False)
    lock.take()
    try:
        found = inspect(path, progress, is_deep=True)
        if found.is_whole:
            return Repaired(found)
        with backup.directory_beside(path) as directory:
            return _repair(path, found, directory, now, progress)
    finally:
        lock.release()


def rehearse(path: Path, *, now: float, progress: Progress) -> Repaired:
    """Find out what `repair` would save, and change nothing; a daemon may use the log. Raises as `repair` does."""
    path = path.resolve()
    found = inspect(path, progress, is_deep=True)
    if found.is_whole:
        return Repaired(found)
    try:
        salvaged = _rehearse(path, found, now, progress)
    except OSError as error:
        raise EventLogError(
            f"{path}: cannot be read: {error.strerror}. {ADVICE[LogFailure.IO]}", reason=LogFailure.IO
        ) from error
    _require_rows(path, salvaged)
    return Repaired(found, salvaged)


def _rehearse(path: Path, found: Inspected, now: float, progress: Progress) -> Salvaged:
    with (
        files.explained(path, "look for what can be saved", ADVICE),
        # Without a name: SQLite puts it where temporary files go, and removes it.
        closing(sqlite3.connect("", isolation_level=None)) as db,
        closing(files.connect(path, "ro", backup.BUSY_TIMEOUT_S)) as reading,
    ):
        # While this goes on, the daemon does not write over what is read.
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        schema.migrate(db, path, now=now)
        with RawFile.open(path) as raw:
            return Salvage(raw, db, found).run(now, progress)


def _repair(path: Path, found: Inspected, directory: Path, now: float, progress: Progress) -> Repaired:
    copy, listed = directory / path.name, directory / "taken-out.jsonl"
    for file in (copy, listed):
        files.ensure_exists(file)
    restore.gather(path)
    with files.explained(path, "repair the event log", ADVICE), backup.file_errors(copy):
        with closing(files.connect(copy, "rw", backup.BUSY_TIMEOUT_S)) as db:
            db.execute("PRAGMA journal_mode = OFF")  # what breaks off here is thrown away
            db.execute("PRAGMA synchronous = OFF")
            schema.migrate(db, copy, now=now)
            with RawFile.open(path) as raw, listed.open("w") as out:
                salvage = Salvage(raw, db, found)
                salvaged = salvage.run(now, progress)
                salvage.lost.write(out)
        with closing(backup.open_alone(copy)) as db:
            files.look_through(db, copy)
    _require_rows(path, salvaged)
    for file in (copy, listed):
        with backup.on_disk(file) as descriptor:
            files.give_to(descriptor, files.owner(path))
    aside = _name_aside(path, now)
    taken_out = aside.with_name(f"{aside.name}.jsonl")
    backup.put_in_place(listed, taken_out)
    _replace(path, copy, aside)
    return Repaired(found, salvaged, aside, taken_out)


def _require_rows(path: Path, salvaged: Salvaged) -> None:
    """Raises EventLogError if nothing was left: a new log would only look like a repaired one."""
    if salvaged.is_renewed and not salvaged.saved:
        raise EventLogError(
            f"{path}: no row of it can be read. {ADVICE[LogFailure.CORRUPT]}", reason=LogFailure.CORRUPT
        )


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
