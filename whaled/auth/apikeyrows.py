"""API keys in the access database. Each function is the work of one transaction."""

import sqlite3
from collections.abc import Mapping
from typing import Any

from whaled.auth.apikeys import MAX_KEYS, ApiKey
from whaled.errors import AccessError
from whaled.model import Permission

_NAMES = (
    "id", "digest", "client_id", "comment", "permissions", "filter", "rate", "networks", "created_at", "created_by",
    "expires_at", "revoked_at", "last_used_at",
)  # fmt: skip
_COLUMNS = ", ".join(_NAMES)
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
    """Return all keys, the newest last. The name of a permission that this whaled does not know grants nothing."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")  # noqa: S608 - constants
    return [_key(row) for row in rows]


def _key(row: tuple[Any, ...]) -> ApiKey:
    """Return the key in a row. The table is STRICT: SQLite has checked the type of each column."""
    fields = dict(zip(_NAMES, row, strict=True))
    names, networks, fixed_filter = fields.pop("permissions"), fields.pop("networks"), fields.pop("filter")
    return ApiKey(
        permissions=frozenset(_PERMISSIONS[name] for name in names.split() if name in _PERMISSIONS),
        networks=tuple(networks.split()),
        fixed_filter=fixed_filter,
        **fields,
    )


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
