"""Tokens: JSON Web Tokens (RFC 7519) signed with a key of the ring. Pure: `now` is an argument.

The algorithm belongs to the key and never comes from the token; an unknown key id is refused before any cryptography.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jwt
from msgspec import Struct

from whaled.config import units
from whaled.config.sections import Auth
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant, Permission

ALGORITHM = "HS256"
# RFC 7518, 3.2: an HMAC key is at least as long as the hash.
MIN_SECRET_BYTES = 32
# A token of ours has some 300 bytes; nothing larger is worth parsing.
MAX_TOKEN_BYTES = 8 * 1024
API_KEY_PREFIX = "whk_"
# It stands in log lines; nobody has a longer name.
MAX_CLIENT_ID = 256
# Times beyond it (the year 5138) are no times, and what follows can compute with them safely.
LATEST_TIME = 1e11
# Times are compared by `verify`, with the clock it was given; the library would ask the system's.
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
    """A key by its id. Without an id (a single secret from the environment) tokens carry none either.

    `created_at` is Unix seconds, 0 where nobody wrote it down.
    """

    kid: str | None
    secret: bytes
    created_at: float = 0.0

    def __post_init__(self) -> None:
        """A key that can be guessed is none."""
        if len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret of {len(self.secret)} bytes; at least {MIN_SECRET_BYTES} are needed")

    def __repr__(self) -> str:
        """Without the secret: this ends up in logs and tracebacks."""
        return f"SigningKey(kid={self.kid!r})"


class KeyRing(Struct, frozen=True):
    """The keys that verify, by id, and the one that signs. Retired keys are not part of it."""

    signing: SigningKey
    verifying: tuple[SigningKey, ...]

    def find(self, kid: object) -> SigningKey | None:
        """The key with an id, None if there is none."""
        return next((key for key in self.verifying if key.kid == kid), None)


def issue(
    ring: KeyRing,
    *,
    client_id: str,
    permissions: Iterable[Permission],
    ttl_s: float,
    now: float,
    token_id: str,
    settings: Auth,
    authenticated_at: float | None = None,
) -> tuple[str, Grant]:
    """A token that ends after `ttl_s`, and what it grants. Raises ValueError where `verify` would refuse it.

    `authenticated_at` is when the first token of a chain of refreshed ones was issued, None for the first itself.
    """
    if not _is_client_id(client_id):
        raise ValueError(
            f"found the client id {client_id[:80]!r}; allowed are 1 to {MAX_CLIENT_ID} printable characters"
        )
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
        # From the whole second, so that a refresh, which takes the life from these two, never adds to it.
        "exp": issued_at + math.ceil(ttl_s),
        "jti": token_id,
    }
    if authenticated_at is not None:
        claims["auth_time"] = int(authenticated_at)
    if settings.issuer is not None:
        claims["iss"] = settings.issuer
    if settings.audience is not None:
        claims["aud"] = settings.audience
    key = ring.signing
    headers = {"kid": key.kid} if key.kid is not None else None
    token = _JWT.encode(claims, key.secret, algorithm=ALGORITHM, headers=headers)
    return token, _grant(claims, key)


def verify(ring: KeyRing, token: str, now: float, settings: Auth) -> Grant:
    """Who a token is and what it may do. Raises TokenError."""
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise TokenError(TokenRefusal.MALFORMED, f"not at most {MAX_TOKEN_BYTES} characters of base64url and dots")
    key = _key_of(ring, token)
    claims = _claims(key, token)
    for name, expected in (("iss", settings.issuer), ("aud", settings.audience)):
        if expected is not None and not _holds(claims.get(name), expected):
            raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` is not {expected!r}")
    grant = _grant(claims, key)
    if grant.expires_at is None or now >= grant.expires_at:
        raise TokenError(TokenRefusal.EXPIRED)
    not_before = _time(claims, "nbf")
    if not_before is not None and now < not_before:
        raise TokenError(TokenRefusal.NOT_YET_VALID)
    return grant


def _key_of(ring: KeyRing, token: str) -> SigningKey:
    try:
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError as error:
        raise TokenError(TokenRefusal.MALFORMED, str(error)) from error
    key = ring.find(header.get("kid"))
    if key is None:
        raise TokenError(TokenRefusal.UNKNOWN_KEY, f"key id {str(header.get('kid'))[:40]!r}")
    return key


def _claims(key: SigningKey, token: str) -> dict[str, Any]:
    try:
        claims: dict[str, Any] = _JWT.decode(token, key.secret, algorithms=[ALGORITHM])
    except jwt.InvalidSignatureError as error:
        raise TokenError(TokenRefusal.BAD_SIGNATURE) from error
    except jwt.InvalidAlgorithmError as error:
        raise TokenError(TokenRefusal.BAD_SIGNATURE, "another algorithm than the key's") from error
    except (jwt.InvalidTokenError, jwt.PyJWTError) as error:
        raise TokenError(TokenRefusal.MALFORMED, str(error)) from error
    return claims


def _grant(claims: dict[str, Any], key: SigningKey) -> Grant:
    client_id, named, token_id = claims.get("client_id"), claims.get("permissions", []), claims.get("jti")
    if not _is_client_id(client_id):
        raise TokenError(
            TokenRefusal.BAD_CLAIMS, f"`client_id` must be a text of 1 to {MAX_CLIENT_ID} printable characters"
        )
    expires_at, issued_at = _time(claims, "exp"), _time(claims, "iat")
    if expires_at is None:
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`exp` is missing")
    if not isinstance(named, list):
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`permissions` must be a list")
    authenticated_at = _time(claims, "auth_time")
    return Grant(
        client_id=client_id,
        # A name this version does not know grants nothing: a newer issuer may have more of them.
        permissions=frozenset(permission for permission in Permission if permission.value in named),
        issued_at=issued_at,
        authenticated_at=authenticated_at if authenticated_at is not None else issued_at,
        expires_at=expires_at,
        token_id=token_id if isinstance(token_id, str) else None,
        key_id=key.kid,
    )


def _is_client_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_CLIENT_ID and value.isprintable()


def _time(claims: dict[str, Any], name: str) -> float | None:
    """A claim that is a time, None if it is missing. Raises TokenError for anything else."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST_TIME:  # nan is not
        return float(value)
    raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` must be a time")


def _holds(claim: object, expected: str) -> bool:
    return claim == expected or (isinstance(claim, list) and expected in claim)


class TokenAuthenticator:
    """Judges credentials with one key ring. `new_token_id` makes the `jti` of refreshed tokens."""

    def __init__(self, ring: KeyRing, settings: Auth, *, new_token_id: Callable[[], str]) -> None:
        self._ring = ring
        self._settings = settings
        self._new_token_id = new_token_id

    def replace_ring(self, ring: KeyRing, settings: Auth) -> None:
        """Judge and sign with other keys from now on, for sessions that are open too."""
        self._ring = ring
        self._settings = settings

    def verify(self, credential: str, now: float) -> Grant:
        """Who this is and what it may do. Raises TokenError."""
        if credential.startswith(API_KEY_PREFIX):
            raise TokenError(TokenRefusal.MALFORMED, "API keys are not known to this server")
        return verify(self._ring, credential, now, self._settings)

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """A new token of the same client with the same permissions, as long as the last one was issued for.

        However often it is refreshed, it ends `auth.max_token_ttl` after the first was issued: who once stole a token
        does not keep it for ever. Raises TokenError where the last one has ended, that moment has come, or its key is
        retired: a refresh would carry it over to the next key.
        """
        settings = self._settings
        if self._ring.find(grant.key_id) is None:
            raise TokenError(TokenRefusal.UNKNOWN_KEY, f"key id {grant.key_id!r}")
        if grant.expires_at is None or now >= grant.expires_at + settings.expiry_grace:
            raise TokenError(TokenRefusal.EXPIRED)
        began = grant.authenticated_at if grant.authenticated_at is not None else now
        ttl_s = min(settings.token_ttl, math.floor(began + settings.max_token_ttl - now))
        if grant.issued_at is not None:
            ttl_s = min(ttl_s, grant.expires_at - grant.issued_at)
        if ttl_s <= 0:
            raise TokenError(TokenRefusal.EXPIRED, "auth.max_token_ttl after the first token of its chain")
        return issue(
            self._ring,
            client_id=grant.client_id,
            permissions=grant.permissions,
            ttl_s=ttl_s,
            now=now,
            token_id=self._new_token_id(),
            settings=settings,
            authenticated_at=began,
        )
