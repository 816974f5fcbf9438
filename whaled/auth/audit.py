"""The audit log: who did what to credentials and to the daemon. Records are only added, and removed by age and number.

The functions take the connection of a transaction (`store`), so that an act and its record are stored together or not
at all.
"""

import sqlite3

from msgspec import Struct

# Longer texts are cut: a caller may pass on what came from outside.
MAX_TEXT = 1_000


class Act(Struct, frozen=True, kw_only=True):
    """One act. `at` is in Unix seconds.

    `actor` is who did it (`uid 0 (root)`, a client id, `command line uid 0`), `origin` where from, `target` what it
    was done to, `outcome` what came of it (`done`, or why not).
    """

    at: float
    actor: str
    origin: str
    act: str
    target: str
    outcome: str = "done"
    detail: str = ""


class Entry(Struct, frozen=True):
    """A stored act. `id` ascends."""

    id: int
    act: Act


def record(connection: sqlite3.Connection, act: Act) -> None:
    """Add a record."""
    texts = [_bounded(text) for text in (act.actor, act.origin, act.act, act.target, act.outcome, act.detail)]
    connection.execute(
        "INSERT INTO audit (at, actor, origin, act, target, outcome, detail) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (act.at, *texts),
    )


def newest(connection: sqlite3.Connection, limit: int, before: int | None = None) -> list[Entry]:
    """Return at most `limit` records, the newest first; with `before`, only those with a lower id."""
    rows = connection.execute(
        "SELECT id, at, actor, origin, act, target, outcome, detail FROM audit "
        "WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2",
        (before, limit),
    )
    return [
        Entry(number, Act(at=at, actor=actor, origin=origin, act=act, target=target, outcome=outcome, detail=detail))
        for number, at, actor, origin, act, target, outcome, detail in rows
    ]


def count(connection: sqlite3.Connection) -> int:
    """Return the number of records. Ids have no gaps, because only the oldest records are removed."""
    (number,) = connection.execute("SELECT coalesce(max(id) - min(id) + 1, 0) FROM audit").fetchone()
    return int(number)


def prune(connection: sqlite3.Connection, now: float, *, retention_s: float, limit: int) -> int:
    """Remove the records older than `retention_s` and, oldest first, those above `limit`. Return their number.

    A record stays as long as an older one stays: a clock that was wrong for a while must leave no gap.
    """
    (first,) = connection.execute("SELECT min(id) FROM audit WHERE at >= ?", (now - retention_s,)).fetchone()
    (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM audit").fetchone()
    keep_from = max(last + 1 if first is None else first, last - limit + 1)
    return connection.execute("DELETE FROM audit WHERE id < ?", (keep_from,)).rowcount


def _bounded(text: str) -> str:
    """Return a text that SQLite can store, cut to its maximum length."""
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_TEXT]
