"""Tokens: JSON Web Tokens (RFC 7519) signed with a key of the ring. Pure: `now` is an argument.

The algorithm is a property of the key and never comes from the token. Every refusal takes the same steps (`signature`)
and costs about 20 us; an accepted token is also verified by PyJWT.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jwt
import msgspec
from msgspec import Struct

from whaled.auth.families import Families
from whaled.auth.signature import ALGORITHM, claimant, open_token
from whaled.config import units
from whaled.config.fields import MAX_LEEWAY_S
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant, Permission

# RFC 7518, 3.2: an HMAC key must be at least as long as the hash.
MIN_SECRET_BYTES = 32
# A client id appears in log lines, so its length is limited.
MAX_CLIENT_ID = 256
# Maximum length of `jti` and `family`, which are kept in memory for the life of a family. Those of whaled have 22
# characters, a UUID has 36.
MAX_NAME = 128
FAMILY_ENDED = "a token of its family was refreshed twice"
# Later times (the year 5138) are invalid; arithmetic with the others cannot overflow.
LATEST_TIME = 1e11
_PERMISSIONS = {permission.value: permission for permission in Permission}
# `_judge` compares the times with the `now` passed in; the library would read the system's clock.
_JWT = jwt.PyJWT(
    {
        "enforce_minimum_key_length": True,
        "verify_exp": False,
        "verify_nbf": False,
        "verify_iat": False,
        "verify_aud": False,
        "verify_iss": False,
        "verify_sub": False,
        "verify_jti": False,
    }
)


class SigningKey(Struct, frozen=True):
    """A signing key. Without an id (a single secret from the environment), its tokens have no key id either.

    `created_at` is in Unix seconds, 0 if it was not recorded.
    """

    kid: str | None
    secret: bytes
    created_at: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for a secret that is too short."""
        if len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret of {len(self.secret)} bytes; at least {MIN_SECRET_BYTES} are needed")

    @property
    def mark(self) -> str:
        """A fingerprint that distinguishes keys with the same id and reveals nothing about the secret."""
        return hashlib.blake2b(self.secret, digest_size=8, person=b"whaled key").hexdigest()

    def __repr__(self) -> str:
        """Return a text without the secret, because it appears in logs and tracebacks."""
        return f"SigningKey(kid={self.kid!r})"


class KeyRing(Struct, frozen=True):
    """The keys that verify tokens and the one that signs them. Retired keys are not part of it.

    `source` names where the keys come from, for the operator.
    """

    signing: SigningKey
    verifying: tuple[SigningKey, ...]
    source: str = ""

    def find(self, kid: object) -> SigningKey | None:
        """Return the key with an id, None if there is none."""
        return next((key for key in self.verifying if key.kid == kid), None)

    def secret_of(self, kid: str | None) -> bytes | None:
        """Return the secret of the key with an id, None if there is none."""
        key = self.find(kid)
        return key.secret if key is not None else None


class Chain(Struct, frozen=True):
    """The data that a refreshed token inherits: the time of issue of the first token, and the family's identifier."""

    began: float
    family: str


def issue(
    ring: KeyRing,
    *,
    client_id: str,
    permissions: Iterable[Permission],
    ttl_s: float,
    now: float,
    token_id: str,
    settings: AuthSettings,
    chain: Chain | None = None,
) -> tuple[str, Grant]:
    """Issue a token that expires after `ttl_s`. Return it with its grant.

    `chain` is the data that a refreshed token inherits, None for a first token. Raises ValueError for a client id or a
    lifetime that `verify` would refuse.
    """
    check_client_id(client_id)
    if not 0 < ttl_s <= settings.max_token_ttl:
        longest = units.show_duration(settings.max_token_ttl)
        raise ValueError(
            f"found a ttl of {units.show_duration(ttl_s)}; allowed is up to {longest} (auth.max_token_ttl)"
        )
    granted = sorted(set(permissions))
    issued_at = int(now)
    claims: dict[str, Any] = {
        "client_id": client_id,
        "permissions": [str(permission) for permission in granted],
        "iat": issued_at,
        # Counted from the whole second, so that a refresh, which derives the lifetime from `exp` and `iat`, never
        # lengthens it.
        "exp": issued_at + math.ceil(ttl_s),
        "jti": token_id,
    }
    if chain is not None:
        claims["auth_time"] = int(chain.began)
        claims["family"] = chain.family
    if settings.issuer is not None:
        claims["iss"] = settings.issuer
    if settings.audience is not None:
        claims["aud"] = settings.audience
    key = ring.signing
    headers = {"kid": key.kid} if key.kid is not None else None
    token = _JWT.encode(claims, key.secret, algorithm=ALGORITHM, headers=headers)
    return token, _grant(claims, key)


def verify(ring: KeyRing, token: str, now: float, settings: AuthSettings) -> Grant:
    """Verify a token and return its grant. Raises TokenError."""
    grant, claims = _checked(ring, token, now, settings)
    _confirm(ring, token, grant, claims)
    return grant


