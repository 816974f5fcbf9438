"""Access tokens of an issuer (RFC 9068 and what providers issue in its place): signature, claims, and the grant. Pure.

The algorithm must be one that the operator allows for the issuer, and the key must be of its kind; neither comes from
the token. A verification takes 0.06 to 0.4 ms, by the algorithm (docs/oidc.md).
"""

import base64
import binascii
import hashlib
import re
from typing import Any, NamedTuple

import jwt
import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from whaled.auth.oidc.keyset import KeySet
from whaled.auth.signature import MAX_TOKEN_BYTES
from whaled.auth.tokens import MAX_CLIENT_ID, MAX_NAME, is_client_id, time_claim
from whaled.config import units
from whaled.config.claims import ClaimRule, claim_path, claim_rule
from whaled.config.sections import Algorithm, IssuerSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import CredentialKind, Grant, Permission

# Lists of words in one text (RFC 6749, 3.3; `scp` of Entra). Other texts are compared whole: a role may have spaces.
WORD_LISTS = (("scope",), ("scp",))
# ID tokens have the audience of the client and `typ` JWT as well; other types (`logout+jwt`) say what they are.
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
# The parts of a token, base64url without padding (RFC 7515, 2).
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")


class _Header(Struct, frozen=True):
    """The relevant fields of a token's header. `crit` lists mandatory extensions, of which whaled supports none."""

    alg: str
    kid: str | None = None
    typ: str | None = None
    crit: Raw | UnsetType = UNSET
    b64: Raw | UnsetType = UNSET


class _Stated(Struct, frozen=True):
    """The issuer that a payload states, unverified."""

    iss: str


class _Claimed(Struct, frozen=True):
    """The identity that a payload claims, unverified."""

    sub: str = ""
    client_id: str = ""


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_stated = msgspec.json.Decoder(_Stated).decode
_decode_claimed = msgspec.json.Decoder(_Claimed).decode
_DECODING = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, binascii.Error)
_JWS = jwt.PyJWS()


class Policy(NamedTuple):
    """The claims that a token of one issuer must have and the permissions they grant, prepared from the settings.

    `mark` changes with everything that could change the grant of a token.
    """

    settings: IssuerSettings
    algorithms: dict[str, Algorithm]
    client_id: tuple[str, ...]
    rules: tuple[tuple[ClaimRule, Permission], ...]
    longest_s: float
    mark: str

    @classmethod
    def of(cls, settings: IssuerSettings, longest_s: float) -> "Policy":
        """Prepare the policy of an issuer whose tokens are valid for at most `longest_s` from now."""
        listed = (
            (settings.read, Permission.READ), (settings.write, Permission.WRITE), (settings.admin, Permission.ADMIN),
        )  # fmt: skip
        deciding = (
            settings.name, settings.issuer, settings.audience, settings.algorithms, settings.client_id_claim,
            settings.read, settings.write, settings.admin,
        )  # fmt: skip
        return cls(
            settings,
            {each.value: each for each in settings.algorithms},
            claim_path(settings.client_id_claim),
            tuple((claim_rule(text), permission) for texts, permission in listed for text in texts),
            longest_s,
            hashlib.blake2b(msgspec.json.encode(deciding), digest_size=8, person=b"whaled issuer").hexdigest(),
        )


class UnknownKeyError(TokenError):
    """A token that names a key which the issuer's key set does not have: the set may have changed."""


def stated_issuer(token: str) -> str | None:
    """Return the `iss` of a token, unverified; None for anything that is not a token with one. Takes about 5 us."""
    if len(token) > MAX_TOKEN_BYTES or not _SHAPE.match(token):
        return None
    try:
        return _decode_stated(_bytes_of(token.split(".")[1])).iss
    except _DECODING:
        return None


def verified(token: str, policy: Policy, keys: KeySet | None, now: float) -> Grant:
    """Verify a token that states the policy's issuer, and return its grant. `keys` is None before the first fetch.

    Raises TokenError, and UnknownKeyError if a newer key set might verify the token.
    """
    client_id = ""
    try:
        header, claims = _opened(token, policy, keys)
        # From here on the signature is valid.
        client_id = _client_id(claims, policy)
        return _grant(claims, client_id, header.kid, policy, now)
    except TokenError as error:
        kind = type(error)
        raise kind(error.reason, error.detail, claimant=_claimant(token, policy), client_id=client_id) from None


