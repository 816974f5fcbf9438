"""Look-ups by txid, outpoint, height and key, and searches through all events.

A statement sees every commit that returned before the statement began.
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
from whaled.whales.lifecycle import Step

IS_NEWEST = "NOT EXISTS (SELECT 1 FROM events AS later WHERE later.whale = e.whale AND later.offset > e.offset)"


class Reader(Rows):
    """All reads except pages of events in offset order."""

    def open(self) -> None:
        """Open the connection. Raises EventLogError, also if a table or a column is missing."""
        super().open()
        with files.explained(self._path, "open the event log for reading"):
            version = schema.identify(self._db, self._path)
            if version:
                files.require_tables(self._db, self._path, version)

    def check(self) -> bool:
        """Check the whole file; return False if interrupted before the end. Raises EventLogError(CORRUPT)."""
        try:
            with files.explained(self._path, "check the event log"):
                for fault in files.look_through(self._db, self._path):
                    self._report(Damage(table=Table.FILE, row=fault, problem="found by SQLite"))
        except EventLogError as error:
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                return False
            raise
        return True

    # --- look-ups ---

    def whales(self, txids: Sequence[str]) -> dict[str, Whale]:
        """See EventLog.whales."""

        def damaged(row: Row, problem: str) -> Damage:
            return Damage(table=Table.WHALES, row=shown(row[0]), problem=problem)

        query = f"{self._queries.whales} WHERE w.txid IN (SELECT value FROM json_each(?))"  # noqa: S608 - constants
        return dict(self._intact("read alerts", query, (_json(txids),), self._codec.known_whale, damaged))

    def rivals(self, outpoints: Sequence[str]) -> dict[str, list[str]]:
        """See EventLog.rivals."""
        found: dict[str, list[str]] = {}
        for txid, outpoint in self._spends("s.outpoint IN (SELECT value FROM json_each(?)) ORDER BY w.id", outpoints):
            found.setdefault(outpoint, []).append(txid)
        return found

    def outpoints(self, txids: Sequence[str]) -> dict[str, list[str]]:
        """See EventLog.outpoints."""
        found: dict[str, list[str]] = {}
        for txid, outpoint in self._spends("w.txid IN (SELECT value FROM json_each(?))", txids):
            found.setdefault(txid, []).append(outpoint)
        return found

    def histories(self, txids: Sequence[str]) -> dict[str, list[Step]]:
        """See EventLog.histories."""
        # The condition is on e.whale: one on w.txid, after the LEFT JOIN, would be evaluated for every event.
        of_whales = "SELECT id FROM whales WHERE txid IN (SELECT value FROM json_each(?))"
        query = f"{self._queries.columns} WHERE e.whale IN ({of_whales}) ORDER BY e.offset"
        found: dict[str, list[Step]] = {}
        for txid, step in self._intact("read histories", query, (_json(txids),), self._codec.step, damaged_event):
            found.setdefault(txid, []).append(step)
        return found

    def scans(self, low: int, high: int) -> list[Scan]:
        """See EventLog.scans."""
        return self._scans("WHERE height BETWEEN ? AND ? ORDER BY height", (low, high))

    def newest_scans(self, limit: int, below: int = schema.NO_HEIGHT) -> list[Scan]:
        """See EventLog.newest_scans. Returns an empty list for a file of a version without the table."""
        with self._snapshot("read block scans") as db:
            if schema.identify(db, self._path) < schema.BLOCKS_VERSION:
                return []
            return self._scans("WHERE height < ? ORDER BY height DESC", (below,), limit)

    def state(self, key: str) -> str | None:
        """Return the text stored under a key; None if there is none or if its row is damaged."""

        def damaged(_: Row, problem: str) -> Damage:
            return Damage(table=Table.STATE, row=key, problem=problem)

        query = f"{self._queries.state} WHERE s.key = ?"
        return next(self._intact("read state", query, (key,), self._codec.state, damaged), None)

    # --- searches ---

    def pending(self, after: int, limit: int) -> list[Event]:
        """See EventLog.pending."""
        return self._events(
            f"WHERE e.offset > ? AND e.kind IN ('alert', 'pending') AND {IS_NEWEST} ORDER BY e.offset", (after,), limit
        )

    def newest_alert(self) -> Event | None:
        """See EventLog.newest_alert."""
        return next(iter(self._events("WHERE e.kind = 'alert' ORDER BY e.offset DESC", (), 1)), None)

    def confirmed_in(self, block_hash: str) -> list[Whale]:
        """See EventLog.confirmed_in."""
        events = self._events(
            f"WHERE e.kind = 'confirmed' AND e.ref = ? AND {IS_NEWEST} ORDER BY e.offset", (block_hash,)
        )
        return [event.whale for event in events]

    def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """See EventLog.gone_since."""
        query = (
            f"{self._queries.columns} WHERE e.kind IN ('replaced', 'dropped') AND e.at >= ? AND {IS_NEWEST} "
            "ORDER BY e.offset DESC"
        )
        rows = self._intact("read whales that are gone", query, (at,), self._codec.step, damaged_event)
        txids = [txid for txid, _ in islice(rows, limit)]
        histories = self.histories(txids)
        return {txid: len(histories[txid]) for txid in txids if txid in histories}

    def first_to_keep(self, cutoff: float, now: float) -> int:
        """Return the first offset to keep: only events older than `cutoff`, and those before such events, are removed.

        An event time later than `now` proves nothing, because some clock was wrong. Such an event is removed together
        with an old event after it, and kept while there is none: a wrong clock, then or now, must not empty the log.
        """
        young = "SELECT offset FROM events WHERE at BETWEEN ? AND ? ORDER BY offset LIMIT 1"
        old = "SELECT offset + 1 FROM events WHERE offset < ? AND at < ? ORDER BY offset DESC LIMIT 1"
        with self._snapshot("look for old events") as db:
            (end,) = db.execute("SELECT head + 1 FROM log").fetchone()
            found = db.execute(young, (cutoff, now)).fetchone() or db.execute(young, (cutoff, 9e99)).fetchone()
            boundary = int(found[0]) if found else int(end)
            found = db.execute(old, (boundary, cutoff)).fetchone()
        return int(found[0]) if found else 0

    def latest_scan(self) -> Scan | None:
        """Return the scan of the block with the latest block time.

        This is not the highest block if the backend followed another chain before.
        """
        return next(iter(self._scans("ORDER BY mined_at DESC", (), 1)), None)

    def unscanned(self) -> tuple[int, int]:
        """Return (number of unscanned blocks, lowest height) for the range from the lowest to the highest scan."""
        with self._snapshot("count block scans") as db:
            if schema.identify(db, self._path) < schema.BLOCKS_VERSION:
                return 0, 0
            (oldest, newest, count) = db.execute(
                "SELECT coalesce(min(height), 0), coalesce(max(height), -1), count(*) FROM blocks"
            ).fetchone()
        return newest - oldest + 1 - count, oldest

    def outcomes(self, since: float) -> list[Outcome]:
        """Return the confirmations of whales that were alerted before they were mined.

        Only whales whose newest event is a confirmation, not older than `since` (Unix seconds).
        """
        with self._snapshot("read confirmations") as db:
            if schema.identify(db, self._path) == 0:
                return []
            query = f"{self._queries.events} WHERE e.kind = 'confirmed' AND e.at >= ? AND {IS_NEWEST}"
            events = self._intact("read confirmations", query, (since,), self._codec.event, damaged_event)
            return [
                Outcome(event.whale.alert.urgency_score, event.update.blocks_off, event.update.seconds_to_confirmation)
                for event in events
                if event.update is not None and event.whale.alert.status is Status.PENDING
            ]

    # --- rows ---

    def _events(self, clauses: str, parameters: tuple[object, ...], limit: int | None = None) -> list[Event]:
        query = f"{self._queries.events} {clauses}"
        rows = self._intact("read events", query, parameters, self._codec.event, damaged_event)
        return list(islice(rows, limit))

    def _scans(self, clauses: str, parameters: tuple[object, ...], limit: int | None = None) -> list[Scan]:
        def damaged(row: Row, problem: str) -> Damage:
            return Damage(table=Table.BLOCKS, row=f"height {row[0]}", problem=problem)

        query = f"{self._queries.blocks} {clauses}"
        return list(islice(self._intact("read block scans", query, parameters, self._codec.scan, damaged), limit))

    def _spends(self, clauses: str, wanted: Sequence[str]) -> list[tuple[str, str]]:
        """Return pairs of a whale's txid and an outpoint that it spends."""

        def damaged(row: Row, problem: str) -> Damage:
            return Damage(table=Table.SPENDS, row=shown(row[1]), problem=problem)

        query = f"{self._queries.spends} WHERE {clauses}"
        return list(self._intact("read what whales spend", query, (_json(wanted),), self._codec.spend, damaged))


def _json(values: Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()
