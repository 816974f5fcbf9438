"""The key ring on disk: made, read, rotated. Whoever reads it can sign tokens, so nobody else may."""

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
from whaled.config.sections import Auth
from whaled.errors import KeyRingError
from whaled.replacing import replacing

SECRET_VARIABLE = "WEBSOCKET_SECRET_KEY"  # noqa: S105 - its name
# Names a file that holds the secret.
SECRET_FILE_VARIABLE = f"{SECRET_VARIABLE}_FILE"
# The name of the systemd credential: LoadCredential=keys.json:/etc/whaled/keys.json
CREDENTIAL_NAME = "keys.json"
SECRET_BYTES = 32
# A secret that somebody made up, or one letter repeated, has fewer.
MIN_DISTINCT_BYTES = 16
REMEDY = (
    "Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))', or use a key ring: whaled keys generate"
)
# Commands hold the lock for milliseconds; one that holds it longer is stopped or dead.
LOCK_PATIENCE_S = 5.0
LOCK_RETRY_S = 0.02


# Whole Unix seconds that are a date.
Timestamp = Annotated[int, Meta(ge=0, le=10**11)]


class StoredKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as it stands in the file. Times are Unix seconds; `secret` is base64url without padding."""

    kid: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    alg: str = ALGORITHM
    secret: str
    created_at: Timestamp
    retired_at: Timestamp | None = None

    def __repr__(self) -> str:
        """Without the secret."""
        return f"StoredKey(kid={self.kid!r})"


class Versioned(Struct, frozen=True):
    """What the file of every version says."""

    version: int


class KeyFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file, in the order the keys were made."""

    version: int
    keys: tuple[StoredKey, ...]

    @property
    def active(self) -> tuple[StoredKey, ...]:
        """Keys that verify; the last of them signs."""
        return tuple(key for key in self.keys if key.retired_at is None)


# --- which ring a daemon or a command uses ---------------------------------------------------------------------------


def load_ring(settings: Auth, environ: Mapping[str, str], directory: Path) -> KeyRing:
    """The ring of this process: the systemd credential, else WEBSOCKET_SECRET_KEY or the file that
    WEBSOCKET_SECRET_KEY_FILE names, else the file of `auth.key_ring`.

    `directory` is where a `.env` may stand. A secret that is set and cannot be used is refused, not passed over: the
    operator meant it. Raises KeyRingError.
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
            f"there is no key ring at {path} (auth.key_ring) and no {SECRET_VARIABLE}: nobody could authenticate. "
            "If your configuration names another, give it with --config. To make a key: "
            f"whaled keys generate --key-ring {path}. To go without authentication: whaled run --no-auth"
        )
    return ring_of(read(path), path)


def _exists(path: Path) -> bool:
    """Whether there is such a file; KeyRingError where that cannot be known, since another would be used instead."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise KeyRingError(f"cannot read the key ring {path}: {error.strerror or error}") from error
    return True


def _secret_in_file(path: Path) -> str:
    """The secret in a file of its own, without line ends behind it. Raises KeyRingError."""
    name = f"{path} ({SECRET_FILE_VARIABLE})"
    if path == Path():
        raise KeyRingError(f"{SECRET_FILE_VARIABLE} names no file")
    try:
        with opened(path) as (descriptor, info):
            check_privacy(path, info, name)
            raw = read_bounded(descriptor, path, "secret")
    except OSError as error:
        raise KeyRingError(f"cannot read {name}: {error.strerror or error}") from error
    raw = raw.rstrip(b"\r\n")
    if b"\n" in raw or b"\0" in raw:
        raise KeyRingError(f"{name} holds several lines or a zero byte: expected the secret alone")
    return os.fsdecode(raw)


