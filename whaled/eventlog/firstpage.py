"""Tells an event log whose first page is damaged from a file that is something else.

The first page says what the file is and where each table begins: without it SQLite reads nothing, and takes the log for
another program's file. The pages behind it hold rows with checksums, which no other file has.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import checksums, files, rawfile, schema

# Pages that are searched for a row of a log: the row of `log` is on the second page of every log, as it was made.
PAGES_SEARCHED = 1_000
DOUBTFUL = {LogFailure.CORRUPT, LogFailure.FOREIGN, LogFailure.NEWER_SCHEMA}
# A version that is this much newer is none.
VERSIONS_AHEAD = 1_000
REMEDY = (
    "its first page is damaged; repair cannot read it. Restore a backup (`whaled restore FILE`). Without one, move it "
    "away together with its -wal and -shm files: whaled begins a new log (a new epoch: clients are answered that their "
    "position is gone)"
)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise what was raised, or an EventLogError that names the first page if that is the reason."""
    try:
        yield
    except EventLogError as error:
        if error.reason in DOUBTFUL and is_damaged(path):
            raise damaged(path) from error
        raise


def damaged(path: Path) -> EventLogError:
    """The error for a log whose first page is damaged."""
    return EventLogError(f"{path}: {REMEDY}", reason=LogFailure.CORRUPT)


def is_damaged(path: Path) -> bool:
    """Whether this is an event log whose first page SQLite cannot use."""
    try:
        return not is_sound(path) and _holds_a_log(path)
    except OSError:
        return False


def is_sound(path: Path) -> bool:
    """True if SQLite reads the first page, of the write-ahead log if it is there, and it is that of an event log."""
    try:
        with closing(files.connect(path, "ro", 0.0)) as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            version = schema.version_of(db)
            db.execute("SELECT count(*), max(sql) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        return not files.is_damage(error)
    return application == schema.APPLICATION_ID and 1 <= version <= len(schema.MIGRATIONS) + VERSIONS_AHEAD


def _holds_a_log(path: Path) -> bool:
    with rawfile.RawFile.open(path) as raw:
        pages = range(2, min(raw.pages, PAGES_SEARCHED) + 1)
        return any(_is_of_a_log(record) for number in pages for record in raw.records(number))


def _is_of_a_log(record: rawfile.Record) -> bool:
    match record.values:
        case (None, bytes() as epoch, int() as head, int() | float() as created_at, int() as checksum):
            return schema.is_sound(epoch, head, float(created_at), checksum)
        case (None, bytes() as txid, bytes() as alert, bytes() as addresses, int() as checksum):
            return record.rowid is not None and checksum == checksums.of_whale(txid, alert, addresses)
    return False
