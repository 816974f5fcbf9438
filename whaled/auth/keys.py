"""The key ring on disk: creation, reading, rotation. Any reader of the file can sign tokens, so it must be private."""

import base64
import fcntl
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from whaled.auth.eddsa import EDDSA, SEED_BYTES, KeyPair
from whaled.auth.private_files import check_directories, check_privacy, give_to_group, opened, read_bounded, unreadable
from whaled.auth.ring import MIN_SECRET_BYTES, KeyRing, SigningKey
from whaled.auth.signature import ALGORITHM
from whaled.config.fields import MAX_LEEWAY_S
from whaled.durable import replacing
from whaled.errors import KeyRingError, reason_of

SECRET_BYTES = 32
# A secret made up by a person, or one repeated letter, has fewer distinct bytes.
MIN_DISTINCT_BYTES = 16
# Time to wait for the lock. Commands hold it for milliseconds; one that holds it longer is suspended.
LOCK_PATIENCE_S = 5.0
LOCK_RETRY_S = 0.02
# A rotated key verifies for this much longer than its longest token lives: until the daemon has the new ring, it still
# refreshes with the old key.
ROTATION_MARGIN_S = 600.0
ALGORITHMS = (ALGORITHM, EDDSA)

# Whole Unix seconds within a plausible range.
Timestamp = Annotated[int, Meta(ge=0, le=10**11)]


class StoredKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key in the file. Times are in Unix seconds; `secret` is base64url without padding.

    The `secret` of an EdDSA key is its private key, from which the public one follows.
    """

    kid: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    alg: str = ALGORITHM
    secret: str
    created_at: Timestamp
    retired_at: Timestamp | None = None
    # Set by a rotation: the key no longer signs, and no longer verifies from then on.
    verifies_until: Timestamp | None = None

    def __repr__(self) -> str:
        """Return a text without the secret."""
        return f"StoredKey(kid={self.kid!r})"


class Versioned(Struct, frozen=True):
    """The field that the file has in every version."""

    version: int


class KeyFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file, with the keys in the order of their creation."""

    version: int
    keys: tuple[StoredKey, ...]

    @property
    def active(self) -> tuple[StoredKey, ...]:
        """The keys that are not retired."""
        return tuple(key for key in self.keys if key.retired_at is None)

    @property
    def signing(self) -> StoredKey | None:
        """The key that signs: the newest one that is neither retired nor rotated out."""
        return next((key for key in reversed(self.active) if key.verifies_until is None), None)

    def state(self, key: StoredKey, now: float) -> str:
        """Return what a key does: `signs`, `verifies`, `ended` (rotated out, its tokens have ended) or `retired`."""
        if key.retired_at is not None:
            return "retired"
        if key.verifies_until is not None and now >= key.verifies_until:
            return "ended"
        return "signs" if key == self.signing else "verifies"


# --- keys in force ----------------------------------------------------------------------------------------------------


def ring_of(file: KeyFile, path: Path) -> KeyRing:
    """Return the ring of a file's active keys. Raises KeyRingError if none of them signs, or one is too weak."""
    keys = {key.kid: _signing_key(key, path) for key in file.active}
    if file.signing is None:
        raise KeyRingError(f"{path} has no key that signs; make one: whaled keys generate --key-ring {path}")
    return KeyRing(keys[file.signing.kid], tuple(keys.values()), source=str(path))


def _signing_key(key: StoredKey, path: Path) -> SigningKey:
    secret = _secret(key, path)
    try:
        pair = KeyPair(secret) if key.alg == EDDSA else None
    except KeyRingError as error:
        raise KeyRingError(f"{path}: key {key.kid}: {error}") from error
    return SigningKey(key.kid, secret, key.created_at, pair, key.verifies_until)