def _dotenv_secret(path: Path) -> str | None:
    """The secret in a `.env`, None where there is no such file or it holds none. Raises KeyRingError.

    A file that holds one is as secret as a key ring. One without belongs to another program, and may have any mode.
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
            return None  # this user may not enter the directory: nothing in it is meant for this user
        raise KeyRingError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise KeyRingError(f"cannot read {path}: it is not UTF-8") from None  # the chained error would quote a secret
    return secret


def ring_of(file: KeyFile, path: Path) -> KeyRing:
    """The keys of a file that are not retired. Raises KeyRingError where none is, or one is too weak."""
    keys = tuple(SigningKey(key.kid, _secret(key, path), key.created_at) for key in file.active)
    if not keys:
        raise KeyRingError(f"{path} holds no key that is not retired; make one: whaled keys generate --key-ring {path}")
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
    """Whether a secret has too few different bytes to be random. 32 random bytes have about 30.

    What is written in hexadecimal is judged by what it stands for: 64 random digits often lack one of the sixteen.
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
    # Of four letters one may not stand alone: it would be six bits.
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
    """The key ring in a file that nobody else can read. Raises KeyRingError."""
    name = f"the key ring {path}"
    try:
        with opened(path) as (descriptor, info):
            check_privacy(path, info, name, is_credential=is_credential)
            raw = read_bounded(descriptor, path, "key ring")
    except OSError as error:
        raise KeyRingError(f"cannot read {name}: {error.strerror or error}") from error
    try:
        version = msgspec.json.decode(raw, type=Versioned).version
        if version != 1:
            raise KeyRingError(f"{path} is a key ring of version {version}; this whaled knows version 1")
        parsed = msgspec.json.decode(raw, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyRingError(f"{path} is no key ring: {error}") from None  # the chained error could quote a secret
    names = [key.kid for key in parsed.keys]
    if len(set(names)) != len(names):
        raise KeyRingError(f"{path}: two keys have the same id")
    return parsed


def generate(path: Path, now: float, *, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Add a new key, which signs from now on. Makes the file if there is none. Raises KeyRingError.

    `patience_s` is how long another command at work on the ring is waited for.
    """
    with _locked(path, patience_s) as file:
        old = read(file) if _exists(file) else KeyFile(version=1, keys=())
        check_directories(file, f"a key ring {path}")
        secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode()
        key = StoredKey(kid=f"k{secrets.token_hex(6)}", secret=secret, created_at=int(now))
        _write(file, KeyFile(version=1, keys=(*old.keys, key)))
    return key


def retire(path: Path, kid: str, now: float, *, force: bool = False, patience_s: float = LOCK_PATIENCE_S) -> StoredKey:
    """Take a key out of use: tokens signed with it are refused after the next reload. Raises KeyRingError."""
    with _locked(path, patience_s) as file:
        old = read(file)
        found = next((key for key in old.keys if key.kid == kid), None)
        if found is None:
            raise KeyRingError(f"{path} has no key {kid!r}; it has {', '.join(key.kid for key in old.keys) or 'none'}")
        if found.retired_at is not None:
            raise KeyRingError(f"key {kid} is retired already")
        if len(old.active) == 1 and not force:
            raise KeyRingError(
                f"key {kid} is the last one: without it nobody can connect. Make another first (whaled keys generate), "
                "or say --force"
            )
        retired = msgspec.structs.replace(found, retired_at=int(now))
        _write(file, KeyFile(version=1, keys=tuple(retired if key is found else key for key in old.keys)))
    return retired


@contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[Path]:
    """One command at a time: two that add a key at once must not lose one. Yields the file behind links."""
    try:
        file = path.resolve()
        directory = file.parent
        if directory.parent.is_dir():
            # One level, like /etc/whaled. More is rather a mistyped path.
            directory.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KeyRingError(
            f"there is no directory {path.parent} for the key ring; make it: mkdir -p {path.parent}"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
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
    """Replace the file at once: a crash leaves the old ring or the new one, never half of it."""
    body = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    try:
        with replacing(path) as handle:
            keep_group(handle.fileno(), path)  # a group that could read the old file reads the new one
            handle.write(body)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise KeyRingError(f"cannot write the key ring {path}: {error.strerror or error}") from error
