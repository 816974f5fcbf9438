"""The schema of the database and its migrations, which run on the writer's thread.

- `log` has one row: the epoch and the offset counter. The counter outlives the events: it continues even after
  retention has removed all of them.
- `whales` holds each alert and its addresses once, while any event about the whale is held: an update stays complete
  when its alert has been pruned.
- `events` has one row per offset, without holes. `high_at` is the highest `at` up to that offset. It never decreases,
  so a time can be found by bisection even if the clock was set back.
- `spends` holds the outpoints that a whale's transaction spends, while the whale is held.
- `blocks` holds one row per scanned block.
- `state` holds short texts by key: the notes of one daemon, and the mark of a copy.
- `gaps` holds the offsets of damaged events that `whaled repair` removed. Any other hole in `events` is new damage.

`checksum` is NULL in rows that a version before 4 stored. `repeat` is 1, or counts the events of a whale with the same
kind and ref.
"""

import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import structlog

from whaled.bookmarks import MAX_OFFSET
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import checksums

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

APPLICATION_ID = 0x57484C44  # "WHLD" in the file header; `file whaled.db` shows it

EPOCH_BYTES = 12  # 96 random bits: in practice two databases never share an epoch

Migration = Callable[[sqlite3.Connection, float], None]


def create(db: sqlite3.Connection, now: float) -> None:
    """Create version 1: the tables, and the epoch, which lasts as long as they do."""
    db.execute("""
        CREATE TABLE log (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            epoch TEXT NOT NULL,
            head INTEGER NOT NULL CHECK (head >= 0),
            created_at REAL NOT NULL
        ) STRICT""")
    db.execute("""
        CREATE TABLE whales (
            id INTEGER PRIMARY KEY,
            txid TEXT NOT NULL UNIQUE,
            alert TEXT NOT NULL,
            addresses TEXT NOT NULL
        ) STRICT""")
    db.execute("""
        CREATE TABLE events (
            offset INTEGER PRIMARY KEY,
            whale INTEGER NOT NULL REFERENCES whales (id),
            kind TEXT NOT NULL,
            ref TEXT NOT NULL,
            at REAL NOT NULL,
            high_at REAL NOT NULL,
            body TEXT,
            UNIQUE (whale, kind, ref)
        ) STRICT""")
    db.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID")
    db.execute("INSERT INTO log (id, epoch, head, created_at) VALUES (1, ?, 0, ?)", (new_epoch(), now))


def new_epoch() -> str:
    """Return a random epoch of letters and digits: a leading "-" would turn it into an option on a command line."""
    return secrets.token_hex(EPOCH_BYTES)


BLOCKS_VERSION = 2  # the first version with the table `blocks`


def add_blocks(db: sqlite3.Connection, now: float) -> None:  # noqa: ARG001 - the signature of every step
    """Add version 2: the scanned blocks, and how completely the mempool was observed before each of them."""
    db.execute("""
        CREATE TABLE blocks (
            height INTEGER PRIMARY KEY,
            hash TEXT NOT NULL,
            mined_at REAL NOT NULL,
            scanned_at REAL NOT NULL,
            seen INTEGER NOT NULL,
            late INTEGER NOT NULL,
            missed_down INTEGER NOT NULL,
            missed_gap INTEGER NOT NULL,
            missed_never_relayed INTEGER NOT NULL,
            lead_s REAL
        ) STRICT""")


def add_spends(db: sqlite3.Connection, now: float) -> None:  # noqa: ARG001 - the signature of every step
    """Add version 3: the outpoints that each whale spends, by which conflicting whales are found."""
    db.execute("""
        CREATE TABLE spends (
            outpoint TEXT NOT NULL,
            whale INTEGER NOT NULL REFERENCES whales (id),
            PRIMARY KEY (outpoint, whale)
        ) STRICT, WITHOUT ROWID""")
    db.execute("CREATE INDEX spends_by_whale ON spends (whale)")


CHECKSUMS_VERSION = 4  # the first version with checksums and the table `gaps`


