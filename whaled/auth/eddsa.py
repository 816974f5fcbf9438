"""Ed25519 key pairs (RFC 8032), for tokens with `alg` EdDSA (RFC 8037). Pure.

They need the library cryptography, which the extra `eddsa` installs; a ring without such a key never imports it.
"""

import base64
import hashlib
from functools import cache

from whaled.errors import KeyRingError

EDDSA = "EdDSA"
SEED_BYTES = 32
SIGNATURE_BYTES = 64
# 64 bytes in base64url without padding.
SIGNATURE_CHARACTERS = 86
REMEDY = (
    "EdDSA keys need the Python package cryptography: pip install 'whaled[eddsa]', "
    "or with the units: make install EXTRAS=eddsa"
)
# The key pair that checks tokens which name no EdDSA key, so that their refusal takes as long. It belongs to no ring.
_STAND_IN_SEED = b"this key pair signs no token....!"[:SEED_BYTES]
# A signature of the right form, in the place of one that has another. S is in range (RFC 8032, 5.1.7) and as long as
# that of other signatures, because a check takes longer the more digits S has.
_STAND_IN_S = hashlib.sha256(b"the signature of nothing").digest()[:31] + b"\x0f"
_STAND_IN_SIGNATURE = base64.urlsafe_b64encode(b"\x58" + b"\x66" * 31 + _STAND_IN_S).rstrip(b"=").decode()


class KeyPair:
    """An Ed25519 key pair, made from the 32 bytes of its private key.

    Raises KeyRingError if the library is missing.
    """

    __slots__ = ("_invalid", "_verify", "private", "public")

    def __init__(self, seed: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an optional dependency
            from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            raise KeyRingError(f"{REMEDY} ({error})") from error
        self.private = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self.private.public_key()
        self._verify = self.public.verify
        self._invalid: type[Exception] = InvalidSignature

    @property
    def public_bytes(self) -> bytes:
        """The 32 bytes of the public key."""
        return self.public.public_bytes_raw()

    def is_signed(self, signed: bytes, signature: str) -> bool:
        """Return whether the signature, in canonical base64url, is this key's. A malformed one takes as long."""
        raw = b""
        if len(signature) == SIGNATURE_CHARACTERS:
            raw = base64.urlsafe_b64decode(signature + "==")
        # A text that another text decodes to as well is refused: the same token would have two names.
        is_canonical = base64.urlsafe_b64encode(raw).rstrip(b"=").decode() == signature
        if not is_canonical or len(raw) != SIGNATURE_BYTES:
            is_canonical, raw = False, base64.urlsafe_b64decode(_STAND_IN_SIGNATURE + "==")
        try:
            self._verify(raw, signed)
        except self._invalid:
            return False
        return is_canonical


@cache
def stand_in() -> KeyPair:
    """Return the key pair in the place of an unknown one. Raises KeyRingError if the library is missing."""
    return KeyPair(_STAND_IN_SEED)