def _checked(ring: KeyRing, token: str, now: float, settings: AuthSettings) -> tuple[Grant, dict[str, Any]]:
    """Return the grant and the claims of a token that is signed with a key of the ring and valid now.

    Raises TokenError. Refusals take the same steps whatever the reason: without a valid signature, the claims of a
    stand-in are evaluated.
    """
    opened = open_token(token, ring.secret_of)
    grant = None
    try:
        claims = _claims(opened.claims)
        grant = _grant(claims, ring.find(opened.kid))
        _judge(grant, claims, now, settings)
    except TokenError as error:
        reason, detail, client_id = error.reason, error.detail, grant.client_id if grant is not None else ""
        if opened.problem is not None:
            reason, detail, client_id = opened.problem, opened.detail, ""
        raise TokenError(reason, detail, claimant=claimant(token), client_id=client_id) from None
    if opened.problem is not None:  # unreachable as long as the stand-in's claims have expired
        raise TokenError(opened.problem, opened.detail, claimant=claimant(token))
    return grant, claims


def _judge(grant: Grant, claims: dict[str, Any], now: float, settings: AuthSettings) -> None:
    """Raise TokenError if a grant is not valid now, or not for this server."""
    assert grant.expires_at is not None
    over_s = now - grant.expires_at
    if over_s >= settings.leeway:
        raise TokenError(TokenRefusal.EXPIRED, f"`exp` was {over_s:.0f} s ago")
    for name in ("nbf", "iat"):
        ahead_s = (time_claim(claims, name) or 0.0) - now
        if ahead_s > settings.leeway:
            raise TokenError(TokenRefusal.NOT_YET_VALID, f"`{name}` is {ahead_s:.0f} s ahead of this clock")
    # Lifetimes are whole seconds, rounded up (`issue`).
    longest_s = math.ceil(settings.max_token_ttl)
    lives_s = grant.expires_at - grant.issued_at if grant.issued_at is not None else 0.0
    if lives_s > longest_s or grant.expires_at - now > longest_s + settings.leeway:
        raise TokenError(TokenRefusal.TOO_LONG, f"it lives longer than {units.show_duration(settings.max_token_ttl)}")
    for name, expected in (("iss", settings.issuer), ("aud", settings.audience)):
        if expected is not None and not _holds(claims.get(name), expected):
            raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` is not {expected!r}")


def _confirm(ring: KeyRing, token: str, grant: Grant, claims: dict[str, Any]) -> None:
    """Verify a token once more before it is accepted: PyJWT must decode the same claims. Raises TokenError."""
    secret = ring.secret_of(grant.key_id)
    assert secret is not None
    try:
        read = _JWT.decode(token, secret, algorithms=[ALGORITHM])
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise TokenError(TokenRefusal.MALFORMED, str(error)) from error
    if read != claims:
        raise TokenError(TokenRefusal.MALFORMED, "two decoders of its claims disagree")


def _claims(raw: bytes) -> dict[str, Any]:
    try:
        claims = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise TokenError(TokenRefusal.MALFORMED, "the claims are not JSON") from error
    if not isinstance(claims, dict):
        raise TokenError(TokenRefusal.MALFORMED, "the claims are not JSON object")
    return claims


def _grant(claims: dict[str, Any], key: SigningKey | None) -> Grant:
    client_id, named = claims.get("client_id"), claims.get("permissions", [])
    token_id, family = _name(claims, "jti"), _name(claims, "family")
    if not is_client_id(client_id):
        raise TokenError(
            TokenRefusal.BAD_CLAIMS, f"`client_id` must be a text of 1 to {MAX_CLIENT_ID} printable characters"
        )
    expires_at, issued_at = time_claim(claims, "exp"), time_claim(claims, "iat")
    if expires_at is None:
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`exp` is missing")
    if not isinstance(named, list):
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`permissions` must be a list")
    authenticated_at = time_claim(claims, "auth_time")
    return Grant(
        client_id=client_id,
        # An unknown name grants nothing and is not an error: a newer issuer may have more permissions.
        permissions=frozenset(_PERMISSIONS[name] for name in named if isinstance(name, str) and name in _PERMISSIONS),
        issued_at=issued_at,
        authenticated_at=authenticated_at if authenticated_at is not None else issued_at,
        expires_at=expires_at,
        token_id=token_id,
        family=family if family is not None else token_id,
        key_id=key.kid if key is not None else None,
        key_mark=key.mark if key is not None else None,
    )


def _name(claims: dict[str, Any], name: str) -> str | None:
    """Return a claim that is a short text, None for anything else."""
    value = claims.get(name)
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None


def is_client_id(value: object) -> TypeGuard[str]:
    """Return whether a value may name a client."""
    return isinstance(value, str) and 0 < len(value) <= MAX_CLIENT_ID and value.isprintable()


def check_client_id(client_id: str) -> None:
    """Raise ValueError for a text that cannot name a client."""
    if not is_client_id(client_id):
        raise ValueError(
            f"found the client id {client_id[:80]!r}; allowed are 1 to {MAX_CLIENT_ID} printable characters"
        )


def time_claim(claims: dict[str, Any], name: str) -> float | None:
    """Return a claim that is a time, None if it is missing. Raises TokenError for anything else."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST_TIME:  # false for nan
        return float(value)
    raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` must be a time")