def add_checksums(db: sqlite3.Connection, now: float) -> None:  # noqa: ARG001 - the signature of every step
    """Add version 4: a checksum per row, and the table of gaps.

    Adding a column rewrites no row, so the migration takes milliseconds whatever the size of the log. Existing rows
    stay without checksums, except for the few in `log` and `state`.
    """
    for table in ("events", "whales", "spends", "blocks", "state", "log"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER")
    db.execute("""
        CREATE TABLE gaps (
            first INTEGER PRIMARY KEY,
            through INTEGER NOT NULL CHECK (through >= first),
            found_at REAL NOT NULL
        ) STRICT""")
    for key, value in db.execute("SELECT key, value FROM state").fetchall():
        put_state(db, key, value)
    seal_log(db)


REPEATS_VERSION = 5  # the first version with the column `repeat`

# Columns that hold another type than the table allows, as after a flipped bit, cannot be copied into a strict table.
# Then the end of a ref that repeats another one: "#2", "#3" ...
COPY_EVENTS = """
    INSERT OR IGNORE INTO events (offset, whale, kind, ref, repeat, at, high_at, body, checksum)
    SELECT
        offset, whale, kind,
        CASE WHEN is_numbered THEN substr(ref, 1, mark - 1) ELSE ref END,
        CASE WHEN is_numbered THEN CAST(substr(ref, mark + 1) AS INTEGER) ELSE 1 END,
        at, high_at, body, checksum
    FROM (
        SELECT *, instr(ref, '#') AS mark, ref GLOB '*#[1-9]*' AND NOT ref GLOB '*#*[^0-9]*' AS is_numbered
        FROM unnumbered_events
        WHERE typeof(whale) = 'integer' AND typeof(kind) = 'text' AND typeof(ref) = 'text' AND typeof(at) = 'real'
            AND typeof(high_at) = 'real' AND typeof(body) IN ('text', 'null')
            AND typeof(checksum) IN ('integer', 'null')
    )
    ORDER BY offset"""


def add_repeats(db: sqlite3.Connection, now: float) -> None:  # noqa: ARG001 - the signature of every step
    """Add version 5: the repeat number of an event as a column of its unique key, instead of an end of its ref.

    SQLite cannot change a key, so the table is copied. The checksums stay valid (`checksums.numbered`). An event with a
    column of a wrong type, which no reader accepts, is left out: from then on it is missing, which is damage as well.
    """
    db.execute("ALTER TABLE events RENAME TO unnumbered_events")
    db.execute("""
        CREATE TABLE events (
            offset INTEGER PRIMARY KEY,
            whale INTEGER NOT NULL REFERENCES whales (id),
            kind TEXT NOT NULL,
            ref TEXT NOT NULL,
            repeat INTEGER NOT NULL,
            at REAL NOT NULL,
            high_at REAL NOT NULL,
            body TEXT,
            checksum INTEGER,
            UNIQUE (whale, kind, ref, repeat)
        ) STRICT""")
    db.execute(COPY_EVENTS)
    db.execute("DROP TABLE unnumbered_events")


def seal_log(db: sqlite3.Connection) -> None:
    """Update the checksum of the row of `log`, if this schema version has one."""
    if has_checksums(db):
        for row in db.execute("SELECT CAST(epoch AS BLOB), head, created_at FROM log").fetchall():
            db.execute("UPDATE log SET checksum = ?", (checksums.of_log(*row),))


def has_checksums(db: sqlite3.Connection) -> bool:
    """Return whether the tables of this database have a checksum column, which `add_checksums` adds."""
    return bool(_number(db, "SELECT count(*) FROM pragma_table_info('log') WHERE name = 'checksum'"))


def counter(db: sqlite3.Connection) -> tuple[str, int] | None:
    """Return epoch and newest offset; None if their row is missing or damaged."""
    checksum = ", checksum" if has_checksums(db) else ""
    row = db.execute(f"SELECT CAST(epoch AS BLOB), head, created_at{checksum} FROM log").fetchone()  # noqa: S608 - constants
    return (row[0].decode(), row[1]) if row is not None and is_sound(*row) else None


def is_sound(epoch: object, head: object, created_at: object, *checksum: object) -> bool:
    """Return whether the row of `log` is intact. Without a checksum (versions before 4) only types are checked."""
    if not (isinstance(epoch, bytes) and epoch.isalnum() and isinstance(head, int) and isinstance(created_at, float)):
        return False
    expected = checksums.of_log(epoch, head, created_at) if 0 <= head <= MAX_OFFSET else None
    return expected is not None and all(each == expected for each in checksum)


def put_state(db: sqlite3.Connection, key: str, value: str) -> None:
    """Store a short text under a key."""
    db.execute(
        "INSERT INTO state (key, value, checksum) VALUES (?, ?, ?) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value, checksum = excluded.checksum",
        (key, value, checksums.of_values(key, value)),
    )


# Step n migrates version n to version n + 1. New steps go to the end; a released step never changes.
MIGRATIONS: tuple[Migration, ...] = (create, add_blocks, add_spends, add_checksums, add_repeats)
NEWEST_VERSION = len(MIGRATIONS)


def migrate(
    db: sqlite3.Connection, path: Path, *, now: float, steps: Sequence[Migration] = MIGRATIONS
) -> tuple[int, int]:
    """Migrate the database to the newest version in one transaction. Return the versions (before, after).

    Raises EventLogError for a database that was made by another program or a newer whaled, and leaves it unchanged.
    """
    with _without_foreign_keys(db), transaction(db):
        before = identify(db, path, newest=len(steps))
        if 0 < before < len(steps):
            # A large log takes minutes, in which nothing else is logged.
            logger.info("eventlog_migration_started", path=str(path), from_version=before, to_version=len(steps))
        for step in steps[before:]:
            step(db, now)
        if before < len(steps):
            # Pragmas take no parameters; both values are integer constants.
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {len(steps)}")
    return before, len(steps)


def identify(db: sqlite3.Connection, path: Path, *, newest: int = len(MIGRATIONS)) -> int:
    """Return the schema version, 0 for an empty database. Read-only; raises EventLogError as `migrate` does."""
    application = _number(db, "PRAGMA application_id")
    version = _number(db, "PRAGMA user_version")
    if application == 0 and version == 0 and _number(db, "SELECT count(*) FROM sqlite_schema") == 0:
        return 0
    if application != APPLICATION_ID:
        raise EventLogError(
            f"{path}: this SQLite database was not made by whaled (application id {application:#010x}, "
            f"whaled's is {APPLICATION_ID:#010x}); it was not changed. "
            "Set eventlog.path to whaled's own file, or to one that does not exist yet",
            reason=LogFailure.FOREIGN,
        )
    if version < 1:
        raise EventLogError(
            f"{path}: this event log has schema version {version}, which no whaled wrote: the file is damaged",
            reason=LogFailure.CORRUPT,
        )
    if version > newest:
        raise EventLogError(
            f"{path}: this event log has schema version {version}, made by a newer whaled; this one knows versions "
            f"up to {newest} and did not change it. Run the newer whaled again, or set eventlog.path to another file",
            reason=LogFailure.NEWER_SCHEMA,
        )
    return version


def faults(db: sqlite3.Connection, version: int) -> list[str]:
    """Return the differences between the tables, columns and indexes and those of this version. Read-only."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as pristine:
        for step in MIGRATIONS[:version]:
            step(pristine, 0.0)
        expected = _shape(pristine)
    found = _shape(db)
    lines: list[str] = []
    for (kind, name, table), columns in expected.items():
        if (kind, name, table) not in found:
            # The indexes of a missing table are missing too: report the table only.
            if kind == "table" or ("table", table, table) in found:
                lines.append(f"{kind} {name} is missing")
        elif absent := columns - found[kind, name, table]:
            lines.append(f"{kind} {name} lacks {', '.join(sorted(absent))}")
        elif extra := found[kind, name, table] - columns:
            lines.append(f"{kind} {name} has {', '.join(sorted(extra))}, which schema version {version} does not have")
    return lines


def usable_tables(db: sqlite3.Connection, version: int) -> set[str]:
    """Return the tables that exist with exactly the columns of this version."""
    bad = {line.split()[1] for line in faults(db, version) if line.startswith("table ")}
    return {table for (kind, _, table) in _shape(db) if kind == "table"} - bad


def _shape(db: sqlite3.Connection) -> dict[tuple[str, str, str], set[str]]:
    """Return the columns of each schema object by its type, name and table."""
    # Read as blobs and decoded here, so that the connection's text factory makes no difference.
    query = "SELECT CAST(type AS BLOB), CAST(name AS BLOB), CAST(tbl_name AS BLOB) FROM sqlite_schema"
    shape: dict[tuple[str, str, str], set[str]] = {}
    for row in db.execute(query).fetchall():
        kind, name, table = (bytes(value or b"").decode("utf-8", "replace") for value in row)
        columns: set[str] = set()
        if kind == "table":
            of_table = "SELECT CAST(name AS BLOB) FROM pragma_table_info(?)"
            columns = {bytes(column).decode("utf-8", "replace") for (column,) in db.execute(of_table, (name,))}
        shape[kind, name, table] = columns
    return shape


def gaps(db: sqlite3.Connection, head: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the first and last offsets of the gaps that `whaled repair` made, ascending, and those of invalid rows.

    The table has no checksums. A valid gap lies between 1 and the newest offset, after the previous gap, and contains
    no event.
    """
    sound: list[tuple[int, int]] = []
    wrong: list[tuple[int, int]] = []
    for first, through in db.execute("SELECT first, through FROM gaps ORDER BY first").fetchall():
        behind = sound[-1][1] if sound else 0
        is_gap = behind < first <= through <= head and not _holds(db, first, through)
        (sound if is_gap else wrong).append((first, through))
    return sound, wrong


def _holds(db: sqlite3.Connection, first: int, through: int) -> bool:
    """Return whether an event with one of these offsets can be read."""
    try:
        query = "SELECT 1 FROM events WHERE offset BETWEEN ? AND ?"
        return db.execute(query, (first, through)).fetchone() is not None
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        return False


def version_of(db: sqlite3.Connection) -> int:
    """Return the schema version in the file header, whichever program wrote it."""
    return _number(db, "PRAGMA user_version")


@contextmanager
def _without_foreign_keys(db: sqlite3.Connection) -> Iterator[None]:
    """Leave foreign keys unchecked: an event whose whale is lost must not prevent the copy of its table."""
    was_on = _number(db, "PRAGMA foreign_keys")
    db.execute("PRAGMA foreign_keys = OFF")
    try:
        yield
    finally:
        db.execute(f"PRAGMA foreign_keys = {was_on}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the body in one transaction, which is rolled back if it raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _number(db: sqlite3.Connection, query: str) -> int:
    (number,) = db.execute(query).fetchone()
    return int(number)
