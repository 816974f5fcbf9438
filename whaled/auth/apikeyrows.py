"""API keys in the access database. Each function is the work of one transaction."""

import sqlite3
from collections.abc import Mapping

import structlog

from whaled.auth.apikeys import MAX_KEYS, ApiKey
from whaled.errors import AccessError
from whaled.model import Permission

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_COLUMNS = (
    "id, digest, client_id, comment, permissions, filter, rate, networks, created_at, created_by, expires_at, "
    "revoked_at, last_used_at"
)
_PERMISSIONS = {permission.value: permission for permission in Permission}


def insert(connection: sqlite3.Connection, key: ApiKey) -> None:
    """Store a new key. Raises AccessError if there are MAX_KEYS that are not revoked."""
    (count,) = connection.execute("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL").fetchone()
    if count >= MAX_KEYS:
        raise AccessError(f"there are {count:,} API keys, and {MAX_KEYS:,} are allowed: revoke some of them first")
    row = (
        key.id, key.digest, key.client_id, key.comment, " ".join(sorted(key.permissions)), key.fixed_filter, key.rate,
        " ".join(key.networks), key.created_at, key.created_by, key.expires_at, None, None,
    )  # fmt: skip
    connection.execute(f"INSERT INTO api_keys ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - constants


def load(connection: sqlite3.Connection) -> list[ApiKey]:
    """Return all keys, the newest last. A row that no whaled wrote permits nothing: it is logged and left out."""
    keys = []
    for row in connection.execute(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id"):  # noqa: S608 - constants
        names = row[4].split()
        if set(names) <= _PERMISSIONS.keys():
            keys.append(_key(row, frozenset(_PERMISSIONS[name] for name in names)))
        else:
            logger.error("api_key_unreadable", key=row[0], client_id=row[2])
    return keys


def _key(row: tuple[object, ...], permissions: frozenset[Permission]) -> ApiKey:
    (name, digest, client_id, comment, _, fixed_filter, rate, networks, *times) = row
    created_at, created_by, expires_at, revoked_at, last_used_at = times
    fields: dict[str, object] = {
        "id": name, "digest": digest, "client_id": client_id, "comment": comment, "permissions": permissions,
        "fixed_filter": fixed_filter, "rate": rate, "networks": tuple(str(networks).split()),
        "created_at": created_at, "created_by": created_by, "expires_at": expires_at, "revoked_at": revoked_at,
        "last_used_at": last_used_at,
    }  # fmt: skip
    return ApiKey(**fields)  # type: ignore[arg-type]  # the table is STRICT: SQLite checked the type of each column


def revoke(connection: sqlite3.Connection, name: str, at: float) -> bool:
    """Revoke the key with an id. Return False if it was revoked before. Raises AccessError if there is none."""
    if connection.execute("SELECT 1 FROM api_keys WHERE id = ?", (name,)).fetchone() is None:
        raise AccessError(f"there is no API key with the id {name[:80]!r}; `whaled apikey list --all` shows them")
    done = connection.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (at, name))
    return done.rowcount == 1


def used(connection: sqlite3.Connection, uses: Mapping[str, float]) -> None:
    """Store when each of these keys was last used."""
    connection.executemany(
        "UPDATE api_keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
        [(at, name) for name, at in uses.items()],
    )