def _holds(claim: object, expected: str) -> bool:
    return claim == expected or (isinstance(claim, list) and expected in claim)


class TokenAuthenticator:
    """Verifies and refreshes tokens with one key ring. `new_token_id` generates the `jti` of refreshed tokens."""

    def __init__(self, ring: KeyRing, settings: AuthSettings, *, new_token_id: Callable[[], str]) -> None:
        self._ring = ring
        self._settings = settings
        self._new_token_id = new_token_id
        self._families = Families()

    def replace_ring(self, ring: KeyRing, settings: AuthSettings) -> None:
        """Verify and sign with other keys from now on. `is_in_force` then decides which sessions end."""
        self._ring = ring
        self._settings = settings

    def verify(self, credential: str, now: float) -> Grant:
        """Verify a token and return its grant. Raises TokenError."""
        grant, claims = _checked(self._ring, credential, now, self._settings)
        if self._families.is_ended(family_of(grant), now):
            raise TokenError(
                TokenRefusal.REVOKED, FAMILY_ENDED, claimant=claimant(credential), client_id=grant.client_id
            )
        _confirm(self._ring, credential, grant, claims)
        return grant

    def is_in_force(self, grant: Grant, now: float) -> bool:
        """Return whether a session's token is still accepted: its key is in the ring, its family has not ended."""
        key = self._ring.find(grant.key_id)
        return key is not None and key.mark == grant.key_mark and not self._families.is_ended(family_of(grant), now)

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """Issue a new token with the same client, permissions and lifetime as an earlier one. Return it with its grant.

        Refreshed tokens expire at the latest `auth.max_token_ttl` after the first one was issued, so that a stolen
        token cannot be extended without limit. A second refresh of a token ends its family (REVOKED). Raises TokenError
        also if the token has expired, if that limit is reached, or if its key is retired: a refresh would carry the
        token over to the next key.
        """
        settings = self._settings
        family, until = family_of(grant), (grant.expires_at or 0.0) + settings.expiry_grace
        remembered = remembered_until(grant, settings)
        if not self.is_in_force(grant, now):
            raise TokenError(TokenRefusal.UNKNOWN_KEY, f"key id {grant.key_id!r}, or its family has ended")
        if now >= until:
            raise TokenError(TokenRefusal.EXPIRED)
        if not self._families.may_refresh(family, _id_of(grant)):
            self._families.end(family, until=remembered)
            raise TokenError(TokenRefusal.REVOKED, FAMILY_ENDED)
        began = min(grant.authenticated_at, now) if grant.authenticated_at is not None else now
        ttl_s = min(settings.token_ttl, math.floor(began + settings.max_token_ttl - now))
        if grant.issued_at is not None and grant.expires_at is not None:
            ttl_s = min(ttl_s, grant.expires_at - grant.issued_at)
        if ttl_s <= 0:
            raise TokenError(TokenRefusal.EXPIRED, "auth.max_token_ttl after the first token of its chain")
        token, refreshed = issue(
            self._ring,
            client_id=grant.client_id,
            permissions=grant.permissions,
            ttl_s=ttl_s,
            now=now,
            token_id=self._new_token_id(),
            settings=settings,
            chain=Chain(began, grant.family or _id_of(grant)),
        )
        ends = max(remembered, remembered_until(refreshed, settings))
        self._families.refreshed(family_of(refreshed), _id_of(refreshed), until=ends)
        return token, refreshed

    def ended_until(self, grant: Grant) -> float:
        """Return the time until which the ended family of a token is remembered."""
        return self._families.ended_until(family_of(grant))

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        """Record that the connection broke right after a refresh.

        The client may have only the old token, which may then be refreshed once more.
        """
        self._families.answer_lost(family_of(child), _id_of(parent), _id_of(child))


def remembered_until(grant: Grant, settings: AuthSettings) -> float:
    """Return the time after which a token is refused as expired whatever leeway a reload may set."""
    return (grant.expires_at or 0.0) + max(settings.expiry_grace, MAX_LEEWAY_S)


def _id_of(grant: Grant) -> str:
    """Return the identifier of a token: its `jti`, or its times if it has none."""
    return grant.token_id or f"{grant.issued_at}:{grant.expires_at}"


def family_of(grant: Grant) -> str:
    """Return the identifier of a token's family.

    It includes the client id, so that no client can end the family of another, whatever ids an external issuer uses.
    """
    return f"{grant.client_id}\n{grant.family or _id_of(grant)}"
