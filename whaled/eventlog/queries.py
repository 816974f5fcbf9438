"""The queries of the event log. Each is one function here; `EventLog.read` runs it on a reader's thread.

Each takes an open connection, skips damaged rows and reports them. A statement sees every commit that returned before
the statement began. A query about many keys takes a sequence of them and returns a dict, so that `EventLog.read_each`
can ask for any number.
"""

import sqlite3
from collections.abc import Sequence
from itertools import islice

import msgspec

from whaled.errors import EventLogError
from whaled.eventlog import files, schema
from whaled.eventlog.codec import Row, shown
from whaled.eventlog.damage import Damage, Table
from whaled.eventlog.rows import Rows, damaged_event
from whaled.model import Event, Scan, Status, Whale
from whaled.whales.accuracy import Outcome
from whaled.whales.conflicts import Rival
from whaled.whales.lifecycle import GONE, WAITING, History

ANY_HEIGHT = 2**53  # above every possible block height
IS_NEWEST = "NOT EXISTS (SELECT 1 FROM events AS later WHERE later.whale = e.whale AND later.offset > e.offset)"
IS_WAITING, IS_GONE = (f"e.kind IN {tuple(kind.value for kind in sorted(kinds))}" for kinds in (WAITING, GONE))


# --- look-ups by txid, outpoint, height and key ---


def whales(rows: Rows, txids: Sequence[str]) -> dict[str, Whale]:
    """Return the stored whales by txid, without an entry for unknown ones."""

    def damaged(row: Row, problem: str) -> Damage:
        return Damage(table=Table.WHALES, row=shown(row[0]), problem=problem)

    query = f"{rows.sql.whales} WHERE w.txid IN (SELECT value FROM json_each(?))"  # noqa: S608 - constants
    return dict(rows.intact("read alerts", query, (_json(txids),), rows.codec.known_whale, damaged))


def histories(rows: Rows, txids: Sequence[str]) -> dict[str, History]:
    """Return, by txid, each event held about the whale, in offset order."""
    # The condition is on e.whale: one on w.txid, after the LEFT JOIN, would be evaluated for every event.
    of_whales = "SELECT id FROM whales WHERE txid IN (SELECT value FROM json_each(?))"
    query = f"{rows.sql.columns} WHERE e.whale IN ({of_whales}) ORDER BY e.offset"
    found: dict[str, History] = {}
    for txid, step in rows.intact("read histories", query, (_json(txids),), rows.codec.step, damaged_event):
        found.setdefault(txid, []).append(step)
    return found


def spenders(rows: Rows, outpoints: Sequence[str]) -> dict[str, list[str]]:
    """Return, by outpoint, the txids of the whales that spend it, oldest first; no entry if none is known."""
    found: dict[str, list[str]] = {}
    for txid, outpoint in _spends(rows, "s.outpoint IN (SELECT value FROM json_each(?)) ORDER BY w.id", outpoints):
        found.setdefault(outpoint, []).append(txid)
    return found


def outpoints(rows: Rows, txids: Sequence[str]) -> dict[str, list[str]]:
    """Return, by txid, the outpoints that the whale spends; no entry for whales of a schema version before 3."""
    found: dict[str, list[str]] = {}
    for txid, outpoint in _spends(rows, "w.txid IN (SELECT value FROM json_each(?))", txids):
        found.setdefault(txid, []).append(outpoint)
    return found


def rivals(rows: Rows, spending: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[Rival]]:
    """Return, by txid, the other whales that spend an output which the transaction spends, oldest first.

    `spending` pairs a txid with the outpoints that it spends; without any, those that the log has of it are taken.
    """
    spent = dict(spending)
    unknown = [txid for txid, each in spending if not each]
    if unknown:
        spent.update(outpoints(rows, unknown))
    by_outpoint = spenders(rows, list({outpoint for each in spent.values() for outpoint in each}))
    names = {
        txid: list(dict.fromkeys(rival for each in spent[txid] for rival in by_outpoint.get(each, ()) if rival != txid))
        for txid in spent
    }
    wanted = list({name for each in names.values() for name in each})
    if not wanted:
        return {}
    known, lives = whales(rows, wanted), histories(rows, wanted)
    return {
        txid: [Rival(name, known.get(name), lives[name]) for name in each if name in lives]
        for txid, each in names.items()
        if each
    }


def scans(rows: Rows, low: int, high: int) -> list[Scan]:
    """Return the scans of the blocks between two heights, both included, ascending."""
    return _scans(rows, "WHERE height BETWEEN ? AND ? ORDER BY height", (low, high))


def newest_scans(rows: Rows, limit: int, below: int) -> list[Scan]:
    """Return the scans of the highest blocks below a height, descending, at most `limit`.

    Returns an empty list for a file of a version without the table.
    """
    require_limit(limit)
    with rows.snapshot("read block scans"):
        if rows.version() < schema.BLOCKS_VERSION:
            return []
        return _scans(rows, "WHERE height < ? ORDER BY height DESC", (below,), limit)


def note(rows: Rows, key: str) -> str | None:
    """Return the text stored under a key; None if there is none or if its row is damaged."""

    def damaged(_: Row, problem: str) -> Damage:
        return Damage(table=Table.STATE, row=key, problem=problem)

    query = f"{rows.sql.state} WHERE s.key = ?"
    return next(rows.intact("read state", query, (key,), rows.codec.state, damaged), None)


# --- searches through all events ---


def pending(rows: Rows, after: int, limit: int) -> list[Event]:
    """Return the newest event of each whale without an outcome, ascending, with offset > `after`, at most `limit`.

    A restarted daemon continues to follow these whales. `after` serves for paging and to leave out old events.
    """
    require_limit(limit)
    return _events(rows, f"WHERE e.offset > ? AND {IS_WAITING} AND {IS_NEWEST} ORDER BY e.offset", (after,), limit)