def _opened(token: str, policy: Policy, keys: KeySet | None) -> tuple[_Header, dict[str, Any]]:
    """Return the header and the claims of a token with a valid signature. Raises TokenError."""
    if len(token) > MAX_TOKEN_BYTES or not _SHAPE.match(token):
        raise TokenError(TokenRefusal.MALFORMED, "not three parts of base64url")
    first, payload, _ = token.split(".")
    try:
        header = _decode_header(_bytes_of(first))
    except _DECODING:
        raise TokenError(TokenRefusal.MALFORMED, "the header is not a JSON object with `alg`") from None
    if header.crit is not UNSET or header.b64 is not UNSET:
        raise TokenError(TokenRefusal.MALFORMED, "`crit` and `b64` are not understood")
    if header.typ is not None and header.typ.lower() not in TYPES:
        raise TokenError(TokenRefusal.MALFORMED, f"`typ` is {header.typ[:40]!r}, not that of an access token")
    algorithm = policy.algorithms.get(header.alg)
    if algorithm is None:
        raise TokenError(TokenRefusal.BAD_SIGNATURE, f"the algorithm {header.alg[:20]!r} is not allowed for the issuer")
    key = keys.find(header.kid, algorithm) if keys is not None else None
    if key is None:
        raise UnknownKeyError(TokenRefusal.UNKNOWN_KEY, f"key id {str(header.kid)[:40]!r} for {algorithm}")
    try:
        _JWS.decode_complete(token, key.key, algorithms=[algorithm.value])
        claims = msgspec.json.decode(_bytes_of(payload))
    except jwt.InvalidSignatureError:
        raise TokenError(TokenRefusal.BAD_SIGNATURE) from None
    except (jwt.PyJWTError, ValueError, *_DECODING) as error:
        raise TokenError(TokenRefusal.MALFORMED, str(error)[:80]) from None
    if not isinstance(claims, dict):
        raise TokenError(TokenRefusal.MALFORMED, "the claims are not a JSON object")
    return header, claims


def _grant(claims: dict[str, Any], client_id: str, kid: str | None, policy: Policy, now: float) -> Grant:
    settings = policy.settings
    if claims.get("iss") != settings.issuer:
        raise TokenError(TokenRefusal.BAD_CLAIMS, f"`iss` is not {settings.issuer!r}")
    audience = claims.get("aud")
    if settings.audience not in (audience if isinstance(audience, list) else [audience]):
        raise TokenError(TokenRefusal.BAD_CLAIMS, f"`aud` is not {settings.audience!r}")
    if "cnf" in claims:
        raise TokenError(
            TokenRefusal.BAD_CLAIMS, "`cnf`: it is bound to a key of its client, which is not checked here"
        )
    expires_at = time_claim(claims, "exp")
    if expires_at is None:
        raise TokenError(TokenRefusal.BAD_CLAIMS, "`exp` is missing")
    over_s = now - expires_at
    if over_s >= settings.leeway:
        raise TokenError(TokenRefusal.EXPIRED, f"`exp` was {over_s:.0f} s ago")
    if -over_s > policy.longest_s + settings.leeway:
        raise TokenError(TokenRefusal.TOO_LONG, f"it lives longer than {units.show_duration(policy.longest_s)}")
    for name in ("nbf", "iat"):
        ahead_s = (time_claim(claims, name) or 0.0) - now
        if ahead_s > settings.leeway:
            raise TokenError(TokenRefusal.NOT_YET_VALID, f"`{name}` is {ahead_s:.0f} s ahead of this clock")
    token_id = claims.get("jti")
    issued_at = time_claim(claims, "iat")
    return Grant(
        client_id=client_id,
        permissions=frozenset(permission for rule, permission in policy.rules if matches(rule, claims)),
        issued_at=issued_at,
        authenticated_at=issued_at,
        expires_at=expires_at,
        token_id=token_id if isinstance(token_id, str) and 0 < len(token_id) <= MAX_NAME else None,
        key_id=kid,
        key_mark=policy.mark,
        kind=CredentialKind.OIDC,
        issuer=settings.issuer,
    )


def matches(rule: ClaimRule, claims: dict[str, Any]) -> bool:
    """Return whether a claim has the value of a rule."""
    found = _at(claims, rule.path)
    if isinstance(found, str):
        return found == rule.value or (rule.path in WORD_LISTS and rule.value in found.split(" "))
    if isinstance(found, list):
        return rule.value in found
    return found is True and rule.value == "true"


def _at(claims: dict[str, Any], path: tuple[str, ...]) -> object:
    found: object = claims
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _client_id(claims: dict[str, Any], policy: Policy) -> str:
    """Return the client's id: the name of the issuer, a colon, and the claim. No other credential has such an id."""
    found = _at(claims, policy.client_id)
    client_id = f"{policy.settings.name}:{found}"
    if not isinstance(found, str) or not found or not is_client_id(client_id):
        most = MAX_CLIENT_ID - len(policy.settings.name) - 1
        name = ".".join(policy.client_id)
        raise TokenError(TokenRefusal.BAD_CLAIMS, f"`{name}` must be a text of 1 to {most} printable characters")
    return client_id


def _claimant(token: str, policy: Policy) -> str:
    """Return a short name for the identity that a refused token claims, to count failures; "" if it is unreadable."""
    try:
        claimed = _decode_claimed(_bytes_of(token.split(".")[1]))
    except (IndexError, *_DECODING):
        return ""
    name = f"{policy.settings.name}\n{claimed.sub}\n{claimed.client_id}".encode(errors="replace")
    return hashlib.blake2b(name, digest_size=8).hexdigest()


def _bytes_of(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
