"""The keys in force: those that verify tokens, and the one that signs them. Pure."""

import hashlib

import msgspec
from msgspec import Struct

from whaled.auth.eddsa import EDDSA, KeyPair
from whaled.auth.signature import ALGORITHM

# RFC 7518, 3.2: an HMAC key must be at least as long as the hash.
MIN_SECRET_BYTES = 32


class SigningKey(Struct, frozen=True):
    """A signing key. Without an id (a single secret from the environment), its tokens have no key id either.

    Times are in Unix seconds; `created_at` is 0 if it was not recorded. `pair` makes it an EdDSA key: `secret` is then
    the private key. At `verifies_until` it leaves the ring by itself; None: never.
    """

    kid: str | None
    secret: bytes
    created_at: float = 0.0
    pair: KeyPair | None = None
    verifies_until: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a secret that is too short."""
        if len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret of {len(self.secret)} bytes; at least {MIN_SECRET_BYTES} are needed")

    @property
    def algorithm(self) -> str:
        """The algorithm of its tokens, which is a property of the key."""
        return ALGORITHM if self.pair is None else EDDSA

    @property
    def mark(self) -> str:
        """A fingerprint that distinguishes keys with the same id and reveals nothing about the secret."""
        return hashlib.blake2b(self.secret, digest_size=8, person=b"whaled key").hexdigest()

    def __repr__(self) -> str:
        """Return a text without the secret, because it appears in logs and tracebacks."""
        return f"SigningKey(kid={self.kid!r})"


class KeyRing(Struct, frozen=True):
    """The keys that verify tokens and the one that signs them. Retired keys are not part of it.

    `source` names where the keys come from, for the operator. `has_pairs`: a key is an EdDSA key. `is_rotating`: a key
    leaves by itself, so `at` has to be asked for the ring of a time. Both follow from the keys.
    """

    signing: SigningKey
    verifying: tuple[SigningKey, ...]
    source: str = ""
    has_pairs: bool = False
    is_rotating: bool = False

    def __post_init__(self) -> None:
        """Set what follows from the keys."""
        msgspec.structs.force_setattr(self, "has_pairs", any(key.pair is not None for key in self.verifying))
        ends = any(key.verifies_until is not None for key in self.verifying)
        msgspec.structs.force_setattr(self, "is_rotating", ends)

    def at(self, now: float) -> "KeyRing":
        """Return the ring of the keys that verify at a time."""
        if not self.is_rotating:
            return self
        keys = tuple(key for key in self.verifying if key.verifies_until is None or now < key.verifies_until)
        return KeyRing(self.signing, keys, self.source)

    def find(self, kid: object) -> SigningKey | None:
        """Return the key with an id, None if there is none."""
        return next((key for key in self.verifying if key.kid == kid), None)

    def secret_of(self, kid: str | None) -> bytes | None:
        """Return the secret of the HS256 key with an id, None if there is none."""
        key = self.find(kid)
        # The private key of an EdDSA key must never serve as a shared secret.
        return key.secret if key is not None and key.pair is None else None

    def pair_of(self, kid: str | None) -> KeyPair | None:
        """Return the pair of the EdDSA key with an id, None if there is none."""
        key = self.find(kid)
        return key.pair if key is not None else None
