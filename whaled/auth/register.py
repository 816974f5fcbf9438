"""The rows of revocations and of issued tokens. Of a token it stores what identifies it, never the token itself.

The functions take the connection of a transaction (`store`).
"""

import sqlite3

from msgspec import Struct

from whaled.auth.revocations import MAX_REVOCATIONS, Kind, Revocation
from whaled.errors import AccessError
from whaled.model import Grant

BY_REFRESH = "refresh"
# About 250 bytes each. Above this number the refreshed tokens that expire first are forgotten: they can still be
# revoked by client, key or id.
MAX_ISSUED = 100_000
# Revocations of tokens whose lifetime is unknown stay for as long as `auth.max_token_ttl` may be set.
LONGEST_S = 36_525 * 86400.0
# More than the leeway and grace after the expiry of a token, and the time in which another daemon may still refresh it.
MARGIN_S = 3_600.0
_COLUMNS = "jti, family, client_id, permissions, issued_at, expires_at, kid, issued_by"


class Issued(Struct, frozen=True, kw_only=True):
    """An issued token. Times are Unix seconds; `issued_by` is who issued it, or `refresh`."""

    jti: str
    family: str
    client_id: str
    permissions: str
    issued_at: float
    expires_at: float
    kid: str | None
    issued_by: str


def revoke(connection: sqlite3.Connection, revocation: Revocation) -> None:
    """Store a revocation; it extends an earlier one of the same name. Raises AccessError if there are too many."""
    held = _held(connection, revocation)
    if held is None:
        (number,) = connection.execute("SELECT count(*) FROM revocations").fetchone()
        if number >= MAX_REVOCATIONS:
            raise AccessError(
                f"{number:,} revocations are in force, and no more are allowed: retire the signing key instead "
                "(`whaled keys generate`, then `whaled keys retire`)"
            )
    joined = revocation if held is None else revocation.joined(held)
    connection.execute(
        "INSERT OR REPLACE INTO revocations (kind, name, at, until) VALUES (?, ?, ?, ?)",
        (joined.kind.value, joined.name, joined.at, joined.until),
    )


def _held(connection: sqlite3.Connection, revocation: Revocation) -> Revocation | None:
    row = connection.execute(
        "SELECT at, until FROM revocations WHERE kind = ? AND name = ?", (revocation.kind.value, revocation.name)
    ).fetchone()
    return Revocation(revocation.kind, revocation.name, *row) if row is not None else None


def revocations_after(connection: sqlite3.Connection, seq: int) -> tuple[int, list[Revocation]]:
    """Return the revocations that were stored after `seq`, and the highest sequence number now."""
    rows = connection.execute(
        "SELECT seq, kind, name, at, until FROM revocations WHERE seq > ? ORDER BY seq", (seq,)
    ).fetchall()
    kinds = {kind.value: kind for kind in Kind}
    # A kind of a newer whaled is skipped: this one could not apply it.
    found = [Revocation(kinds[kind], name, at, until) for _, kind, name, at, until in rows if kind in kinds]
    return (rows[-1][0] if rows else seq), found


def add(connection: sqlite3.Connection, grant: Grant, issued_by: str) -> None:
    """Register an issued token."""
    connection.execute(
        f"INSERT OR REPLACE INTO issued ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
        (
            grant.token_id,
            grant.family or grant.token_id,
            grant.client_id,
            ",".join(sorted(grant.permissions)),
            grant.issued_at,
            grant.expires_at,
            grant.key_id,
            issued_by,
        ),
    )


def listed(connection: sqlite3.Connection, *, client_id: str | None, now: float) -> list[tuple[Issued, bool]]:
    """Return the tokens that have not expired, the newest last, each with whether it is revoked."""
    rows = connection.execute(
        f"SELECT {_COLUMNS}, EXISTS (SELECT 1 FROM revocations AS r WHERE r.until > ?1 AND ("  # noqa: S608 - constants
        "(r.kind = 'jti' AND r.name = i.jti) OR (r.kind = 'family' AND r.name = i.family) "
        "OR (r.kind = 'kid' AND r.name = i.kid) OR (r.kind = 'ended' AND r.name = i.client_id || char(10) || i.family) "
        "OR (r.kind = 'client' AND r.name = i.client_id AND coalesce("
        "(SELECT f.issued_at FROM issued AS f WHERE f.jti = i.family), i.issued_at) <= r.at))) "
        "FROM issued AS i WHERE i.expires_at > ?1 AND (?2 IS NULL OR i.client_id = ?2) ORDER BY issued_at, jti",
        (now, client_id),
    )
    return [
        (
            Issued(
                jti=jti,
                family=family,
                client_id=client,
                permissions=permissions,
                issued_at=issued_at,
                expires_at=expires_at,
                kid=kid,
                issued_by=issued_by,
            ),
            bool(is_revoked),
        )
        for jti, family, client, permissions, issued_at, expires_at, kid, issued_by, is_revoked in rows
    ]


def family_of_token(connection: sqlite3.Connection, jti: str) -> str | None:
    """Return the family of a registered token, None if the token is not in the register."""
    row = connection.execute("SELECT family FROM issued WHERE jti = ?", (jti,)).fetchone()
    return row[0] if row is not None else None


def last_expiry(connection: sqlite3.Connection, family: str, now: float) -> float:
    """Return a time after which every token of a family has expired."""
    is_known = family_of_token(connection, family) is not None
    latest, longest = connection.execute(
        "SELECT max(expires_at), max(expires_at - issued_at) FROM issued WHERE family = ?", (family,)
    ).fetchone()
    if not is_known or latest is None:
        return now + LONGEST_S  # the first token may live longer than those refreshed from it
    # A token that another daemon makes of it at this moment lives no longer than the first one.
    return max(float(latest), now + float(longest)) + MARGIN_S


def live(connection: sqlite3.Connection, column: str, value: str, now: float) -> int:
    """Return the number of registered tokens of a family, client or key that have not expired."""
    query = {
        "family": "SELECT count(*) FROM issued WHERE family = ? AND expires_at > ?",
        "client_id": "SELECT count(*) FROM issued WHERE client_id = ? AND expires_at > ?",
        "kid": "SELECT count(*) FROM issued WHERE kid = ? AND expires_at > ?",
    }[column]
    (number,) = connection.execute(query, (value, now)).fetchone()
    return int(number)


def prune(connection: sqlite3.Connection, now: float, *, limit: int = MAX_ISSUED) -> int:
    """Remove expired revocations and tokens. Return the number of tokens forgotten before their expiry."""
    connection.execute("DELETE FROM revocations WHERE until <= ?", (now,))
    connection.execute("DELETE FROM issued WHERE expires_at <= ?", (now - MARGIN_S,))
    (number,) = connection.execute("SELECT count(*) FROM issued").fetchone()
    if number <= limit:
        return 0
    return connection.execute(
        "DELETE FROM issued WHERE jti IN (SELECT jti FROM issued ORDER BY issued_by != ?, expires_at LIMIT ?)",
        (BY_REFRESH, number - limit),
    ).rowcount
