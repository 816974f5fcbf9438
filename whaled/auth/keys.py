"""The key ring on disk: creation, reading, rotation. Any reader of the file can sign tokens, so it must be private."""

import base64
import fcntl
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from dotenv import dotenv_values
from msgspec import Meta, Struct

from whaled.auth.private_files import check_directories, check_privacy, keep_group, opened, read_bounded
from whaled.auth.signature import ALGORITHM
from whaled.auth.tokens import MIN_SECRET_BYTES, KeyRing, SigningKey
from whaled.config.sections import AuthSettings
from whaled.durable import replacing
from whaled.errors import KeyRingError, reason_of

SECRET_VARIABLE = "WEBSOCKET_SECRET_KEY"  # noqa: S105 - its name
# The variable that names a file with the secret.
SECRET_FILE_VARIABLE = f"{SECRET_VARIABLE}_FILE"
# The name of the systemd credential: LoadCredential=keys.json:/etc/whaled/keys.json
CREDENTIAL_NAME = "keys.json"
SECRET_BYTES = 32
# A secret made up by a person, or one repeated letter, has fewer distinct bytes.
MIN_DISTINCT_BYTES = 16
REMEDY = (
    "Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))', or use a key ring: whaled keys generate"
)
# Time to wait for the lock. Commands hold it for milliseconds; one that holds it longer is suspended.
LOCK_PATIENCE_S = 5.0
LOCK_RETRY_S = 0.02


# Whole Unix seconds within a plausible range.
Timestamp = Annotated[int, Meta(ge=0, le=10**11)]


class StoredKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key in the file. Times are in Unix seconds; `secret` is base64url without padding."""

    kid: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    alg: str = ALGORITHM
    secret: str
    created_at: Timestamp
    retired_at: Timestamp | None = None

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
        """The keys that verify; the last of them signs."""
        return tuple(key for key in self.keys if key.retired_at is None)


# --- the ring of a daemon or a command -------------------------------------------------------------------------------


def load_ring(settings: AuthSettings, environ: Mapping[str, str], directory: Path) -> KeyRing:
    """Load the key ring of this process.

    The sources, in order: the systemd credential, WEBSOCKET_SECRET_KEY or the file that WEBSOCKET_SECRET_KEY_FILE
    names, the `.env` in `directory`, the file of `auth.key_ring`. An unusable secret is an error and not skipped,
    because the operator intended it. Raises KeyRingError.
    """
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials is not None and _exists(Path(credentials) / CREDENTIAL_NAME):
        ring = ring_of(read(Path(credentials) / CREDENTIAL_NAME, is_credential=True), Path(CREDENTIAL_NAME))
        return msgspec.structs.replace(ring, source=f"the systemd credential {CREDENTIAL_NAME}")
    secret, source = environ.get(SECRET_VARIABLE), "the environment"
    if (secret_file := environ.get(SECRET_FILE_VARIABLE)) is not None:
        if secret is not None:
            raise KeyRingError(f"{SECRET_VARIABLE} and {SECRET_FILE_VARIABLE} are both set: unset one of them")
        secret, source = _secret_in_file(Path(secret_file)), f"the file {secret_file}"
    if secret is None:
        secret, source = _dotenv_secret(directory / ".env"), str(directory / ".env")
    if secret is not None:
        return _ring_of_secret(secret, source)
    path = Path(settings.key_ring)
    if not _exists(path):
        raise KeyRingError(
            f"there is no key ring at {path} (auth.key_ring) and no {SECRET_VARIABLE}: no client could authenticate. "
            "If your configuration names another, give it with --config. To make a key: "
            f"whaled keys generate --key-ring {path}. To go without authentication: whaled run --no-auth"
        )
    return ring_of(read(path), path)


def _exists(path: Path) -> bool:
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


def _secret_in_file(path: Path) -> str:
    """Return the secret in a file that contains nothing else, without trailing line breaks. Raises KeyRingError."""
    name = f"{path} ({SECRET_FILE_VARIABLE})"
    if path == Path():
        raise KeyRingError(f"{SECRET_FILE_VARIABLE} names no file")
    try:
        with opened(path) as (descriptor, info):
            check_privacy(path, info, name)
            raw = read_bounded(descriptor, path, "secret")
    except OSError as error:
        raise KeyRingError(f"cannot read {name}: {reason_of(error)}") from error
    raw = raw.rstrip(b"\r\n")
    if b"\n" in raw or b"\0" in raw:
        raise KeyRingError(f"{name} holds several lines or a zero byte: expected the secret alone")
    return os.fsdecode(raw)


def _dotenv_secret(path: Path) -> str | None:
    """Return the secret in a `.env`, None if there is no such file or it has no secret. Raises KeyRingError.

    A file with the secret must be as private as a key ring. One without it belongs to another program and may have any
    mode.
    """
    try:
        with opened(path) as (descriptor, info):
            if not stat.S_ISREG(info.st_mode):
                return None
            text = read_bounded(descriptor, path, "`.env`").decode()
            secret = dotenv_values(stream=io.StringIO(text), interpolate=False).get(SECRET_VARIABLE)
            if secret is not None:
                check_privacy(path, info, f"{SECRET_VARIABLE} in {path}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not os.access(path.parent, os.X_OK, effective_ids=True):
            return None  # without access to the directory, this user cannot be the intended reader
        raise KeyRingError(f"cannot read {path}: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise KeyRingError(f"cannot read {path}: it is not UTF-8") from None  # the chained error would quote a secret
    return secret


def ring_of(file: KeyFile, path: Path) -> KeyRing:
    """Return the ring of a file's active keys. Raises KeyRingError if there is none, or one is too weak."""
    keys = tuple(SigningKey(key.kid, _secret(key, path), key.created_at) for key in file.active)
    if not keys:
        raise KeyRingError(f"{path} has no key that is not retired; make one: whaled keys generate --key-ring {path}")
    return KeyRing(keys[-1], keys, source=str(path))


