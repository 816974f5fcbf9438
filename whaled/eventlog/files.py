"""The files of the event log: the daemon lock, connections, file checks, and the translation of SQLite errors."""

import fcntl
import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from whaled.durable import sync_directory
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import schema

# SQLite's page cache per connection; the default is 2 MiB. A miss costs one copy of 4 KiB from the kernel's page cache.
# With a log of a million events, five connections that had read all of it took 35.0 MiB of memory with 512 KiB each and
# 41.1 MiB with 2 MiB; a commit took 0.30 ms and a page of 500 events 5 ms in both cases. mmap_size stays 0: with mapped
# pages a disk error ends the process (SIGBUS) instead of failing one query, and they count as memory of the process.
CACHE_KIB = 512

PRIVATE = 0o600  # alerts reveal what the operator watches

REASONS = {
    sqlite3.SQLITE_FULL: LogFailure.DISK_FULL,
    sqlite3.SQLITE_BUSY: LogFailure.LOCKED,
    sqlite3.SQLITE_LOCKED: LogFailure.LOCKED,
    sqlite3.SQLITE_CORRUPT: LogFailure.CORRUPT,
    sqlite3.SQLITE_NOTADB: LogFailure.CORRUPT,
    sqlite3.SQLITE_READONLY: LogFailure.READ_ONLY,
    sqlite3.SQLITE_PERM: LogFailure.READ_ONLY,
}

BUGS = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE)

ADVICE = {
    LogFailure.DISK_FULL: "Make room on its file system, then start whaled again; nothing stored was lost",
    LogFailure.LOCKED: "Another program (a sqlite3 shell, a backup) has locked it: end that program, then start whaled "
    "again",
    LogFailure.CORRUPT: "The file is damaged or is not an SQLite database. Stop whaled; `whaled repair` saves what can "
    "be read of it, `whaled restore` puts a backup in its place. If neither is possible, move it away together with "
    "its -wal and -shm files: whaled starts a new log with a new epoch, where clients' positions are no longer valid",
    LogFailure.READ_ONLY: "Allow the user whaled runs as to write to the file and its directory, then start whaled "
    "again",
    LogFailure.IO: "Check the kernel log for disk errors, and check for a disk quota or a file size limit",
}


OTHER_DAEMON = (
    "another whaled (process {holder}) has this event log open. Stop it first, or give each its own eventlog.path"
)
STOP_DAEMON = (
    "whaled runs (process {holder}) and has this event log open. Stop it first (`systemctl stop whaled.socket whaled`)"
)
MAX_LOCK_BYTES = 20  # a process id and a newline
FAULTS_SHOWN = 5  # at most this many faults of a damaged file are shown


@contextmanager
def explained(path: Path, doing: str, advice: Mapping[LogFailure, str] = ADVICE) -> Iterator[None]:
    """Convert SQLite errors into EventLogError with a reason and advice. Errors that indicate a bug pass unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # SQLite quotes damaged text of the schema in its message
        raise EventLogError(
            f"{path}: cannot {doing}: it contains text that is not valid UTF-8. {advice[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        ) from error
    except sqlite3.Error as error:
        code = _code_of(error)
        if code is None:
            # Raised by the sqlite3 module, not by SQLite: for invalid UTF-8, or for a misuse of the module.
            if not isinstance(error, sqlite3.OperationalError):
                raise
            code = sqlite3.SQLITE_CORRUPT
        if code & 0xFF in BUGS:
            raise
        reason = REASONS.get(code & 0xFF, LogFailure.IO)
        raise EventLogError(f"{path}: cannot {doing}: {error}. {advice[reason]}", reason=reason) from error


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether a statement failed because the file is damaged."""
    code = _code_of(error)
    return code is not None and REASONS.get(code & 0xFF) is LogFailure.CORRUPT


def _code_of(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    # SQLite has no separate code for an invalid number in the first page, nor for a missing table.
    return sqlite3.SQLITE_CORRUPT if str(error).startswith(("unsupported file format", "no such table: ")) else code


class DaemonLock:
    """The lock that limits a database to one whaled: an exclusive flock on a file next to it.

    The kernel releases the lock when the process ends. SQLite's own locks would also exclude the daemon's readers,
    backups and sqlite3 shells.
    """

    def __init__(self, database: Path, *, is_daemon: bool = True) -> None:
        self._database = database
        self._is_daemon = is_daemon
        self._path = database.with_name(database.name + ".lock")
        self._descriptor: int | None = None

    def take(self) -> None:
        """Acquire the lock. Raises EventLogError if another process holds it, or if the lock file is not usable."""
        try:
            descriptor = self._open()
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._check(os.fstat(descriptor))
        except EventLogError:
            os.close(descriptor)
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, MAX_LOCK_BYTES).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise self._unusable(error) from error
            raise EventLogError(
                f"{self._database}: {(OTHER_DAEMON if self._is_daemon else STOP_DAEMON).format(holder=holder)}",
                reason=LogFailure.LOCKED,
            ) from error
        # The process id only serves the message above: neither a full disk nor another owner may fail the start.
        with suppress(OSError):
            os.fchmod(descriptor, PRIVATE)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, PRIVATE)
        except FileExistsError:
            return os.open(self._path, flags)
        give_to(descriptor, owner(self._database))
        return descriptor

    def _check(self, found: os.stat_result) -> None:
        """Raise EventLogError unless the file can be a lock file: any other one would be truncated and overwritten."""
        if not stat.S_ISREG(found.st_mode):
            problem = "something that is not a regular file"
        elif found.st_nlink != 1:
            problem = f"a file with {found.st_nlink} names (hard links)"
        elif found.st_uid not in {0, os.geteuid(), owner(self._database)[0]}:
            problem = f"a file of another user (uid {found.st_uid})"
        elif found.st_size > MAX_LOCK_BYTES:
            problem = f"a file of {found.st_size} bytes"
        else:
            return
        raise EventLogError(
            f"{self._path}: expected the lock file of this event log, found {problem}. Find out who put it there, "
            "remove it while no whaled runs, then start whaled again",
            reason=LogFailure.IO,
        )

    def release(self) -> None:
        """Release the lock. The file stays: after a removal, two processes could lock different files of this name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _unusable(self, error: OSError) -> EventLogError:
        directory = self._database.parent
        if isinstance(error, FileNotFoundError):
            return EventLogError(
                f"{self._database}: the directory {directory} does not exist. "
                "Create it for the user whaled runs as, or set eventlog.path",
                reason=LogFailure.IO,
            )
        return EventLogError(
            f"{self._path}: cannot create or lock this file: {error.strerror}. "
            f"The user whaled runs as (uid {os.geteuid()}) must be able to write to {directory}; "
            "change its owner, or set eventlog.path",
            reason=LogFailure.READ_ONLY if isinstance(error, PermissionError) else LogFailure.IO,
        )


def ensure_exists(path: Path) -> None:
    """Create the file with mode 0600, whatever the umask, unless it exists. SQLite gives -wal and -shm the same mode.

    Call only while no connection is open: closing a descriptor of the file drops this process's SQLite locks on it.
    Raises EventLogError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    except FileExistsError:
        return
    except OSError as error:
        raise EventLogError(
            f"{path}: cannot create the event log: {error.strerror}. "
            f"The user whaled runs as (uid {os.geteuid()}) must be able to write to {path.parent}",
            reason=LogFailure.READ_ONLY if isinstance(error, PermissionError) else LogFailure.IO,
        ) from error
    try:
        os.fchmod(descriptor, PRIVATE)
    finally:
        os.close(descriptor)
    # SQLite syncs the contents of the file only; its directory entry has to be made durable here.
    sync_directory(path.parent)


def owner(path: Path) -> tuple[int, int]:
    """Return (uid, gid) of the database, or of its directory if the database does not exist yet."""
    try:
        found = path.stat()
    except FileNotFoundError:
        found = path.parent.stat()
    return found.st_uid, found.st_gid


def give_to(descriptor: int, ids: tuple[int, int]) -> None:
    """If run as root, give a file next to the log to the user whaled runs as.

    Only for descriptors of newly created files: an existing name in that user's directory may lead to any file.
    """
    if os.geteuid() == 0:
        os.fchown(descriptor, *ids)


def look_through(db: sqlite3.Connection, path: Path, advice: Mapping[LogFailure, str] = ADVICE) -> list[str]:
    """Check the whole file. Return the faults of single rows, which readers skip.

    Raises EventLogError(CORRUPT) if the structure is damaged, or sqlite3.Error if the check itself fails.
    """
    found = faults_of(db)
    if any(not is_of_a_row(fault) for fault in found):
        raise EventLogError(
            f"{path}: the event log is damaged: {'; '.join(found)}. {advice[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )
    return found


def faults_of(db: sqlite3.Connection, *, with_indexes: bool = False) -> list[str]:
    """Return differences from the schema, then the first faults that SQLite finds in the whole file.

    If `with_indexes`, each index entry is compared with its row. Raises sqlite3.Error if the check itself fails.
    """
    check = "integrity_check" if with_indexes else "quick_check"
    missing = schema.faults(db, schema.version_of(db))
    found = [line for (line,) in db.execute(f"PRAGMA {check}({FAULTS_SHOWN})")]
    lines = [line.decode("utf-8", "replace") if isinstance(line, bytes) else str(line) for line in found]
    return missing + ([] if lines == ["ok"] else lines)


def require_tables(db: sqlite3.Connection, path: Path, version: int, advice: Mapping[LogFailure, str] = ADVICE) -> None:
    """Raise EventLogError(CORRUPT) if tables, columns or indexes differ from those of a schema version."""
    missing = schema.faults(db, version)
    if missing:
        raise EventLogError(
            f"{path}: the event log is damaged: {'; '.join(missing)}. {advice[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )


def is_of_a_row(fault: str) -> bool:
    """Return whether a fault concerns a single row, which readers skip, and not the structure of the file.

    The texts come from SQLite's src/pragma.c: "NULL value in events.kind", "non-TEXT value in events.kind", "NUMERIC
    value in ...", "CHECK constraint failed in log".
    """
    return re.match(r"(NULL|non-\w+|\w+) value in |CHECK constraint failed in ", fault) is not None


def refuse_stray_wal(path: Path) -> None:
    """Raise EventLogError if the write-ahead log next to the database belongs to another one: SQLite would apply it.

    The header of a backup indicates rollback mode (https://www.sqlite.org/fileformat.html, 1.3.3) until a daemon opens
    it. A write-ahead log next to such a file was left by the log that the backup replaced. Call only while no
    connection is open, as for `ensure_exists`.
    """
    if not wal_bytes(path):
        return
    with path.open("rb") as file:
        versions = file.read(20)[18:]
    if versions == b"\x01\x01":
        raise EventLogError(
            f"{path}: {path.name}-wal next to it belongs to another log, over which this backup was copied. Move "
            f"{path.name}-wal and {path.name}-shm away, then start whaled again; `whaled restore` moves them itself",
            reason=LogFailure.CORRUPT,
        )


def open_to_write(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """Open the writing connection. Identify the file read-only first: a foreign database must stay unchanged."""
    probe = connect(path, "ro", busy_timeout_s)
    try:
        version = schema.identify(probe, path)
        if version:
            require_tables(probe, path, version)
    finally:
        probe.close()
    db = connect(path, "rw", busy_timeout_s)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # in WAL mode: an fsync at each commit
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = OFF")  # pruned data is public; overwriting it with zeros doubles the writes
    except BaseException:
        db.close()
        raise
    return db


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """Open a connection in autocommit mode for the calling thread. `mode` is SQLite's ro or rw; never creates."""
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=busy_timeout_s, isolation_level=None)
    try:
        db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        db.execute("PRAGMA temp_store = MEMORY")  # no files outside the log's directory; sorted results are small
    except UnicodeDecodeError as error:
        db.close()
        # SQLite reads the schema here and quotes the unreadable text; the module then fails to decode the message.
        damage = sqlite3.DatabaseError("malformed database schema: text that is not valid UTF-8")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage from error
    except BaseException:
        db.close()
        raise
    return db


def read_rows(db: sqlite3.Connection) -> None:
    """Make the connection return text as bytes: invalid UTF-8 must fail a single row, not the whole statement."""
    db.text_factory = bytes


def size_bytes(path: Path) -> int:
    """Return the size of the database and its write-ahead log in bytes; 0 if there is no database."""
    try:
        return path.stat().st_size + wal_bytes(path)
    except FileNotFoundError:
        return 0


def wal_bytes(path: Path) -> int:
    """Return the size of the write-ahead log in bytes; 0 if there is none."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except FileNotFoundError:
        return 0


def inode(path: Path) -> tuple[int, int]:
    """Return (device, inode) of a path; (0, 0) if it cannot be examined."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino
