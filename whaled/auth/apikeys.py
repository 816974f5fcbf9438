"""API keys in memory: verification of a presented key, and what a key grants. Pure: `now` is an argument.

Every refusal takes the same steps: form and checksum, one SHA-256, one look-up by the digest, one comparison in
constant time, one judgement. A stand-in replaces what is missing. The look-up reveals nothing by its time, since an
attacker cannot choose the digest of a key.
"""

import hmac
from collections.abc import Iterable

from msgspec import Struct

from whaled.auth.apikeytext import SECRET_BYTES, STAND_IN, digest_of, is_key
from whaled.errors import TokenError, TokenRefusal
from whaled.model import CredentialKind, Grant, Permission

# The most keys that are not revoked, at about 1 KB each in memory and 10 us each to load.
MAX_KEYS = 10_000


class ApiKey(Struct, frozen=True, kw_only=True):
    """The stored data of a key: never the key itself, only its digest. Times are in Unix seconds.

    `id` is public. `fixed_filter` is a filter of the protocol as JSON, which applies in addition to the client's own.
    `networks` are CIDR blocks, empty for any address. `rate` is in messages a second, None for the configured one.
    """

    id: str
    digest: bytes
    client_id: str
    permissions: frozenset[Permission]
    created_at: float
    created_by: str
    comment: str = ""
    fixed_filter: str | None = None
    rate: float | None = None
    networks: tuple[str, ...] = ()
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None

    def __repr__(self) -> str:
        """Return a text without the digest."""
        return f"ApiKey(id={self.id!r}, client_id={self.client_id!r})"

    @property
    def grant(self) -> Grant:
        """The grant of the client that presents the key."""
        return Grant(
            client_id=self.client_id,
            permissions=self.permissions,
            issued_at=self.created_at,
            authenticated_at=self.created_at,
            expires_at=self.expires_at,
            token_id=self.id,
            kind=CredentialKind.API_KEY,
            networks=self.networks,
            fixed_filter=self.fixed_filter,
            rate=self.rate,
        )

    def state(self, now: float) -> str:
        """Return `active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"


_STAND_IN = ApiKey(
    id="stand-in",
    digest=bytes(SECRET_BYTES),
    client_id="stand-in",
    permissions=frozenset(),
    created_at=0.0,
    created_by="",
    expires_at=1.0,
)


class ApiKeys:
    """The keys in memory, by digest and by id."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._by_digest: dict[bytes, ApiKey] = {}
        self._by_id: dict[str, ApiKey] = {}
        self._used: dict[str, float] = {}
        self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Use these keys instead. `is_in_force` then decides which sessions end."""
        self._by_id = {key.id: key for key in keys}
        self._by_digest = {key.digest: key for key in self._by_id.values()}

    def verify(self, credential: str, now: float) -> Grant:
        """Verify a key and return its grant. Raises TokenError.

        Whether the client's address is in one of the networks of the grant is for the gateway to check.
        """
        is_whole = is_key(credential)
        digest = digest_of(credential if is_whole else STAND_IN)
        key = self._by_digest.get(digest)
        judged = key if key is not None else _STAND_IN
        is_same = hmac.compare_digest(judged.digest, digest)
        state = judged.state(now)
        grant = judged.grant
        if is_same and key is not None and is_whole and state == "active":
            self._used[key.id] = now
            return grant
        claimant = digest.hex()[:16] if is_whole else ""
        if not is_whole:
            raise TokenError(TokenRefusal.MALFORMED, "not the form or the checksum of an API key")
        if key is None or not is_same:
            raise TokenError(TokenRefusal.UNKNOWN_API_KEY, claimant=claimant)
        reason = TokenRefusal.REVOKED if state == "revoked" else TokenRefusal.EXPIRED
        raise TokenError(reason, f"API key {key.id}", claimant=claimant, client_id=key.client_id)

    def is_in_force(self, grant: Grant, now: float) -> bool:  # noqa: ARG002 - every verifier is called like this
        """Return whether the key of an open session exists and is not revoked. The session itself ends at its expiry.

        A key is never changed, so one with other contents under the same id is another key.
        """
        key = self._by_id.get(grant.token_id or "")
        return key is not None and key.revoked_at is None and key.grant == grant

    def take_uses(self) -> dict[str, float]:
        """Return the time of the last use of each key that was used since the previous call."""
        used, self._used = self._used, {}
        return used

    def give_back(self, uses: dict[str, float]) -> None:
        """Add uses that could not be written to those of the next call of `take_uses`."""
        self._used = uses | self._used

    def count(self, now: float) -> int:
        """Return the number of keys that would be accepted."""
        return sum(key.state(now) == "active" for key in self._by_id.values())
