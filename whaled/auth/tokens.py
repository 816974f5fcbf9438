"""Tokens: JSON Web Tokens (RFC 7519) signed with a key of the ring. Pure: `now` is an argument.

The algorithm belongs to the key and never comes from the token; an unknown key id is refused before any cryptography.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jwt
from msgspec import Struct

from whaled.config.sections import Auth
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant, Permission

ALGORITHM = "HS256"
# RFC 7518, 3.2: an HMAC key is at least as long as the hash.
MIN_SECRET_BYTES = 32
# A token of ours has some 300 bytes; nothing larger is worth parsing.
MAX_TOKEN_BYTES = 8 * 1024
API_KEY_PREFIX = "whk_"


class SigningKey(Struct, frozen=True):
    """A key by its id. Without an id (a single secret from the environment) tokens carry none either."""

    kid: str | None
    secret: bytes

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
) -> tuple[str, Grant]:
    """A token that ends after `ttl_s`, and what it grants. Raises ValueError where `verify` would refuse it."""
    if not client_id:
        raise ValueError("a token needs a client id")
    if not 0 < ttl_s <= settings.max_token_ttl:
        raise ValueError(f"a token lives at most auth.max_token_ttl ({settings.max_token_ttl:g} s), not {ttl_s:g} s")
    granted = sorted(set(permissions))
    claims: dict[str, Any] = {
        "client_id": client_id,
        "permissions": [str(permission) for permission in granted],
        "iat": int(now),
        "exp": math.ceil(now + ttl_s),
        "jti": token_id,
    }
    if settings.issuer is not None:
        claims["iss"] = settings.issuer
    if settings.audience is not None:
        claims["aud"] = settings.audience
    key = ring.signing
    headers = {"kid": key.kid} if key.kid is not None else None
    token = jwt.encode(claims, key.secret, algorithm=ALGORITHM, headers=headers)
    return token, _grant(claims, key)


def verify(ring: KeyRing, token: str, now: float, settings: Auth) -> Grant:
    """Who a token is and what it may do. Raises TokenError."""
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenError(TokenRefusal.MALFORMED, f"longer than {MAX_TOKEN_BYTES} bytes")
    key = _key_of(ring, token)
    claims = _claims(key, token)
    for name, expected in (("iss", settings.issuer), ("aud", settings.audience)):
        if expected is not None and not _holds(claims.get(name), expected):
            raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` is not {expected!r}")
    grant = _grant(claims, key)
    if grant.expires_at is None or now >= grant.expires_at:
        raise TokenError(TokenRefusal.EXPIRED)
    not_before = claims.get("nbf")
    if isinstance(not_before, int | float) and now < not_before:
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
    # Times are compared by `verify`, with the clock it was given; the library would ask the system's.
    unchecked = {
        "verify_exp": False,
        "verify_nbf": False,
        "verify_iat": False,
        "verify_aud": False,
        "verify_iss": False,
    }
    try:
        claims: dict[str, Any] = jwt.decode(token, key.secret, algorithms=[ALGORITHM], options=unchecked)  # type: ignore[arg-type]
    except jwt.InvalidSignatureError as error:
        raise TokenError(TokenRefusal.BAD_SIGNATURE) from error
    except jwt.InvalidAlgorithmError as error:
        raise TokenError(TokenRefusal.BAD_SIGNATURE, "another algorithm than the key's") from error
    except (jwt.InvalidTokenError, jwt.PyJWTError) as error:
        raise TokenError(TokenRefusal.MALFORMED, str(error)) from error
    return claims


def _grant(claims: dict[str, Any], key: SigningKey) -> Grant:
    client_id, expires_at, named = claims.get("client_id"), claims.get("exp"), claims.get("permissions", [])
    if not isinstance(client_id, str) or not client_id:
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`client_id` must be a text that is not empty")
    if not _is_time(expires_at):
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`exp` must be a time")
    if not isinstance(named, list):
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`permissions` must be a list")
    issued_at, token_id = claims.get("iat"), claims.get("jti")
    return Grant(
        client_id=client_id,
        # A name this version does not know grants nothing: a newer issuer may have more of them.
        permissions=frozenset(permission for permission in Permission if permission.value in named),
        issued_at=float(issued_at) if _is_time(issued_at) else None,
        expires_at=float(expires_at),
        token_id=token_id if isinstance(token_id, str) else None,
        key_id=key.kid,
    )


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e11


def _holds(claim: object, expected: str) -> bool:
    return claim == expected or (isinstance(claim, list) and expected in claim)


class TokenAuthenticator:
    """Judges credentials with one key ring. `new_token_id` makes the `jti` of refreshed tokens."""

    def __init__(self, ring: KeyRing, settings: Auth, *, new_token_id: Callable[[], str]) -> None:
        self._ring = ring
        self._settings = settings
        self._new_token_id = new_token_id

    def verify(self, credential: str, now: float) -> Grant:
        """Who this is and what it may do. Raises TokenError."""
        if credential.startswith(API_KEY_PREFIX):
            raise TokenError(TokenRefusal.MALFORMED, "API keys are not known to this server")
        return verify(self._ring, credential, now, self._settings)

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """A new token of the same client with the same permissions, as long as the last one was issued for.

        Raises TokenError where the last one has ended.
        """
        if grant.expires_at is None or now >= grant.expires_at + self._settings.expiry_grace:
            raise TokenError(TokenRefusal.EXPIRED)
        ttl_s = self._settings.token_ttl
        if grant.issued_at is not None:
            ttl_s = min(ttl_s, grant.expires_at - grant.issued_at)
        return issue(
            self._ring,
            client_id=grant.client_id,
            permissions=grant.permissions,
            ttl_s=max(1.0, ttl_s),
            now=now,
            token_id=self._new_token_id(),
            settings=self._settings,
        )
