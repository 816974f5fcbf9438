"""The files of the event log: who may open them, how they are opened, and what SQLite's failures mean."""

import fcntl
import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import schema

# SQLite's page cache, for each connection; the default is 2 MiB. What it misses is in the kernel's page cache, one
# copy of 4 KiB away. In a log of a million events five connections that had read all over it took 35.0 MiB of memory
# with 512 KiB each and 41.1 with 2 MiB; a commit took 0.30 ms and a page of 500 events 5 ms with either. No mmap_size:
# a disk that fails would end the process (SIGBUS) where it now fails a query, and mapped pages count as our memory.
CACHE_KIB = 512

PRIVATE = 0o600  # alerts say what an operator watches: nobody else's business

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
    LogFailure.LOCKED: "Another program holds it locked (a sqlite3 shell, a backup): end that, then start whaled again",
    LogFailure.CORRUPT: "The file is damaged or is no SQLite database. Stop whaled; `whaled repair` saves what can be "
    "read of it, `whaled restore` puts a backup in its place. With neither, move it away together with its -wal and "
    "-shm files: whaled begins a new log (a new epoch: clients are answered that their position is gone)",
    LogFailure.READ_ONLY: "Let the user whaled runs as write to the file and its directory, then start whaled again",
    LogFailure.IO: "Look for disk errors in the kernel log, and for a disk quota or a file size limit",
}


OTHER_DAEMON = (
    "another whaled (process {holder}) has this event log open. Stop it first; two of them need an eventlog.path each"
)
STOP_DAEMON = (
    "whaled runs (process {holder}) and has this event log open. Stop it first (`systemctl stop whaled.socket whaled`)"
)
MAX_LOCK_BYTES = 20  # a process number and the end of its line
FAULTS_SHOWN = 5  # of a damaged file: the first ones tell enough


@contextmanager
def explained(path: Path, doing: str, advice: Mapping[LogFailure, str] = ADVICE) -> Iterator[None]:
    """Turn SQLite's failures into EventLogError with a reason and what to do. Bugs of ours stay what they are."""
    try:
        yield
    except UnicodeDecodeError as error:  # SQLite quotes damaged text of the schema in its message
        raise EventLogError(
            f"{path}: cannot {doing}: text in it is no UTF-8. {advice[LogFailure.CORRUPT]}", reason=LogFailure.CORRUPT
        ) from error
    except sqlite3.Error as error:
        code = _code_of(error)
        if code is None:
            # From the sqlite3 module, not from SQLite: text that is no UTF-8, or a misuse of the module.
            if not isinstance(error, sqlite3.OperationalError):
                raise
            code = sqlite3.SQLITE_CORRUPT
        if code & 0xFF in BUGS:
            raise
        reason = REASONS.get(code & 0xFF, LogFailure.IO)
        raise EventLogError(f"{path}: cannot {doing}: {error}. {advice[reason]}", reason=reason) from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether a statement failed because of a damaged file."""
    code = _code_of(error)
    return code is not None and REASONS.get(code & 0xFF) is LogFailure.CORRUPT


def _code_of(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    # SQLite has no code of its own for a number in the first page that it did not write, nor for a table that is gone.
    return sqlite3.SQLITE_CORRUPT if str(error).startswith(("unsupported file format", "no such table: ")) else code


class DaemonLock:
    """One whaled per database: an exclusive flock on a file beside it, let go by the kernel when the process ends.

    SQLite's own locks would do, but holding them would also shut out our reader, and a backup or a sqlite3 shell.
    """

    def __init__(self, database: Path, *, is_daemon: bool = True) -> None:
        self._database = database
        self._is_daemon = is_daemon
        self._path = database.with_name(database.name + ".lock")
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises EventLogError if another process has it, or if the directory does not allow it."""
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
        with suppress(
            OSError
        ):  # a courtesy to the reader of the message above: a full disk or another owner is no fault
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
        """Raises EventLogError if the name leads to a file that somebody else put there: it would be locked, truncated
        and overwritten.
        """
        if not stat.S_ISREG(found.st_mode):
            problem = "no regular file"
        elif found.st_nlink != 1:
            problem = f"one of {found.st_nlink} names (hard links) of a file"
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
        """Let go. The file stays: removing it would let two processes lock two files of one name."""
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
            f"The user whaled runs as (uid {os.geteuid()}) must be able to write in {directory}; "
            "change its owner, or set eventlog.path",
            reason=LogFailure.READ_ONLY if isinstance(error, PermissionError) else LogFailure.IO,
        )


def ensure_exists(path: Path) -> None:
    """Make the file if there is none: mode 0600 whatever the umask; SQLite gives -wal and -shm the same mode.

    Only before any connection is open: closing a descriptor of the file drops this process's SQLite locks on it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    except FileExistsError:
        return
    except OSError as error:
        raise EventLogError(
            f"{path}: cannot create the event log: {error.strerror}. "
            f"The user whaled runs as (uid {os.geteuid()}) must be able to write in {path.parent}",
            reason=LogFailure.READ_ONLY if isinstance(error, PermissionError) else LogFailure.IO,
        ) from error
    try:
        os.fchmod(descriptor, PRIVATE)
    finally:
        os.close(descriptor)
    # SQLite syncs what is in the file; that the file has a name is ours to make durable.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def owner(path: Path) -> tuple[int, int]:
    """Whose the log is, as (user, group): the owner of the database, of its directory before there is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        found = path.parent.stat()
    return found.st_uid, found.st_gid


