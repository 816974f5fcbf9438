"""The public keys of an issuer, read from a JSON Web Key Set (RFC 7517). Pure.

A key that cannot verify tokens is left out, whatever the reason: issuers publish keys for encryption and of newer kinds
in the same set. A set without any usable key is refused as a whole.
"""

import base64
import binascii
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from whaled.config.sections import Algorithm

# An issuer has one to four keys; the bound limits the work and the memory that a set can cause.
MAX_KEYS = 64
# `kid` appears in log lines.
MAX_KID = 256
# RFC 7518, 3.3; a verification with the largest takes 0.3 ms.
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
# 65537 is usual. The time of a verification grows with the length of the exponent.
MAX_RSA_EXPONENT = 2**32


class Kind(StrEnum):
    """The kind of a public key; each algorithm takes one."""

    RSA = "RSA"
    P256 = "P-256"
    P384 = "P-384"
    P521 = "P-521"
    ED25519 = "Ed25519"


KIND_OF = {
    Algorithm.RS256: Kind.RSA, Algorithm.RS384: Kind.RSA, Algorithm.RS512: Kind.RSA,
    Algorithm.PS256: Kind.RSA, Algorithm.PS384: Kind.RSA, Algorithm.PS512: Kind.RSA,
    Algorithm.ES256: Kind.P256, Algorithm.ES384: Kind.P384, Algorithm.ES512: Kind.P521,
    Algorithm.EDDSA: Kind.ED25519,
}  # fmt: skip
_COORDINATE_BYTES = {Kind.P256: 32, Kind.P384: 48, Kind.P521: 66}


class KeySetError(ValueError):
    """A text that is no usable key set."""


class PublicKey(Struct, frozen=True):
    """A key of an issuer. `algorithm` is set if the issuer restricts the key to one; `key` is cryptography's object."""

    kid: str | None
    kind: Kind
    algorithm: str | None
    key: Any


class KeySet(NamedTuple):
    """The usable keys of an issuer, and how many others were left out."""

    keys: tuple[PublicKey, ...]
    left_out: int

    @property
    def kids(self) -> frozenset[str]:
        """Return the ids of the keys."""
        return frozenset(key.kid for key in self.keys if key.kid is not None)

    def find(self, kid: str | None, algorithm: Algorithm) -> PublicKey | None:
        """Return the first key with an id that fits an algorithm; without an id, the only one that fits."""
        fitting = [
            key
            for key in self.keys
            if key.kind is KIND_OF[algorithm]
            and key.algorithm in {None, algorithm.value}
            and (kid is None or key.kid == kid)
        ]
        return fitting[0] if len(fitting) == 1 or (fitting and kid is not None) else None


class _Jwk(Struct, frozen=True):
    """The members of a JSON Web Key that matter. `d` and `k` are secrets, which a public key does not have."""

    kty: str
    kid: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    alg: str | None = None
    crv: str | None = None
    n: str = ""
    e: str = ""
    x: str = ""
    y: str = ""
    d: Raw | None = None


class _Jwks(Struct, frozen=True):
    keys: list[Raw]


_decode_set = msgspec.json.Decoder(_Jwks).decode
_decode_key = msgspec.json.Decoder(_Jwk).decode
_DECODING = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_key_set(raw: bytes, algorithms: Iterable[Algorithm]) -> KeySet:
    """Return the keys of a set that fit one of the algorithms. 64 keys take about 1 ms. Raises KeySetError."""
    try:
        listed = _decode_set(raw).keys
    except _DECODING:
        raise KeySetError("is not a JSON object with a list `keys`") from None
    if len(listed) > MAX_KEYS:
        raise KeySetError(f"has {len(listed)} keys, at most {MAX_KEYS} are accepted")
    allowed = set(algorithms)
    read = [_public_key(each, allowed) for each in listed]
    usable = tuple(key for key in read if key is not None)
    if not usable:
        raise KeySetError(f"has no key for {', '.join(sorted(allowed))} among its {len(listed)}")
    return KeySet(usable, len(listed) - len(usable))


def _public_key(raw: Raw, allowed: set[Algorithm]) -> PublicKey | None:
    """Return a key, None if it is not one that verifies tokens with an allowed algorithm."""
    try:
        jwk = _decode_key(raw)
    except _DECODING:
        return None
    kind = _kind(jwk)
    fitting = {each for each in allowed if KIND_OF[each] is kind and jwk.alg in {None, each.value}}
    if kind is None or not fitting or jwk.d is not None or not _may_verify(jwk):
        return None
    if jwk.kid is not None and not (0 < len(jwk.kid) <= MAX_KID and jwk.kid.isprintable()):
        return None
    key = _loaded(jwk, kind)
    return PublicKey(jwk.kid, kind, jwk.alg, key) if key is not None else None


def _kind(jwk: _Jwk) -> Kind | None:
    if jwk.kty == "RSA":
        return Kind.RSA
    if jwk.kty == "EC" and jwk.crv in {Kind.P256, Kind.P384, Kind.P521}:
        return Kind(jwk.crv)
    return Kind.ED25519 if jwk.kty == "OKP" and jwk.crv == Kind.ED25519 else None


def _may_verify(jwk: _Jwk) -> bool:
    return jwk.use in {None, "sig"} and (jwk.key_ops is None or "verify" in jwk.key_ops)


def _loaded(jwk: _Jwk, kind: Kind) -> object | None:
    """Return cryptography's key, None if the numbers are not a key or one that is too small or too large."""
    # The package is an extra, `whaled[oidc]`: only a configured issuer imports it.
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    try:
        if kind is Kind.RSA:
            modulus, exponent = int.from_bytes(_bytes_of(jwk.n)), int.from_bytes(_bytes_of(jwk.e))
            if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS or modulus % 2 == 0:
                return None
            if not 3 <= exponent < MAX_RSA_EXPONENT:
                return None
            return rsa.RSAPublicNumbers(exponent, modulus).public_key()
        if kind is Kind.ED25519:
            return ed25519.Ed25519PublicKey.from_public_bytes(_bytes_of(jwk.x))
        curves: dict[Kind, ec.EllipticCurve] = {
            Kind.P256: ec.SECP256R1(), Kind.P384: ec.SECP384R1(), Kind.P521: ec.SECP521R1(),
        }  # fmt: skip
        x, y = _bytes_of(jwk.x), _bytes_of(jwk.y)
        if len(x) != _COORDINATE_BYTES[kind] or len(y) != _COORDINATE_BYTES[kind]:  # RFC 7518, 6.2.1.2
            return None
        return ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curves[kind]).public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None


def _bytes_of(text: str) -> bytes:
    """Decode base64url. Raises ValueError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