def public_keys(file: KeyFile, path: Path, now: float) -> bytes:
    """Return the public keys that verify now, as a JWK Set (RFC 7517, RFC 8037). An HS256 key has none.

    Raises KeyRingError for an invalid key, or if cryptography is missing.
    """
    found = [_signing_key(key, path) for key in file.active if key.alg == EDDSA and file.state(key, now) != "ended"]
    jwks = [
        {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": _base64url(key.pair.public_bytes),
            "kid": key.kid,
            "alg": EDDSA,
            "use": "sig",
        }
        for key in found
        if key.pair is not None
    ]
    return msgspec.json.encode({"keys": jwks})


def is_weak(secret: bytes) -> bool:
    """Return whether a secret has too few distinct bytes to be random. 32 random bytes have about 30.

    A secret in hexadecimal is judged by the bytes that it encodes: 64 random digits often lack one of the sixteen.
    """
    if len(set(secret)) >= MIN_DISTINCT_BYTES:
        return False
    try:
        return len(set(bytes.fromhex(secret.decode("ascii")))) < MIN_DISTINCT_BYTES
    except ValueError:
        return True


def _secret(key: StoredKey, path: Path) -> bytes:
    if key.alg not in ALGORITHMS:
        raise KeyRingError(f"{path}: key {key.kid}: algorithm {key.alg!r}, only {' and '.join(ALGORITHMS)} are known")
    # Base64 encodes in groups of four characters; a single character left over has only six bits and is invalid.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", key.secret) or len(key.secret) % 4 == 1:
        raise KeyRingError(f"{path}: key {key.kid}: the secret is not base64url")
    secret = base64.urlsafe_b64decode(key.secret + "=" * (-len(key.secret) % 4))
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyRingError(f"{path}: key {key.kid}: {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed")
    if key.alg == EDDSA and len(secret) != SEED_BYTES:
        raise KeyRingError(f"{path}: key {key.kid}: {len(secret)} bytes, an {EDDSA} key has {SEED_BYTES}")
    if is_weak(secret):
        raise KeyRingError(
            f"{path}: key {key.kid}: the secret is too weak: fewer than {MIN_DISTINCT_BYTES} of its bytes differ"
        )
    return secret


# --- the file ---------------------------------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Return whether a file exists.

    Raises KeyRingError if that cannot be determined, because another source would be used instead.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise KeyRingError(f"cannot read the key ring {path}: {reason_of(error)}") from error
    return True