def _ring_of_secret(text: str, source: str) -> KeyRing:
    secret = os.fsencode(text)
    if len(secret) < MIN_SECRET_BYTES:
        found = f"has {len(secret)} bytes" if secret else "is empty"
        raise KeyRingError(
            f"{SECRET_VARIABLE} of {source} {found}, at least {MIN_SECRET_BYTES} are needed (RFC 7518, 3.2). {REMEDY}"
        )
    if is_weak(secret):
        raise KeyRingError(
            f"{SECRET_VARIABLE} of {source} is too weak: fewer than {MIN_DISTINCT_BYTES} of its bytes differ. {REMEDY}"
        )
    key = SigningKey(None, secret)
    return KeyRing(key, (key,), source=f"{SECRET_VARIABLE} of {source}")


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
    if key.alg != ALGORITHM:
        raise KeyRingError(f"{path}: key {key.kid}: algorithm {key.alg!r}, only {ALGORITHM} is known")
    # Base64 encodes in groups of four characters; a single character left over has only six bits and is invalid.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", key.secret) or len(key.secret) % 4 == 1:
        raise KeyRingError(f"{path}: key {key.kid}: the secret is not base64url")
    secret = base64.urlsafe_b64decode(key.secret + "=" * (-len(key.secret) % 4))
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyRingError(f"{path}: key {key.kid}: {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed")
    if is_weak(secret):
        raise KeyRingError(
            f"{path}: key {key.kid}: the secret is too weak: fewer than {MIN_DISTINCT_BYTES} of its bytes differ"
        )
    return secret


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path, *, is_credential: bool = False) -> KeyFile:
    """Read a key ring from a file, which no other user may be able to read. Raises KeyRingError."""
    name = f"the key ring {path}"
    try:
        with opened(path) as (descriptor, info):
            check_privacy(path, info, name, is_credential=is_credential)
            raw = read_bounded(descriptor, path, "key ring")
    except OSError as error:
        raise KeyRingError(f"cannot read {name}: {reason_of(error)}") from error
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
    return parsed


def generate(path: Path, now: float, *, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Add a new key, which signs from then on; create the file if there is none. Raises KeyRingError.

    `patience_s` is the time to wait for another command that holds the lock.
    """
    with _locked(path, patience_s) as file:
        old = read(file) if _exists(file) else KeyFile(version=1, keys=())
        check_directories(file, f"a key ring {path}")
        secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode()
        key = StoredKey(kid=f"k{secrets.token_hex(6)}", secret=secret, created_at=int(now))
        _write(file, KeyFile(version=1, keys=(*old.keys, key)))
    return key


def retire(path: Path, kid: str, now: float, *, force: bool = False, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Retire a key: tokens signed with it are refused after the next reload. Raises KeyRingError."""
    with _locked(path, patience_s) as file:
        old = read(file)
        found = next((key for key in old.keys if key.kid == kid), None)
        if found is None:
            raise KeyRingError(f"{path} has no key {kid!r}; it has {', '.join(key.kid for key in old.keys) or 'none'}")
        if found.retired_at is not None:
            raise KeyRingError(f"key {kid} is retired already")
        if len(old.active) == 1 and not force:
            raise KeyRingError(
                f"key {kid} is the last one: without it no client can connect. Make another first (whaled keys "
                "generate) or use --force"
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
            keep_group(handle.fileno(), path)  # a group that could read the old file can read the new one
            handle.write(body)
    except OSError as error:
        raise KeyRingError(f"cannot write the key ring {path}: {reason_of(error)}") from error
