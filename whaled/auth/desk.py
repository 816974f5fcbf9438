"""The acts of operators on tokens. Each is stored in one transaction with its record in the audit log."""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

from msgspec import Struct

from whaled.auth import audit, register
from whaled.auth.audit import Act
from whaled.auth.register import Issued
from whaled.auth.revocations import Kind, Revocation
from whaled.auth.store import Access
from whaled.auth.tokens import MAX_CLIENT_ID, MAX_NAME
from whaled.model import Grant


class Target(StrEnum):
    """The scope of `TokenDesk.revoke`: a token with its family, the tokens of a client so far, or those of a key."""

    TOKEN = "jti"  # noqa: S105 - no password
    CLIENT = "client"
    KEY = "kid"


class Listed(Struct, frozen=True):
    """A token of the register, and whether it is revoked."""

    token: Issued
    is_revoked: bool


class Revoked(Struct, frozen=True):
    """The outcome of a revocation. `tokens` is the number of registered tokens that it ended."""

    target: Target
    name: str
    at: float
    tokens: int


async def _nothing_to_do() -> None:
    """Do nothing: a running daemon notices the write by itself."""


class TokenDesk:
    """Lists and revokes tokens. `revoked` is awaited after a revocation is stored, so that it takes effect at once."""

    def __init__(
        self,
        access: Access,
        *,
        revoked: Callable[[], Awaitable[None]] = _nothing_to_do,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._access = access
        self._revoked = revoked
        self._clock = clock
        self._sleep = sleep

    async def list(self, client_id: str | None = None) -> list[Listed]:
        """Return the registered tokens that have not expired, the newest last. Raises AccessError."""
        now = self._clock()
        rows = await self._access.read(lambda connection: register.listed(connection, client_id=client_id, now=now))
        return [Listed(token, is_revoked) for token, is_revoked in rows]

    async def register(self, grant: Grant, *, actor: str, origin: str) -> None:
        """Register a token that was issued to a client. Raises AccessError."""
        now = self._clock()
        detail = f"client {grant.client_id}, permissions {','.join(sorted(grant.permissions)) or 'none'}"

        def work(connection: sqlite3.Connection) -> None:
            register.add(connection, grant, actor)
            audit.record(connection, _act(now, actor, origin, "token issued", f"jti {grant.token_id}", detail))

        await self._access.write(work)

    async def revoke(self, target: Target, name: str, *, actor: str, origin: str) -> Revoked:
        """Revoke tokens for good. Raises ValueError for a name that cannot be one, AccessError if it is not stored.

        A token is revoked with its family: with the tokens that it was refreshed from, and those refreshed from it. Of
        a client, the tokens issued until now are revoked. Tokens name their time of issue in whole seconds, so this
        returns in the next second: a token issued afterwards is accepted.
        """
        check_name(target, name)
        now = self._clock()

        def work(connection: sqlite3.Connection) -> int:
            tokens = _WORK[target](connection, name, now)
            audit.record(connection, _act(now, actor, origin, "token revoked", f"{target} {name}", f"{tokens} tokens"))
            return tokens

        tokens = await self._access.write(work)
        await self._revoked()
        if target is Target.CLIENT:
            await self._sleep(1.0 - now % 1.0)
        return Revoked(target, name, now, tokens)


def check_name(target: Target, name: str) -> None:
    """Raise ValueError for a text that cannot name what is to be revoked."""
    if target is Target.TOKEN and name.count(".") == 2:
        raise ValueError("found a token, expected its id: `whaled token inspect FILE` shows it as `jti`")
    limit = MAX_CLIENT_ID if target is Target.CLIENT else MAX_NAME
    if not 0 < len(name) <= limit or not name.isprintable():
        raise ValueError(f"found the {target} {name[:80]!r}; allowed are 1 to {limit} printable characters")


def _act(at: float, actor: str, origin: str, act: str, target: str, detail: str) -> Act:
    return Act(at=at, actor=actor, origin=origin, act=act, target=target, detail=detail)


def _revoke_token(connection: sqlite3.Connection, jti: str, now: float) -> int:
    # The first token of a family gives it its name, so an id that is not registered may be a family's.
    family = register.family_of_token(connection, jti) or jti
    until = register.last_expiry(connection, family, now)
    register.revoke(connection, Revocation(Kind.TOKEN, jti, now, until))
    register.revoke(connection, Revocation(Kind.FAMILY, family, now, until))
    return register.live(connection, "family", family, now)


def _revoke_client(connection: sqlite3.Connection, client_id: str, now: float) -> int:
    register.revoke(connection, Revocation(Kind.CLIENT, client_id, now, now + register.LONGEST_S))
    return register.live(connection, "client_id", client_id, now)


def _revoke_key(connection: sqlite3.Connection, kid: str, now: float) -> int:
    register.revoke(connection, Revocation(Kind.KEY, kid, now, now + register.LONGEST_S))
    return register.live(connection, "kid", kid, now)


_WORK: dict[Target, Callable[[sqlite3.Connection, str, float], int]] = {
    Target.TOKEN: _revoke_token,
    Target.CLIENT: _revoke_client,
    Target.KEY: _revoke_key,
}
