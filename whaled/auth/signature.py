"""Signed tokens in compact form (RFC 7515) with HMAC-SHA256 or Ed25519, refused in the same steps whatever the reason.

Every token costs one HMAC and one evaluation of claims, and one check of an Ed25519 signature if the ring has such a
key, whichever key the token names. If a token cannot be read, names an unknown key or has a wrong signature, a stand-in
replaces the missing part, so that its refusal takes as long as any other. Pure.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from whaled.auth.eddsa import EDDSA, KeyPair, stand_in
from whaled.errors import TokenRefusal

ALGORITHM = "HS256"
# whaled's own tokens have about 300 bytes; a larger token is not parsed.
MAX_TOKEN_BYTES = 8 * 1024
# Base64url without padding (RFC 7515, 2). Signatures are compared as texts, so only their canonical encoding passes.
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\Z")
MAC_CHARACTERS = 43
# The stand-in is as long as the tokens that `issue` makes. Its secret is no key of any ring, and its claims expired in
# 1970.
STAND_IN_SECRET = b"no key has this name, and this key signs nothing"
STAND_IN_CLAIMS = (
    b'{"client_id":"stand-in","permissions":["read"],"iat":0,"exp":1,'
    b'"jti":"stand-in-0000000000000","family":"stand-in-0000000000000","auth_time":0}'
)


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


_STAND_IN_HEADER = _base64url(b'{"alg":"HS256","typ":"JWT","kid":"stand-in-0000"}')
_STAND_IN = f"{_STAND_IN_HEADER}.{_base64url(STAND_IN_CLAIMS)}.{'A' * MAC_CHARACTERS}"


class Header(Struct, frozen=True):
    """The relevant fields of a token's header. `crit` lists mandatory extensions, of which whaled supports none."""

    alg: str
    kid: str | None = None
    crit: Raw | UnsetType = UNSET
    b64: Raw | UnsetType = UNSET


class _Claimed(Struct, frozen=True):
    """The identity claimed by a payload whose signature was not verified."""

    client_id: str = ""


PairOf = Callable[[str | None], KeyPair | None]
_decode_header = msgspec.json.Decoder(Header).decode
_decode_claimed = msgspec.json.Decoder(_Claimed).decode
_STAND_IN_PARSED = Header(ALGORITHM, "stand-in-0000")


class Opened(NamedTuple):
    """The result of checking a signature. `claims` is the payload if `problem` is None, else that of the stand-in."""

    problem: TokenRefusal | None
    detail: str
    kid: str | None
    claims: bytes


def open_token(  # noqa: C901 - one list of steps, the same for every token; a split would hide that
    token: str, secret_of: Callable[[str | None], bytes | None], pair_of: PairOf | None = None
) -> Opened:
    """Check a token's signature.

    `secret_of` returns the secret of a key id, None for an unknown one and for an EdDSA key. `pair_of` returns the key
    pair of a key id, None for any other; it is None itself if the ring has no EdDSA key.
    """
    problem, detail = None, ""
    if len(token) > MAX_TOKEN_BYTES or not _SHAPE.match(token):
        problem = TokenRefusal.MALFORMED
        detail = f"not at most {MAX_TOKEN_BYTES} characters of base64url in three parts"
        token = _STAND_IN
    signed, _, signature = token.rpartition(".")
    first, _, payload = signed.partition(".")
    header = _header(first)
    if header is None:
        problem, detail = TokenRefusal.MALFORMED, "the header is not a JSON object with `alg`, and a text as `kid`"
        header = _STAND_IN_PARSED
    secret = secret_of(header.kid)
    pair = pair_of(header.kid) if pair_of is not None else None
    if secret is None:
        if problem is None and pair is None:
            problem, detail = TokenRefusal.UNKNOWN_KEY, f"key id {str(header.kid)[:40]!r}"
        secret = STAND_IN_SECRET
    mac = _base64url(hmac.digest(secret, signed.encode(), hashlib.sha256))
    is_genuine = hmac.compare_digest(mac, signature)
    algorithm = ALGORITHM
    if pair_of is not None:
        is_signed = (pair or stand_in()).is_signed(signed.encode(), signature)
        if pair is not None:  # the secret was the stand-in's, so only this check counts
            is_genuine, algorithm = is_signed, EDDSA
    if problem is None and header.alg != algorithm:
        problem, detail = TokenRefusal.BAD_SIGNATURE, "another algorithm than the key's"
    if problem is None and (header.crit is not UNSET or header.b64 is not UNSET):
        problem, detail = TokenRefusal.MALFORMED, "`crit` and `b64` are not understood"
    if problem is None and not is_genuine:
        problem = TokenRefusal.BAD_SIGNATURE
    claims = _bytes_of(payload)
    if problem is not None:
        claims = STAND_IN_CLAIMS
    return Opened(problem, detail, header.kid, claims)


def claimant(token: str) -> str:
    """Return a short name for the key and the client that a refused token claims; "" if the claims are unreadable.

    It is unverified and serves only to count the failures of clients at one address separately.
    """
    is_shaped = len(token) <= MAX_TOKEN_BYTES and _SHAPE.match(token) is not None
    first, payload, _ = (token if is_shaped else _STAND_IN).split(".")  # the stand-in takes as long
    header = _header(first)
    try:
        client_id = _decode_claimed(_bytes_of(payload)).client_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    name = f"{header.kid if header is not None else None}\n{client_id}".encode(errors="replace")
    digest = hashlib.blake2b(name, digest_size=8).hexdigest()
    return digest if is_shaped else ""


def _header(text: str) -> Header | None:
    try:
        return _decode_header(_bytes_of(text))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _bytes_of(text: str) -> bytes:
    """Decode base64url; return no bytes if it is invalid."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return b""