def newest_alert(rows: Rows) -> Event | None:
    """Return the newest alert, or None if none is held."""
    return next(iter(_events(rows, "WHERE e.kind = 'alert' ORDER BY e.offset DESC", (), 1)), None)


def confirmed_in(rows: Rows, block_hash: str) -> list[Whale]:
    """Return the whales whose newest event confirms them in this block."""
    clauses = f"WHERE e.kind = 'confirmed' AND e.ref = ? AND {IS_NEWEST} ORDER BY e.offset"
    return [event.whale for event in _events(rows, clauses, (block_hash,))]


def gone_since(rows: Rows, at: float, limit: int) -> dict[str, int]:
    """Return txid and number of events of the whales whose newest event is `replaced` or `dropped`.

    Newest first, at most `limit`; a newest event older than `at` (Unix seconds) does not count.
    """
    require_limit(limit)
    query = f"{rows.sql.columns} WHERE {IS_GONE} AND e.at >= ? AND {IS_NEWEST} ORDER BY e.offset DESC"
    found = rows.intact("read whales that are gone", query, (at,), rows.codec.step, damaged_event)
    txids = [txid for txid, _ in islice(found, limit)]
    lives = histories(rows, txids)
    return {txid: len(lives[txid]) for txid in txids if txid in lives}


def first_to_keep(rows: Rows, cutoff: float, now: float) -> int:
    """Return the first offset to keep: only events older than `cutoff`, and those before such events, are removed.

    An event time later than `now` proves nothing, because some clock was wrong. Such an event is removed together
    with an old event after it, and kept while there is none: a wrong clock, then or now, must not empty the log.
    """
    young = "SELECT offset FROM events WHERE at BETWEEN ? AND ? ORDER BY offset LIMIT 1"
    old = "SELECT offset + 1 FROM events WHERE offset < ? AND at < ? ORDER BY offset DESC LIMIT 1"
    with rows.snapshot("look for old events") as db:
        (end,) = db.execute("SELECT head + 1 FROM log").fetchone()
        found = db.execute(young, (cutoff, now)).fetchone() or db.execute(young, (cutoff, 9e99)).fetchone()
        boundary = int(found[0]) if found else int(end)
        found = db.execute(old, (boundary, cutoff)).fetchone()
    return int(found[0]) if found else 0


def latest_scan(rows: Rows) -> Scan | None:
    """Return the scan of the block with the latest block time.

    This is not the highest block if the backend followed another chain before.
    """
    return next(iter(_scans(rows, "ORDER BY mined_at DESC", (), 1)), None)


def unscanned(rows: Rows) -> tuple[int, int]:
    """Return (number of unscanned blocks, lowest height) for the range from the lowest to the highest scan."""
    with rows.snapshot("count block scans") as db:
        if rows.version() < schema.BLOCKS_VERSION:
            return 0, 0
        (oldest, newest, count) = db.execute(
            "SELECT coalesce(min(height), 0), coalesce(max(height), -1), count(*) FROM blocks"
        ).fetchone()
    return newest - oldest + 1 - count, oldest


def outcomes(rows: Rows, since: float) -> list[Outcome]:
    """Return the confirmations of whales that were alerted before they were mined.

    Only whales whose newest event is a confirmation, not older than `since` (Unix seconds).
    """
    with rows.snapshot("read confirmations"):
        if rows.version() == 0:
            return []
        return [
            Outcome(event.whale.alert.urgency_score, event.update.blocks_off, event.update.seconds_to_confirmation)
            for event in _events(rows, f"WHERE e.kind = 'confirmed' AND e.at >= ? AND {IS_NEWEST}", (since,))
            if event.update is not None and event.whale.alert.status is Status.PENDING
        ]


def check(rows: Rows) -> bool:
    """Check the whole file; return False if interrupted before the end. Raises EventLogError(CORRUPT)."""
    try:
        with files.explained(rows.path, "check the event log"):
            for fault in files.look_through(rows.db, rows.path):
                rows.report(Damage(table=Table.FILE, row=fault, problem="found by SQLite"))
    except EventLogError as error:
        if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            return False
        raise
    return True


# Queries that may take long. They have a thread of their own, so that no look-up before a commit waits for one.
SEARCHES: frozenset[object] = frozenset(
    {pending, newest_alert, confirmed_in, gone_since, first_to_keep, latest_scan, unscanned, outcomes, check}
)


# --- rows ---


def require_limit(limit: int) -> None:
    """Raise ValueError if `limit` is below 1: SQLite treats a negative limit as no limit."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")


def _events(rows: Rows, clauses: str, parameters: tuple[object, ...], limit: int | None = None) -> list[Event]:
    query = f"{rows.sql.events} {clauses}"
    return list(islice(rows.intact("read events", query, parameters, rows.codec.event, damaged_event), limit))


def _scans(rows: Rows, clauses: str, parameters: tuple[object, ...], limit: int | None = None) -> list[Scan]:
    def damaged(row: Row, problem: str) -> Damage:
        return Damage(table=Table.BLOCKS, row=f"height {row[0]}", problem=problem)

    query = f"{rows.sql.blocks} {clauses}"
    return list(islice(rows.intact("read block scans", query, parameters, rows.codec.scan, damaged), limit))


def _spends(rows: Rows, clauses: str, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a whale's txid and an outpoint that it spends."""

    def damaged(row: Row, problem: str) -> Damage:
        return Damage(table=Table.SPENDS, row=shown(row[1]), problem=problem)

    query = f"{rows.sql.spends} WHERE {clauses}"
    return list(rows.intact("read what whales spend", query, (_json(wanted),), rows.codec.spend, damaged))


def _json(values: Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()
