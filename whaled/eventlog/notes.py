"""The records stored beside events: scans of blocks, bookmarks, and the mark of a copy.

The first functions are changes for `EventLog.write`, which runs them in a transaction of the writer.
"""

import sqlite3
from typing import TypeVar

from msgspec.structs import astuple

from whaled.bookmarks import ALIVE_AT, COPIED_AT, STARTS, Bookmark
from whaled.eventlog import checksums, schema
from whaled.model import Scan

T = TypeVar("T")


def keep(db: sqlite3.Connection, bookmark: Bookmark[T], value: T) -> None:
    """Store the value of a bookmark."""
    schema.put_state(db, bookmark.key, bookmark.encode(value))


def put_scan(db: sqlite3.Connection, scan: Scan) -> None:
    """Store the result of a block scan."""
    values = astuple(scan)
    db.execute(
        f"INSERT OR REPLACE INTO blocks VALUES ({', '.join('?' * (len(values) + 1))})",  # noqa: S608 - constants
        (*values, checksums.of_values(*values)),
    )


def forget_scan(db: sqlite3.Connection, height: int) -> None:
    """Remove the scan of the block at this height, so that the block is scanned again."""
    db.execute("DELETE FROM blocks WHERE height = ?", (height,))


def noted_offset(db: sqlite3.Connection, bookmark: Bookmark[int]) -> int | None:
    """Return an offset stored in `state`; None if there is none or if its row is damaged."""
    if not schema.has_checksums(db):
        return None
    query = "SELECT CAST(value AS BLOB), checksum FROM state WHERE key = ?"
    row = db.execute(query, (bookmark.key,)).fetchone()
    if row is None or not isinstance(row[0], bytes) or row[1] != checksums.of_values(bookmark.key, row[0]):
        return None
    try:
        return bookmark.decode(row[0].decode())
    except ValueError:
        return None


def mark_copy(db: sqlite3.Connection, now: float) -> None:
    """Mark the file as a copy: a daemon that continues to write there must begin a new epoch.

    The original log may have continued meanwhile and assigned the same offsets to other events.
    """
    with schema.transaction(db):
        # A daemon started on the copy must not take it for the log of a daemon that crashed.
        db.execute("DELETE FROM state WHERE key IN (?, ?, ?)", (COPIED_AT.key, ALIVE_AT.key, STARTS.key))
        db.execute("INSERT INTO state (key, value) VALUES (?, ?)", (COPIED_AT.key, str(now)))


def is_copy(db: sqlite3.Connection) -> bool:
    """Return whether the file is marked as a copy."""
    return db.execute("SELECT 1 FROM state WHERE key = ?", (COPIED_AT.key,)).fetchone() is not None


def settle_copy(db: sqlite3.Connection, *, renew: bool) -> None:
    """Turn a copy into a log: remove its mark and, if `renew`, begin a new epoch."""
    with schema.transaction(db):
        db.execute("DELETE FROM state WHERE key = ?", (COPIED_AT.key,))
        if renew:
            db.execute("UPDATE log SET epoch = ?", (schema.new_epoch(),))
            schema.seal_log(db)