def read(path: Path, *, is_credential: bool = False) -> KeyFile:
    """Read a key ring from a file, which no other user may be able to read. Raises KeyRingError."""
    name = f"the key ring {path}"
    try:
        with opened(path) as (descriptor, info):
            check_privacy(path, info, name, is_credential=is_credential)
            raw = read_bounded(descriptor, path, "key ring")
    except OSError as error:
        raise KeyRingError(f"cannot read {name}: {reason_of(error)}{unreadable(path, error)}") from error
    try:
        version = msgspec.json.decode(raw, type=Versioned).version
        if version != 1:
            raise KeyRingError(f"{path} is a key ring of version {version}; this whaled knows version 1")
        parsed = msgspec.json.decode(raw, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyRingError(f"{path} is not a key ring: {error}") from None  # the chained error could quote a secret
    names = [key.kid for key in parsed.keys]
    if len(set(names)) != len(names):
        raise KeyRingError(f"{path}: two keys have the same id")
    for key in parsed.keys:
        if key.verifies_until is not None and key.verifies_until < key.created_at:
            raise KeyRingError(f"{path}: key {key.kid}: `verifies_until` is before `created_at`")
    return parsed


def generate(path: Path, now: float, *, algorithm: str = ALGORITHM, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Add a new key, which signs from then on; create the file if there is none. Raises KeyRingError.

    `patience_s` is the time to wait for another command that holds the lock.
    """
    with _locked(path, patience_s) as file:
        old = read(file) if exists(file) else KeyFile(version=1, keys=())
        check_directories(file, f"a key ring {path}")
        key = _new_key(algorithm, now)
        _write(file, KeyFile(version=1, keys=(*old.keys, key)))
    return key


def rotate(
    path: Path,
    now: float,
    *,
    longest_s: float,
    algorithm: str | None = None,
    patience_s: float = LOCK_PATIENCE_S,
) -> tuple[StoredKey, tuple[StoredKey, ...]]:
    """Add a key, which signs from then on; the others verify until their tokens have ended.

    `longest_s` is the longest life of a token (auth.max_token_ttl); `algorithm` that of the new key, None: that of the
    key that signs now. Keys that were rotated out earlier keep their end, and leave the file after it. Return the new
    key and those that verify besides. Raises KeyRingError.
    """
    with _locked(path, patience_s) as file:
        old = read(file)
        check_directories(file, f"a key ring {path}")
        newest = max((key.created_at for key in old.keys), default=0)
        if now < newest - MAX_LEEWAY_S:
            raise KeyRingError(
                f"{path} has a key that was made {newest - now:.0f} s after the time of this clock: set the clock "
                "first, or the old key would end too early"
            )
        signing = old.signing
        key = _new_key(algorithm or (signing.alg if signing is not None else ALGORITHM), now)
        until = math.ceil(now + longest_s + MAX_LEEWAY_S + ROTATION_MARGIN_S)
        kept = tuple(
            msgspec.structs.replace(each, verifies_until=until)
            if each.retired_at is None and each.verifies_until is None
            else each
            for each in old.keys
            if old.state(each, now) != "ended"
        )
        new = KeyFile(version=1, keys=(*kept, key))
        _write(file, new)
    return key, tuple(each for each in new.active if each is not key)


def _new_key(algorithm: str, now: float) -> StoredKey:
    """Return a new random key. Raises KeyRingError for an EdDSA key without cryptography."""
    raw = secrets.token_bytes(SECRET_BYTES)
    if algorithm == EDDSA:
        KeyPair(raw)  # without the library whaled could not read the ring any more
    return StoredKey(kid=f"k{secrets.token_hex(6)}", alg=algorithm, secret=_base64url(raw), created_at=int(now))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def retire(path: Path, kid: str, now: float, *, force: bool = False, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Retire a key: tokens signed with it are refused after the next reload. Raises KeyRingError."""
    with _locked(path, patience_s) as file:
        old = read(file)
        found = next((key for key in old.keys if key.kid == kid), None)
        if found is None:
            raise KeyRingError(f"{path} has no key {kid!r}; it has {', '.join(key.kid for key in old.keys) or 'none'}")
        if found.retired_at is not None:
            raise KeyRingError(f"key {kid} is retired already")
        others = [key for key in old.active if key is not found and key.verifies_until is None]
        if found is old.signing and not others and not force:
            raise KeyRingError(
                f"key {kid} is the last one that signs: without it no client can connect. Make another first (whaled "
                "keys generate) or use --force"
            )
        retired = msgspec.structs.replace(found, retired_at=int(now))
        _write(file, KeyFile(version=1, keys=tuple(retired if key is found else key for key in old.keys)))
    return retired


@contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[Path]:
    """Hold the lock of a key ring, so that concurrent commands lose no key. Yield the path with links resolved."""
    try:
        file = path.resolve()
        directory = file.parent
        if directory.parent.is_dir():
            # Create one level only, like /etc/whaled. If more is missing, the path is probably mistyped.
            directory.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KeyRingError(
            f"there is no directory {path.parent} for the key ring; make it: mkdir -p {path.parent}"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
        raise KeyRingError(f"cannot use {path.parent} for the key ring: {error}") from error
    try:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise KeyRingError(f"another command is at work in {directory}; try again when it ended") from error
            time.sleep(LOCK_RETRY_S)
        yield file
    finally:
        os.close(descriptor)


def _write(path: Path, file: KeyFile) -> None:
    """Replace the file atomically: a crash leaves the old ring or the new one."""
    body = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    try:
        with replacing(path) as handle:
            give_to_group(handle.fileno(), path)
            handle.write(body)
    except OSError as error:
        raise KeyRingError(f"cannot write the key ring {path}: {reason_of(error)}") from error
