"""Distinguishes an event log whose first page is damaged from any other file.

The first page identifies the file and the root of each table. Without it SQLite reads nothing and reports a file of
another program. The pages after it hold rows with valid checksums, which no other file has.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import checksums, files, rawfile, schema

# At most this many pages are searched for a row of a log. Page 2 of every log holds the row of `log`.
PAGES_SEARCHED = 1_000
DOUBTFUL = {LogFailure.CORRUPT, LogFailure.FOREIGN, LogFailure.NEWER_SCHEMA}
# A version number more than this far ahead is not a plausible schema version.
VERSIONS_AHEAD = 1_000
REMEDY = (
    "its first page is damaged; repair cannot read it. Restore a backup (`whaled restore FILE`). Without one, move it "
    "away together with its -wal and -shm files: whaled starts a new log with a new epoch, where clients' positions "
    "are no longer valid"
)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Replace an EventLogError of the body by one that names the first page, if that page is the cause."""
    try:
        yield
    except EventLogError as error:
        if error.reason in DOUBTFUL and is_damaged(path):
            raise damaged(path) from error
        raise


def damaged(path: Path) -> EventLogError:
    """Return the error for a log whose first page is damaged."""
    return EventLogError(f"{path}: {REMEDY}", reason=LogFailure.CORRUPT)


def is_damaged(path: Path) -> bool:
    """Return whether this is an event log whose first page SQLite cannot use."""
    try:
        return not is_sound(path) and _holds_a_log(path)
    except OSError:
        return False


def is_sound(path: Path) -> bool:
    """Return whether SQLite can read the first page (from the write-ahead log if it is there) as an event log's."""
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
