"""Backups of the event log, made while whaled continues to write: complete, checked, and marked as copies."""

import errno
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from whaled.durable import sync_directory
from whaled.errors import EventLogError, LogFailure, OperatorError
from whaled.eventlog import files, firstpage, schema

# One step of SQLite's backup (1 MiB). Between two steps progress is reported and an interrupt takes effect.
STEP_PAGES = 256
# The copy is synced every 4096 pages (16 MiB). With a single fsync at the end, the daemon's own fsyncs on the same disk
# waited for it: during a backup of 550 MiB the slowest commit took 119 and 153 ms, with this setting 36 and 55 ms.
SYNC_PAGES = 4096
BUSY_TIMEOUT_S = 5.0

ADVICE = {
    **files.ADVICE,
    LogFailure.DISK_FULL: "Make room on its file system; the event log itself was not changed",
    LogFailure.CORRUPT: "The file is damaged or is not an SQLite database; nothing was replaced. `whaled repair` saves "
    "what can be read of a damaged log",
    LogFailure.LOCKED: "Another program (a sqlite3 shell, a backup) has locked it: end that program, then try again",
    LogFailure.READ_ONLY: "Run this as root or as the user whaled runs as",
    LogFailure.IO: "Check that this user can read the file and write to its directory; check the kernel log for disk "
    "errors, and check for a disk quota or a file size limit",
}
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}

