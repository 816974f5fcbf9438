"""Damage to the files of event logs: rows changed behind the log's back, and a small log to damage."""

import sqlite3
from contextlib import closing
from pathlib import Path

from kit.eventlog import open_log, scan
from kit.whales import NOW, alert_draft, txid, update_draft
from whaled.bookmarks import text
from whaled.eventlog import notes, schema
from whaled.eventlog.store import EventLog
from whaled.model import Event

HEX = "CAST(x'ff22' AS TEXT)"  # what is no UTF-8


def edit(path: Path, *statements: str, sealed: bool = False) -> None:
    """Change the rows of a log behind its back. A `sealed` row of the table `log` keeps a valid checksum."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
        if sealed:
            schema.seal_log(db)


async def stored_offsets(log: EventLog) -> list[int]:
    events: list[Event] = []
    while page := await log.between(events[-1].offset if events else 0, log.head, 3):
        events += page
    return [event.offset for event in events]


async def filled(path: Path) -> str:
    """Write alerts 1 to 4, then two confirmations (5, 6) of the whales of 1 and 2, and return the epoch."""
    async with open_log(path) as log:
        await log.append([alert_draft(n, at=NOW + n) for n in range(1, 5)] + [update_draft(1, at=NOW + 5)])
        await log.append([update_draft(2, at=NOW + 6)])
        await log.write(notes.put_scan, scan(800_000, NOW))
        await log.write(notes.put_scan, scan(800_001, NOW + 600))
        await log.keep(text("height"), "800001")
        return log.epoch


# (what is done to the file, the offsets that are lost, whether an older version's row, without checksum, shows it)
ROWS = {
    "alert is no JSON": ("UPDATE whales SET alert = '{' WHERE id = 3", {3}, True),
    "alert is another type": ("UPDATE whales SET alert = '[1]' WHERE id = 3", {3}, True),
    "alert is no UTF-8": (f"UPDATE whales SET alert = {HEX} WHERE id = 3", {3}, True),
    "alert lacks a field": ("UPDATE whales SET alert = json_remove(alert, '$.vsize') WHERE id = 3", {3}, True),
    "amount out of range": ("UPDATE whales SET alert = json_set(alert, '$.value_sat', -1) WHERE id = 3", {3}, True),
    "amount is huge": ("UPDATE whales SET alert = replace(alert, '15000000003', '1e400') WHERE id = 3", {3}, True),
    "amount changed": ("UPDATE whales SET alert = replace(alert, '0000003,', '0000002,') WHERE id = 3", {3}, False),
    "detected at no time": ("UPDATE whales SET alert = json_set(alert, '$.detection_timestamp', 'x') WHERE id = 3",
                            {3}, True),
    "addresses are no list": ("UPDATE whales SET addresses = '7' WHERE id = 3", {3}, True),
    "addresses are no UTF-8": (f"UPDATE whales SET addresses = {HEX} WHERE id = 3", {3}, True),
    "address changed": ("UPDATE whales SET addresses = replace(addresses, 'x0', 'x1') WHERE id = 3", {3}, False),
    "whale of several events": ("UPDATE whales SET alert = '' WHERE id = 1", {1, 5}, True),
    "txid of another": (f"UPDATE whales SET txid = '{txid(99)}' WHERE id = 3", {3}, True),
    "whale missing": ("DELETE FROM whales WHERE id = 3", {3}, True),
    "whale of another event": ("UPDATE events SET whale = 4, ref = 'x' WHERE offset = 3", {3}, False),
    "body is no JSON": ("UPDATE events SET body = '{' WHERE offset = 5", {5}, True),
    "body is missing": ("UPDATE events SET body = NULL WHERE offset = 5", {5}, True),
    "body of an alert": ("UPDATE events SET body = (SELECT body FROM events WHERE offset = 5) WHERE offset = 3",
                         {3}, True),
    "body changed": ("UPDATE events SET body = replace(body, '00block', '00blocc') WHERE offset = 5", {5}, False),
    "kind unknown": ("UPDATE events SET kind = 'eaten' WHERE offset = 5", {5}, True),
    "kind is no UTF-8": (f"UPDATE events SET kind = {HEX} WHERE offset = 5", {5}, True),
    "kind changed": ("UPDATE events SET kind = 'dropped' WHERE offset = 5", {5}, False),
    "ref changed": ("UPDATE events SET ref = '00blocc' WHERE offset = 5", {5}, False),
    "time out of range": ("UPDATE events SET at = 1e300 WHERE offset = 5", {5}, True),
    "time before all": ("UPDATE events SET at = -1e300 WHERE offset = 3", {3}, True),
    "time changed": ("UPDATE events SET at = at + 1 WHERE offset = 5", {5}, False),
    "highest time infinite": ("UPDATE events SET high_at = 9e999 WHERE offset = 6", {6}, True),
    "missing": ("DELETE FROM events WHERE offset = 3", {3}, True),
    "missing in a row": ("DELETE FROM events WHERE offset BETWEEN 2 AND 5", {2, 3, 4, 5}, True),
    "newest missing": ("DELETE FROM events WHERE offset >= 5", {5, 6}, True),
    "all but one": ("UPDATE events SET kind = 'eaten' WHERE offset <> 4", {1, 2, 3, 5, 6}, True),
}  # fmt: skip


def as_version_3(path: Path) -> None:
    """Make a log what version 3 wrote: without checksums, and without repeat numbers."""
    with closing(sqlite3.connect(":memory:")) as old:
        schema.create(old, 0.0)
        (events,) = old.execute("SELECT sql FROM sqlite_schema WHERE name = 'events'").fetchone()
    edit(
        path,
        "ALTER TABLE events RENAME TO numbered_events",
        events,
        "INSERT INTO events SELECT offset, whale, kind, ref, at, high_at, body FROM numbered_events",
        "DROP TABLE numbered_events",
        *(f"ALTER TABLE {table} DROP COLUMN checksum" for table in ("whales", "spends", "blocks", "state", "log")),
        "DROP TABLE gaps",
        "PRAGMA user_version = 3",
    )
