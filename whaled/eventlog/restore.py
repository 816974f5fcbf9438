"""Replaces the event log by a backup, and decides whether clients' positions stay valid.

A position states that the client has received every event up to its offset. If a position were accepted wrongly, the
client would believe that it missed nothing. The epoch is therefore kept only if the replaced log proves that nothing
was lost: it has the epoch of the backup, ends at the same offset, and holds the same events. In all other cases a new
epoch begins, and every client receives `recovered: false` once.
"""

import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from whaled.errors import EventLogError, LogFailure, OperatorError
from whaled.eventlog import backup, checksums, files, firstpage, schema
from whaled.eventlog.codec import Codec, Row
from whaled.eventlog.damage import DamagedRowError
from whaled.eventlog.rows import Queries

SIDE_FILES = ("-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Restored:
    """The restored log. `renewed_because` is None if the epoch was kept; `aside` is the new path of the old log."""

    contents: backup.Contents
    renewed_because: str | None
    aside: Path | None


def restore(source: Path, path: Path, *, now: float, progress: backup.Progress) -> Restored:
    """Replace the log at `path`. Nothing is changed until the copy is complete, checked and synced to disk.

    Raises OperatorError if `source` is missing or is the log itself; EventLogError if a daemon uses the log, the backup
    is not usable, or the copy cannot be written.
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
    """Return the reason why the epoch must change; None if the replaced log proves that no event is lost.

    Raises EventLogError if the replaced file belongs to another program.
    """
    if not path.exists():
        return "there is no log to compare the backup with"
    try:
        files.refuse_stray_wal(path)
        with firstpage.named(path), files.explained(path, "read the replaced log"):
            with closing(files.connect(path, "ro", backup.BUSY_TIMEOUT_S)) as old:
                old.execute("BEGIN")
                reason = _difference(old, path, copy, contents)
            gather(path)
    except EventLogError as error:
        if error.reason not in {LogFailure.CORRUPT, LogFailure.NEWER_SCHEMA}:
            raise
        return f"the replaced log cannot be compared with it ({error.reason.value})"
    return reason


def _difference(old: sqlite3.Connection, path: Path, copy: sqlite3.Connection, contents: backup.Contents) -> str | None:
    if schema.identify(old, path) == 0:
        return "the replaced log is empty"
    if missing := schema.faults(old, schema.version_of(old)):
        return f"the replaced log is damaged ({'; '.join(missing)})"
    if schema.is_copy(old):
        return "the replaced log is itself a backup that was put in place"
    counter = schema.counter(old)
    if counter is None:
        return "the row of the replaced log with its epoch and newest offset is damaged"
    epoch, head = counter
    if epoch != contents.epoch:
        return f"the replaced log has another epoch ({epoch})"
    if head > contents.head:
        return f"the replaced log continues to offset {head}: events after {contents.head} are not in the backup"
    if head < contents.head:
        return f"the replaced log ends at offset {head}, before the backup: it has itself lost events"
    if not _hold_the_same(old, copy):
        return "the replaced log has other events under the same offsets"
    return None


def _hold_the_same(old: sqlite3.Connection, copy: sqlite3.Connection) -> bool:
    """Return whether the events of both logs agree, from the later of their oldest offsets on.

    Retention may have removed events from either of them. A damaged row in one proves no difference from the other: a
    client that resumes across it in the restored log receives `recovered: false`.
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
    # If retention has emptied one of them, there is nothing to compare; their newest offsets are equal.
    return True


class _Compared:
    """A cursor over the events of one of the two logs."""

    def __init__(self, db: sqlite3.Connection, oldest: int) -> None:
        self._codec = Codec()
        files.read_rows(db)
        queries = Queries(schema.version_of(db))
        self._rows = db.execute(f"{queries.columns} WHERE e.offset >= ? ORDER BY e.offset", (oldest,))
        self._row: Row | None = None
        self.step()

    def step(self) -> None:
        """Move to the next event."""
        self._row = self._rows.fetchone()

    @property
    def offset(self) -> int | None:
        """Return the offset of the event; None after the last one."""
        return None if self._row is None else self._row[0]

    @property
    def columns(self) -> tuple[object, ...]:
        """Return the columns that must be equal in both logs.

        They exclude `high_at`, which depends on what retention removed, and the checksum, which covers it.
        """
        assert self._row is not None
        offset, kind, ref, repeat, at, _, body, _, txid = self._row
        # As one text, whichever version of the schema either log has.
        is_number = isinstance(ref, bytes) and isinstance(repeat, int)
        return offset, kind, checksums.numbered(ref, repeat) if is_number else ref, at, body, txid

    @property
    def is_intact(self) -> bool:
        """Return whether the event is intact."""
        assert self._row is not None
        try:
            self._codec.columns(self._row)
        except DamagedRowError:
            return False
        return True


def gather(path: Path) -> None:
    """Copy a log's write-ahead log into its file, so that the file is complete by itself."""
    with suppress(sqlite3.Error), closing(files.connect(path, "rw", backup.BUSY_TIMEOUT_S)) as old:
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _move_aside(path: Path, now: float) -> Path | None:
    """Rename the old log together with its write-ahead log, which SQLite would apply to the restored log."""
    if not path.exists() and not any(_beside(path, suffix).exists() for suffix in SIDE_FILES):
        return None
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (path.with_name(f"{path.name}.replaced-{stamp}{f'-{n}' if n else ''}") for n in count())
    suffixes = ("", *SIDE_FILES)
    aside = next(name for name in names if not any(os.path.lexists(_beside(name, suffix)) for suffix in suffixes))
    try:
        # The database first: no daemon can start with a write-ahead log alone.
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
