"""Put a backup in the place of the event log, and decide whether clients' positions still hold.

A position says: everything up to this offset was seen. Honoured wrongly, it makes a client believe that it missed
nothing. So the epoch stays only where the log that is replaced proves that nothing was lost: it is the very log that
the backup was made of, it ends where the backup ends, and they hold the same events. Everywhere else a new epoch
begins, and every client is told once that its position is gone.
"""

import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from whaled.errors import EventLogError, LogFailure, OperatorError
from whaled.eventlog import backup, files, schema

SIDE_FILES = ("-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Restored:
    """The log as it is now. `renewed_because` is None if the epoch was kept; `aside` is where the old log went."""

    contents: backup.Contents
    renewed_because: str | None
    aside: Path | None


def restore(source: Path, path: Path, *, now: float, progress: backup.Progress) -> Restored:
    """Replace the log at `path`. Nothing is changed before the copy is whole, checked and on the disk.

    Raises OperatorError for files that cannot be meant; EventLogError if a daemon uses the log, or if the backup
    cannot be used or the copy not be written.
    """
    source, path = source.absolute(), path.resolve()
    backup.require_file(source, "name a file that `whaled backup` made")
    if path.exists() and source.samefile(path):
        raise OperatorError(f"{source}: this is the event log itself; name a backup of it")
    lock = files.DaemonLock(path)
    lock.take()
    try:
        with backup.directory_beside(path) as directory:
            copy = directory / path.name
            backup.copy_log(source, copy, progress, named=path)
            with files.explained(source, "check the copy", backup.ADVICE), closing(backup.open_alone(copy)) as db:
                contents = backup.checked(db, source)
                reason = _why_renewed(path, db, contents)
                schema.settle_copy(db, renew=reason is not None)
                (epoch,) = db.execute("SELECT epoch FROM log").fetchone()
            with backup.on_disk(copy) as descriptor:
                files.give_to(descriptor, files.owner(path))
            aside = _move_aside(path, now)
            backup.put_in_place(copy, path)
    finally:
        lock.release()
    return Restored(backup.Contents(epoch, contents.head, contents.events), reason, aside)


def _why_renewed(path: Path, copy: sqlite3.Connection, contents: backup.Contents) -> str | None:
    """What is missing for the proof, None if nothing is. Raises EventLogError if the old file is another program's."""
    if not path.exists():
        return "there is no log to compare the backup with"
    try:
        files.refuse_stray_wal(path)
        with files.explained(path, "read the log that is replaced"):
            with closing(files.connect(path, "ro", backup.BUSY_TIMEOUT_S)) as old:
                old.execute("BEGIN")
                reason = _difference(old, path, copy, contents)
            gather(path)
    except EventLogError as error:
        if error.reason not in {LogFailure.CORRUPT, LogFailure.NEWER_SCHEMA}:
            raise
        return f"the log that is replaced cannot be compared with it ({error.reason.value})"
    return reason


def _difference(old: sqlite3.Connection, path: Path, copy: sqlite3.Connection, contents: backup.Contents) -> str | None:
    if schema.identify(old, path) == 0:
        return "the log that is replaced is empty"
    if schema.is_copy(old):
        return "the log that is replaced is itself a backup that was put in place"
    epoch, head = old.execute("SELECT epoch, head FROM log").fetchone()
    if epoch != contents.epoch:
        return f"the log that is replaced has another epoch ({epoch})"
    if head > contents.head:
        return (
            f"the log that is replaced goes on to offset {head}: what came after {contents.head} is not in the backup"
        )
    if head < contents.head:
        return f"the log that is replaced ends at offset {head}, before the backup: it has lost events itself"
    if not _hold_the_same(old, copy):
        return "the log that is replaced has other events under the same offsets"
    return None


def _hold_the_same(old: sqlite3.Connection, copy: sqlite3.Connection) -> bool:
    """Compare the events that both hold: retention may have removed some from the older log since."""
    oldest = max(db.execute("SELECT coalesce(min(offset), 0) FROM events").fetchone()[0] for db in (old, copy))
    query = (
        "SELECT e.offset, w.txid, e.kind, e.ref, e.at, e.body FROM events AS e JOIN whales AS w ON w.id = e.whale "
        "WHERE e.offset >= ? ORDER BY e.offset"
    )
    rows = (db.execute(query, (oldest,)) for db in (old, copy))
    # Where retention has emptied one, the other has nothing to be compared with; the heads are the same.
    return all(one == other for one, other in zip(*rows, strict=False))


def gather(path: Path) -> None:
    """Bring the old log's write-ahead log into its file, so that one file is all of it."""
    with suppress(sqlite3.Error), closing(files.connect(path, "rw", backup.BUSY_TIMEOUT_S)) as old:
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _move_aside(path: Path, now: float) -> Path | None:
    """Rename the old log, its write-ahead log with it: SQLite would apply that one to the restored log."""
    if not path.exists() and not any(_beside(path, suffix).exists() for suffix in SIDE_FILES):
        return None
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (path.with_name(f"{path.name}.replaced-{stamp}{f'-{n}' if n else ''}") for n in count())
    suffixes = ("", *SIDE_FILES)
    aside = next(name for name in names if not any(os.path.lexists(_beside(name, suffix)) for suffix in suffixes))
    try:
        # The database first: a write-ahead log alone is nothing that a daemon could start with.
        for suffix in suffixes:
            with suppress(FileNotFoundError):
                _beside(path, suffix).rename(_beside(aside, suffix))
    except OSError as error:
        raise EventLogError(
            f"{path}: cannot be renamed to {aside}: {error.strerror}. {backup.ADVICE[LogFailure.READ_ONLY]}",
            reason=LogFailure.READ_ONLY,
        ) from error
    return aside


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
