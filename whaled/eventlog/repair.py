"""Removal of damaged rows from a log: the intact rows are written into a new file, and the damaged file is kept.

Nothing is changed in place, so a kill at any moment leaves either the old log or the new one. Epoch and offsets stay.
The removed events form gaps (table `gaps`): a client whose position lies before a gap receives `recovered: false`, all
other clients resume normally. A new epoch begins only if epoch and newest offset themselves are damaged.
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
    "away: whaled then starts a new log",
}


class Repaired(Struct, frozen=True):
    """The findings and the result of a repair; `salvaged` is None if the log was whole.

    `aside` is the path of the unchanged damaged log, `taken_out` that of the list of known lost rows. Both are None
    after a rehearsal.
    """

    inspected: Inspected
    salvaged: Salvaged | None = None
    aside: Path | None = None
    taken_out: Path | None = None

    @property
    def is_renewed(self) -> bool:
        """Return whether a new epoch began."""
        return self.salvaged is not None and self.salvaged.is_renewed


def repair(path: Path, *, now: float, progress: Progress) -> Repaired:
    """Remove the damaged rows of a log.

    Raises OperatorError if there is no file, EventLogError if a daemon uses the log or if nothing of it can be saved.
    """
    path = path.resolve()
    backup.require_file(path, "there is no event log here; name it with --config or --db-path")
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
    """Determine what `repair` would save, without changing anything; a daemon may be using the log.

    Raises EventLogError if the log cannot be read or if nothing of it can be saved.
    """
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
        # Without a name, the database is a temporary file, which SQLite removes at close.
        closing(sqlite3.connect("", isolation_level=None)) as db,
        closing(files.connect(path, "ro", backup.BUSY_TIMEOUT_S)) as reading,
    ):
        # This transaction keeps the daemon from overwriting the pages that are read here.
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
            db.execute("PRAGMA journal_mode = OFF")  # an incomplete file is deleted, never repaired
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
    """Raise EventLogError if no row was saved: an empty new log would only look like a repaired one."""
    if salvaged.is_renewed and not salvaged.saved:
        raise EventLogError(
            f"{path}: no row of it can be read. {ADVICE[LogFailure.CORRUPT]}", reason=LogFailure.CORRUPT
        )


def _name_aside(path: Path, now: float) -> Path:
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (path.with_name(f"{path.name}.damaged-{stamp}{f'-{n}' if n else ''}") for n in count())
    return next(name for name in names if not os.path.lexists(name))


def _replace(path: Path, copy: Path, aside: Path) -> None:
    """Replace the log by its repaired copy.

    The old log is linked to a second name first, then the copy takes the first name, so that a log always exists.
    """
    restore.gather(path)
    if files.wal_bytes(path):
        raise EventLogError(
            f"{path}: its write-ahead log cannot be copied into it. {ADVICE[LogFailure.LOCKED]}",
            reason=LogFailure.LOCKED,
        )
    with backup.file_errors(aside):
        try:
            os.link(path, aside)
        except OSError:  # a file system without hard links
            shutil.copy2(path, copy.with_name(aside.name))
            with backup.on_disk(copy.with_name(aside.name)):
                pass
            copy.with_name(aside.name).replace(aside)
    backup.put_in_place(copy, path)
    for suffix in restore.SIDE_FILES:
        # They are empty by now. A program that still has the old log open keeps using them; the new log must not.
        path.with_name(path.name + suffix).unlink(missing_ok=True)