Progress = Callable[[int, int], None]
"""Called with (pages copied, pages in all)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a log: its epoch, its newest offset, and its number of events.

    `missing` is the number of offsets between the oldest and the newest event without an event; gaps that a repair
    made do not count.
    """

    epoch: str
    head: int
    events: int
    missing: int = 0


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A finished backup."""

    contents: Contents
    size_bytes: int
    seconds: float


def back_up(source: Path, target: Path, *, now: float, overwrite: bool, progress: Progress) -> BackedUp:
    """Copy the current state of the log. `target` appears once the copy is complete, checked and synced to disk.

    Raises OperatorError if `source` or `target` is not acceptable, EventLogError if the copy cannot be written or the
    log is damaged.
    """
    began = time.perf_counter()
    source, target = source.resolve(), target.absolute()
    require_file(source, "there is no event log here; name it with --config or --db-path")
    _refuse_target(source, target, overwrite=overwrite)
    with directory_beside(target) as directory:
        copy = directory / target.name
        with firstpage.named(source):
            copy_log(source, copy, progress, named=target)
        # Damage found in the copy comes from the source, so errors name the source.
        with files.explained(source, "check the copy of it", ADVICE), closing(open_alone(copy)) as db:
            contents = checked(db, source)
            with files.explained(target, "be written", ADVICE):
                schema.mark_copy(db, now)
        with on_disk(copy) as descriptor:
            size_bytes = os.fstat(descriptor).st_size
        _refuse_target(source, target, overwrite=overwrite)
        put_in_place(copy, target)
    return BackedUp(contents, size_bytes, time.perf_counter() - began)


def copy_log(source: Path, copy: Path, progress: Progress, *, named: Path) -> None:
    """Copy all events committed so far into a new file. Raises EventLogError, also if `source` is not an event log.

    Errors refer to the copy as `named`.
    """
    with files.explained(source, "read the event log", ADVICE):
        # Opened read-only. If root reads, SQLite gives a new -wal or -shm to the owner of the database. `immutable`
        # is not an option: it ignores the write-ahead log and the locks.
        reading = files.connect(source, "ro", BUSY_TIMEOUT_S)
    with closing(reading):
        with files.explained(source, "read the event log", ADVICE):
            # One snapshot for the whole copy; the writer does not wait for it. Without it, SQLite's backup would start
            # again after each of the writer's commits.
            reading.execute("BEGIN")
            if schema.identify(reading, source) == 0:
                raise EventLogError(f"{source}: this database is empty, not an event log", reason=LogFailure.FOREIGN)
        with file_errors(named):
            files.ensure_exists(copy)
            descriptor = os.open(copy, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with (
                files.explained(named, f"copy {source} into it", ADVICE),
                closing(files.connect(copy, "rw", BUSY_TIMEOUT_S)) as writing,
            ):
                writing.execute("PRAGMA journal_mode = OFF")  # an incomplete copy is deleted, never repaired
                writing.execute("PRAGMA synchronous = OFF")
                reading.backup(writing, pages=STEP_PAGES, progress=_in_slices(descriptor, progress))
        finally:
            os.close(descriptor)  # after the connection, because this close drops the connection's locks


def checked(db: sqlite3.Connection, source: Path) -> Contents:
    """Check a copy and return its contents. Damaged rows are accepted: readers skip them.

    Raises EventLogError(CORRUPT), which names `source`, if the structure or the counter of the copy is damaged.
    """
    files.look_through(db, source, ADVICE)
    counter = schema.counter(db)
    if counter is None:
        raise EventLogError(
            f"{source}: the event log is damaged: the row with its epoch and newest offset is missing or invalid. "
            f"{ADVICE[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )
    epoch, head = counter
    events, oldest = db.execute(
        "SELECT count(*), min(offset) FROM events WHERE offset BETWEEN 1 AND ?", (head,)
    ).fetchone()
    removed = 0
    if schema.has_checksums(db):
        gaps, _ = schema.gaps(db, head)
        removed = sum(through - first + 1 for first, through in gaps if first > (oldest or 0))
    missing = head - oldest + 1 - events - removed if events else 0
    return Contents(epoch, head, events, max(0, missing))


@contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """Make a private directory next to a file, on the same file system, and remove it on exit.

    No other user can create files in it, even if root works in the directory of the user whaled runs as.
    """
    with file_errors(path):
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def on_disk(path: Path) -> Iterator[int]:
    """Open a finished file and yield its descriptor; sync the file to disk on exit."""
    with file_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_in_place(path: Path, target: Path) -> None:
    """Rename a file to its final name, atomically and durably."""
    with file_errors(target):
        path.replace(target)
        sync_directory(target.parent)


def require_file(path: Path, remedy: str) -> None:
    """Raise OperatorError if the file does not exist or is not readable."""
    # The file is not opened for this test: closing it would drop the locks of this process's connections to it.
    if not path.is_file():
        raise OperatorError(f"{path}: no such file; {remedy}")
    if not os.access(path, os.R_OK):
        raise OperatorError(f"{path}: not readable by this user (uid {os.geteuid()}); run this as root or as its owner")


def open_alone(copy: Path) -> sqlite3.Connection:
    """Open a connection to a copy that no other program uses. The copy becomes a single file without -wal."""
    db = files.connect(copy, "rw", BUSY_TIMEOUT_S)
    try:
        db.execute("PRAGMA journal_mode = DELETE")
    except BaseException:
        db.close()
        raise
    return db


def _in_slices(descriptor: int, progress: Progress) -> Callable[[int, int, int], None]:
    synced = 0

    def step(_status: int, remaining: int, total: int) -> None:
        nonlocal synced
        done = total - remaining
        if done - synced >= SYNC_PAGES:
            synced = done
            with suppress(OSError):  # the fsync at the end reports it
                os.fdatasync(descriptor)
        progress(done, total)

    return step


def _refuse_target(source: Path, target: Path, *, overwrite: bool) -> None:
    own_files = {source.name + suffix for suffix in ("", "-wal", "-shm", ".lock")}
    if target.resolve().parent == source.parent and target.resolve().name in own_files:
        raise OperatorError(f"{target}: this is the event log's own file; name another one")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise OperatorError(f"{target.parent}: there is no such directory; make it, or name another file") from None
        return
    except OSError as error:
        raise OperatorError(f"{target}: cannot be examined: {error.strerror}; name another file") from error
    if not stat.S_ISREG(mode):
        raise OperatorError(f"{target}: exists and is not a regular file; name another file")
    if not overwrite:
        raise OperatorError(f"{target}: this file exists; name another one, or replace it with --force")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Convert the OSError of a file operation into EventLogError."""
    try:
        yield
    except OSError as error:
        reason = LogFailure.IO
        if error.errno in FULL:
            reason = LogFailure.DISK_FULL
        elif error.errno in FORBIDDEN:
            reason = LogFailure.READ_ONLY
        raise EventLogError(f"{path}: cannot be written: {error.strerror}. {ADVICE[reason]}", reason=reason) from error
