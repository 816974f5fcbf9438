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
from whaled.eventlog import backup, files, firstpage, schema
from whaled.eventlog.codec import Codec, Row
from whaled.eventlog.damage import DamagedRowError
from whaled.eventlog.rows import Queries

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
    lock = files.DaemonLock(path, is_daemon=False)
    lock.take()
    try:
        with backup.directory_beside(path) as directory:
            copy = directory / path.name
            backup.copy_log(source, copy, progress, named=path)
            with files.explained(source, "check the copy", backup.ADVICE), closing(backup.open_alone(copy)) as db:
                contents = backup.checked(db, source)
                reason = _why_renewed(path, db, contents)
                schema.settle_copy(db, renew=reason is not None)
                counter = schema.counter(db)
                assert counter is not None, "it was checked"
            with backup.on_disk(copy) as descriptor:
                files.give_to(descriptor, files.owner(path))
            aside = _move_aside(path, now)
            backup.put_in_place(copy, path)
    finally:
        lock.release()
    return Restored(backup.Contents(*counter, contents.events, contents.missing), reason, aside)


def _why_renewed(path: Path, copy: sqlite3.Connection, contents: backup.Contents) -> str | None:
    """What is missing for the proof, None if nothing is. Raises EventLogError if the old file is another program's."""
    if not path.exists():
        return "there is no log to compare the backup with"
    try:
        files.refuse_stray_wal(path)
        with firstpage.named(path), files.explained(path, "read the log that is replaced"):
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
    if missing := schema.faults(old, schema.version_of(old)):
        return f"the log that is replaced is damaged ({'; '.join(missing)})"
    if schema.is_copy(old):
        return "the log that is replaced is itself a backup that was put in place"
    counter = schema.counter(old)
    if counter is None:
        return "the row of the log that is replaced which holds its epoch and newest offset is damaged"
    epoch, head = counter
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
    """Compare the events that both hold: retention may have removed some from the older log since.

    A row that is damaged in one of them proves nothing against the other: a client that asks across it in the restored
    log is answered that it is missing.
    """
    oldest = max(db.execute("SELECT coalesce(min(offset), 0) FROM events").fetchone()[0] for db in (old, copy))
    ours, theirs = (_Compared(db, oldest) for db in (old, copy))
    while ours.offset is not None and theirs.offset is not None:
        if ours.offset == theirs.offset:
            if ours.columns != theirs.columns and ours.is_intact and theirs.is_intact:
                return False
            ours.step()
            theirs.step()
        elif ours.offset < theirs.offset:
            if ours.is_intact:
                return False  # the backup never had it
            ours.step()
        else:
            theirs.step()
    # Where retention has emptied one, the other has nothing to be compared with; the heads are the same.
    return True


class _Compared:
    """Steps through the events of a log."""

    def __init__(self, db: sqlite3.Connection, oldest: int) -> None:
        self._codec = Codec()
        files.read_rows(db)
        queries = Queries(has_checksums=schema.has_checksums(db))
        self._rows = db.execute(f"{queries.columns} WHERE e.offset >= ? ORDER BY e.offset", (oldest,))
        self._row: Row | None = None
        self.step()

    def step(self) -> None:
        """Go on to the next event."""
        self._row = self._rows.fetchone()

    @property
    def offset(self) -> int | None:
        """The offset of the event; None behind the last."""
        return None if self._row is None else self._row[0]

    @property
    def columns(self) -> tuple[object, ...]:
        """What must be the same in both: all but `high_at`, which depends on what retention removed, and checksum."""
        assert self._row is not None
        offset, kind, ref, at, _, body, _, txid = self._row
        return offset, kind, ref, at, body, txid

    @property
    def is_intact(self) -> bool:
        """Whether the event is what was written."""
        assert self._row is not None
        try:
            self._codec.columns(self._row)
        except DamagedRowError:
            return False
        return True


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
