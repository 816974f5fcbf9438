"""The acts of operators on API keys. Each is stored in one transaction with its record in the audit log."""

import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable

from msgspec import Struct

from whaled.auth import apikeyrows, audit
from whaled.auth.apikeys import ApiKey
from whaled.auth.apikeytext import DIGITS, SECRET_BYTES, digest_of, key_of
from whaled.auth.store import Access
from whaled.auth.tokens import check_client_id
from whaled.model import Permission

ID_PREFIX = "whkid_"
# 62**10 ids: a random one is not in use, and the table would refuse one that is.
ID_CHARACTERS = 10
MAX_COMMENT = 200
# In messages a second. A lower rate would leave a client waiting for minutes, a higher one is no limit.
MIN_RATE = 0.1
MAX_RATE = 10_000.0


class Order(Struct, frozen=True, kw_only=True):
    """The client and the permissions of a new key. `fixed_filter` and `networks` are in their canonical forms."""

    client_id: str
    permissions: frozenset[Permission]
    comment: str = ""
    fixed_filter: str | None = None
    rate: float | None = None
    networks: tuple[str, ...] = ()
    expires_at: float | None = None


async def _nothing_to_do() -> None:
    """Do nothing: a running daemon notices the write by itself."""


class ApiKeyDesk:
    """Creates, lists and revokes API keys.

    `changed` is awaited after a change is stored, so that it takes effect at once.
    """

    def __init__(
        self,
        access: Access,
        *,
        changed: Callable[[], Awaitable[None]] = _nothing_to_do,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._access = access
        self._changed = changed
        self._clock = clock

    async def create(
        self, order: Order, *, actor: str, origin: str, keep: Callable[[str], None] = lambda _: None
    ) -> tuple[str, ApiKey]:
        """Create a key. Return its text, which nothing can show again, and what is stored of it.

        `keep` is given the text within the transaction: if it raises, there is no key. Raises ValueError for an order
        that cannot be met, AccessError if it is not stored.
        """
        now = self._clock()
        _check(order, now)
        text = key_of(secrets.token_bytes(SECRET_BYTES))
        key = ApiKey(
            id=ID_PREFIX + "".join(secrets.choice(DIGITS) for _ in range(ID_CHARACTERS)),
            digest=digest_of(text),
            client_id=order.client_id,
            permissions=order.permissions,
            created_at=now,
            created_by=actor,
            comment=order.comment,
            fixed_filter=order.fixed_filter,
            rate=order.rate,
            networks=order.networks,
            expires_at=order.expires_at,
        )
        permissions = ",".join(sorted(key.permissions)) or "none"
        detail = f"client {key.client_id}, permissions {permissions}"

        def work(connection: sqlite3.Connection) -> None:
            apikeyrows.insert(connection, key)
            audit.record(connection, _act(now, actor, origin, "api key created", key.id, detail))
            keep(text)

        await self._access.write(work)
        await self._changed()
        return text, key

    async def list(self, client_id: str | None = None) -> list[ApiKey]:
        """Return the stored keys, also the expired and the revoked ones, the newest last. Raises AccessError."""
        keys = await self._access.read(apikeyrows.load)
        return [key for key in keys if client_id in (None, key.client_id)]

    async def revoke(self, name: str, *, actor: str, origin: str) -> bool:
        """Revoke the key with an id for good. Return False if it was revoked before.

        Raises AccessError if there is no such key, or the revocation is not stored.
        """
        now = self._clock()

        def work(connection: sqlite3.Connection) -> bool:
            is_new = apikeyrows.revoke(connection, name, now)
            outcome = "done" if is_new else "revoked before"
            audit.record(connection, _act(now, actor, origin, "api key revoked", name, "", outcome))
            return is_new

        is_new = await self._access.write(work)
        await self._changed()
        return is_new


def _check(order: Order, now: float) -> None:
    """Raise ValueError for what no key can have."""
    check_client_id(order.client_id)
    if len(order.comment) > MAX_COMMENT or not order.comment.isprintable():
        raise ValueError(
            f"found a comment of {len(order.comment)} characters; allowed are {MAX_COMMENT} printable ones"
        )
    if order.rate is not None and not MIN_RATE <= order.rate <= MAX_RATE:
        raise ValueError(
            f"found a rate of {order.rate:g} messages a second; allowed is {MIN_RATE:g} to {MAX_RATE:,.0f}"
        )
    if order.expires_at is not None and order.expires_at <= now:
        raise ValueError("the expiry is in the past: the key would never be accepted")


def _act(at: float, actor: str, origin: str, act: str, name: str, detail: str, outcome: str = "done") -> audit.Act:
    return audit.Act(at=at, actor=actor, origin=origin, act=act, target=name, detail=detail, outcome=outcome)
