"""The access database: one SQLite file beside the event log, for what must survive a restart and is not an event.

The daemon reads and writes it on one thread (`AccessStore`). Commands open it directly (`open_directly`), also while a
daemon runs: SQLite's locks order the writers, and the daemon notices another process's write (`AccessStore.changed`).
"""

import asyncio
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from whaled.auth import access_schema
from whaled.durable import sync_directory
from whaled.errors import AccessError

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

PRIVATE = 0o600
# The longest wait for another program that writes. The writes of whaled take milliseconds.
BUSY_TIMEOUT_S = 5.0
# At most this many jobs wait for the thread. An fsync takes 1 to 50 ms, so a job that waits behind this many would be
# late in any case.
MAX_WAITING = 1_000

# These codes mean a fault of the program or a constraint that the caller expects, not one of the file.
_PASSED_ON = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE)
_DAMAGED = (
    "Stop whaled and move this file away together with its -wal and -shm files. The revocations in it then no longer "
    "apply: retire the signing keys (`whaled keys retire`) if a revoked token may still be valid"
)
_REMEDIES = {
    sqlite3.SQLITE_FULL: "Make room on its file system",
    sqlite3.SQLITE_BUSY: "Another program has locked it: end that program",
    sqlite3.SQLITE_LOCKED: "Another program has locked it: end that program",
    sqlite3.SQLITE_READONLY: "Allow the user whaled runs as to write to the file and its directory",
    sqlite3.SQLITE_PERM: "Allow the user whaled runs as to write to the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "Run this as root or as the user whaled runs as",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}
_OTHERWISE = "Check the kernel log for disk errors, and check for a disk quota or a file size limit"


def beside(event_log: Path) -> Path:
    """Return the path of the access database that belongs to an event log."""
    resolved = event_log.resolve()
    return resolved.with_name(f"{resolved.stem}.access.db")


class Access(Protocol):
    """The access database as acts use it: `AccessStore` in the daemon, `Direct` in a command."""

    async def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which sees one state of the database. Raises AccessError."""
        ...

    async def write(self, work: Work[T]) -> T:
        """Return the result of `work`, in one transaction that is on the disk afterwards. Raises AccessError."""
        ...


class Database:
    """The open database. Use it on the thread that opened it only.

    `generation` counts the files that were put in its place while it was open.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._inode = _inode(path)
        self._version = self._data_version()
        self.generation = 0

    @classmethod
    def opened(cls, path: Path) -> "Database":
        """Open the database, and create the file and the missing tables. Raises AccessError."""
        with _explained(path, "open the access database"):
            return cls(path, _connection(path))

    def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which sees one state of the database. Raises AccessError."""
        with _explained(self.path, "read the access database"), _transaction(self._connection, "BEGIN"):
            return work(self._connection)

    def write(self, work: Work[T]) -> T:
        """Return the result of `work`, in one transaction that is on the disk afterwards. Raises AccessError."""
        with _explained(self.path, "write the access database"), _transaction(self._connection, "BEGIN IMMEDIATE"):
            return work(self._connection)

    def changed(self) -> bool:
        """Return whether another process has written since the last call, or replaced the file. Raises AccessError."""
        if _inode(self.path) != self._inode:
            # Another file has this name: it was moved away or restored. SQLite would go on with the old one unnoticed.
            replaced = Database.opened(self.path)
            self.close()
            self._connection, self._inode = replaced._connection, replaced._inode  # noqa: SLF001 - of this class
            self._version = replaced._version  # noqa: SLF001 - of this class
            self.generation += 1
            return True
        with _explained(self.path, "read the access database"):
            before, self._version = self._version, self._data_version()
        return self._version != before

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _data_version(self) -> int:
        # https://www.sqlite.org/pragma.html#pragma_data_version: changes with commits of other connections only.
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)


class AccessStore:
    """The access database for the event loop: every job runs on one thread, one after the other."""

    def __init__(self, database: Database, thread: ThreadPoolExecutor) -> None:
        self._database = database
        self._thread = thread
        self._waiting = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator["AccessStore"]:
        """Open the database until the end of the body, which waits for the jobs in the queue. Raises AccessError."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="access")
        loop = asyncio.get_running_loop()
        try:
            database = await loop.run_in_executor(thread, Database.opened, path)
            try:
                yield cls(database, thread)
            finally:
                await loop.run_in_executor(thread, database.close)
        finally:
            thread.shutdown(wait=False)

    @property
    def path(self) -> Path:
        """The path of the database."""
        return self._database.path

    @property
    def generation(self) -> int:
        """The number of files that were put in the place of the database."""
        return self._database.generation

    async def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which sees one state of the database. Raises AccessError."""
        return await self._run(lambda: self._database.read(work))

    async def write(self, work: Work[T]) -> T:
        """Return the result of `work`, in one transaction that is on the disk afterwards. Raises AccessError.

        A caller that is cancelled meanwhile does not undo the transaction.
        """
        return await self._run(lambda: self._database.write(work))

    async def changed(self) -> bool:
        """Return whether another process has written since the last call. Raises AccessError."""
        return await self._run(self._database.changed)

    async def _run(self, job: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise AccessError(f"{self.path}: {MAX_WAITING:,} requests wait for this database. Try again later")
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._thread, job)
        done.add_done_callback(self._ended)
        return await done

    def _ended(self, _: "asyncio.Future[T]") -> None:
        self._waiting -= 1


class Direct:
    """The database for an act of a command, which has no event loop to keep free."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which sees one state of the database. Raises AccessError."""
        return self._database.read(work)

    async def write(self, work: Work[T]) -> T:
        """Return the result of `work`, in one transaction that is on the disk afterwards. Raises AccessError."""
        return self._database.write(work)


@contextmanager
def open_directly(path: Path) -> Iterator[Database]:
    """Open the database for a command, also while a daemon has it open. Raises AccessError."""
    with closing(Database.opened(path)) as database:
        yield database


def _connection(path: Path) -> sqlite3.Connection:
    _ensure_exists(path)
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        _identify(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # in WAL mode: an fsync at each commit
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        with _transaction(connection, "BEGIN IMMEDIATE"):
            _identify(connection, path)  # again: another process may have been faster
            for statement in access_schema.TABLES:
                connection.execute(statement)
            if _number(connection, "application_id") == 0:
                connection.execute(f"PRAGMA application_id = {access_schema.APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {access_schema.VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _identify(connection: sqlite3.Connection, path: Path) -> None:
    """Raise AccessError for a database of another program or of a newer whaled."""
    application, version = _number(connection, "application_id"), _number(connection, "user_version")
    if application == 0 and version == 0:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            return
    if application != access_schema.APPLICATION_ID:
        raise AccessError(
            f"{path}: expected whaled's access database, found an SQLite database of another program; it was not "
            "changed. Move it away, or set eventlog.path to a file in another directory"
        )
    if version > access_schema.VERSION:
        raise AccessError(
            f"{path}: this access database has version {version}, made by a newer whaled; this one knows versions up "
            f"to {access_schema.VERSION} and did not change it. Run the newer whaled again"
        )


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    (number,) = connection.execute(f"PRAGMA {pragma}").fetchone()
    return int(number)


def _ensure_exists(path: Path) -> None:
    """Create the file with mode 0600, or check the existing one. SQLite gives -wal and -shm the same mode and owner."""
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise AccessError(f"{path}: cannot use the directory {path.parent}: {error.strerror}") from error
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)
    except FileExistsError:
        _check(path, path.lstat(), directory)
        return
    except OSError as error:
        raise AccessError(
            f"{path}: cannot create the access database: {error.strerror}. The user whaled runs as (uid "
            f"{os.geteuid()}) must be able to write to {path.parent}"
        ) from error
    try:
        os.fchmod(descriptor, PRIVATE)  # whatever the umask
        if os.geteuid() == 0:  # a command of root must leave a file that the daemon can write
            os.fchown(descriptor, directory.st_uid, directory.st_gid)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def _check(path: Path, found: os.stat_result, directory: os.stat_result) -> None:
    """Raise AccessError for a file that another user may have put here, or may change: that would undo revocations."""
    if not stat.S_ISREG(found.st_mode):
        raise AccessError(f"{path}: expected the access database, found something that is not a regular file")
    if found.st_uid not in {0, os.geteuid(), directory.st_uid}:
        raise AccessError(
            f"{path}: belongs to user {found.st_uid}, neither to root nor to the user whaled runs as. Find out who "
            "put it there"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise AccessError(f"{path}: others can read or change it (mode {mode:04o}); run: chmod 600 {path}")


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    """Convert SQLite's errors about the file into AccessError with a remedy."""
    try:
        yield
    except sqlite3.Error as error:
        code: int | None = getattr(error, "sqlite_errorcode", None)
        if str(error).startswith("no such table: "):
            code = sqlite3.SQLITE_CORRUPT
        if code is None or code & 0xFF in _PASSED_ON:
            raise
        raise AccessError(f"{path}: cannot {doing}: {error}. {_REMEDIES.get(code & 0xFF, _OTHERWISE)}") from error
    except OSError as error:
        raise AccessError(f"{path}: cannot {doing}: {error.strerror}") from error