def give_to(descriptor: int, ids: tuple[int, int]) -> None:
    """What root makes beside the log must not shut out the user whaled runs as. Only for files just made: a name
    in that user's directory may lead anywhere.
    """
    if os.geteuid() == 0:
        os.fchown(descriptor, *ids)


def look_through(db: sqlite3.Connection, path: Path, advice: Mapping[LogFailure, str] = ADVICE) -> list[str]:
    """Look through the whole file. Returns the faults of single rows, which readers skip.

    Raises EventLogError(CORRUPT) if the structure is damaged, or sqlite3.Error if it does not come that far.
    """
    found = faults_of(db)
    if any(not is_of_a_row(fault) for fault in found):
        raise EventLogError(
            f"{path}: the event log is damaged: {'; '.join(found)}. {advice[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )
    return found


def faults_of(db: sqlite3.Connection, *, with_indexes: bool = False) -> list[str]:
    """The first faults that SQLite finds in the whole file, those of its structure first. Raises sqlite3.Error if it
    does not come that far. With indexes each of their entries is compared with its row.
    """
    check = "integrity_check" if with_indexes else "quick_check"
    missing = schema.faults(db, schema.version_of(db))
    found = [line for (line,) in db.execute(f"PRAGMA {check}({FAULTS_SHOWN})")]
    lines = [line.decode("utf-8", "replace") if isinstance(line, bytes) else str(line) for line in found]
    return missing + ([] if lines == ["ok"] else lines)


def require_tables(db: sqlite3.Connection, path: Path, version: int, advice: Mapping[LogFailure, str] = ADVICE) -> None:
    """Raises EventLogError(CORRUPT) if a table, a column or an index is missing."""
    missing = schema.faults(db, version)
    if missing:
        raise EventLogError(
            f"{path}: the event log is damaged: {'; '.join(missing)}. {advice[LogFailure.CORRUPT]}",
            reason=LogFailure.CORRUPT,
        )


def is_of_a_row(fault: str) -> bool:
    """Whether a fault is that of a single row, which readers skip; the structure of the file is sound.

    The texts are those of SQLite's src/pragma.c: "NULL value in events.kind", "non-TEXT value in events.kind", "NUMERIC
    value in ...", "CHECK constraint failed in log".
    """
    return re.match(r"(NULL|non-\w+|\w+) value in |CHECK constraint failed in ", fault) is not None


def refuse_stray_wal(path: Path) -> None:
    """Raises EventLogError if the write-ahead log beside the database is another one's. SQLite would apply it.

    A backup is in rollback mode, by the versions in its header (https://www.sqlite.org/fileformat.html, 1.3.3), until a
    daemon has opened it: what lies beside it then was left by the log that it was copied over. Only before any
    connection is open, as above.
    """
    if not wal_bytes(path):
        return
    with path.open("rb") as file:
        versions = file.read(20)[18:]
    if versions == b"\x01\x01":
        raise EventLogError(
            f"{path}: {path.name}-wal beside it belongs to another log, the one this backup was copied over. Move "
            f"{path.name}-wal and {path.name}-shm away, then start whaled again; `whaled restore` does it by itself",
            reason=LogFailure.CORRUPT,
        )


def open_to_write(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """The writing connection. Looks first without writing, so that a database that is not ours stays as it is."""
    looking = connect(path, "ro", busy_timeout_s)
    try:
        version = schema.identify(looking, path)
        if version:
            require_tables(looking, path, version)
    finally:
        looking.close()
    db = connect(path, "rw", busy_timeout_s)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # WAL and FULL: fsync at each commit
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = OFF")  # what is pruned is public; zeroing it doubles the writing
    except BaseException:
        db.close()
        raise
    return db


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """A connection in autocommit mode, for the calling thread only. `mode` is SQLite's: ro or rw, never create."""
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=busy_timeout_s, isolation_level=None)
    try:
        db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        db.execute("PRAGMA temp_store = MEMORY")  # no files outside the log's directory; what is sorted is small
    except UnicodeDecodeError as error:
        db.close()
        # SQLite reads the schema here, and quotes what it cannot read: the module fails to decode the message.
        damage = sqlite3.DatabaseError("malformed database schema: text that is no UTF-8")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage from error
    except BaseException:
        db.close()
        raise
    return db


def read_rows(db: sqlite3.Connection) -> None:
    """From now on text comes as bytes: one value that is no UTF-8 must not fail the statement, only its row."""
    db.text_factory = bytes


def size_bytes(path: Path) -> int:
    """Bytes of the database and its write-ahead log on disk."""
    try:
        return path.stat().st_size + wal_bytes(path)
    except FileNotFoundError:
        return 0


def wal_bytes(path: Path) -> int:
    """Bytes of SQLite's write-ahead log, 0 if there is none."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except FileNotFoundError:
        return 0


def inode(path: Path) -> tuple[int, int]:
    """Which file a name stands for; (0, 0) if none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino
