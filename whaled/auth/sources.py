"""Where the key ring of a process comes from: a systemd credential, a secret in the environment, or the file."""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec
from dotenv import dotenv_values

from whaled.auth.keys import MIN_DISTINCT_BYTES, exists, is_weak, read, ring_of
from whaled.auth.private_files import check_privacy, opened, read_bounded
from whaled.auth.ring import MIN_SECRET_BYTES, KeyRing, SigningKey
from whaled.config.sections import AuthSettings
from whaled.errors import KeyRingError, reason_of

SECRET_VARIABLE = "WEBSOCKET_SECRET_KEY"  # noqa: S105 - its name
# The variable that names a file with the secret.
SECRET_FILE_VARIABLE = f"{SECRET_VARIABLE}_FILE"
# The name of the systemd credential: LoadCredential=keys.json:/etc/whaled/keys.json
CREDENTIAL_NAME = "keys.json"
REMEDY = (
    "Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))', or use a key ring: whaled keys generate"
)


def load_ring(settings: AuthSettings, environ: Mapping[str, str], directory: Path) -> KeyRing:
    """Load the key ring of this process.

    The sources, in order: the systemd credential, WEBSOCKET_SECRET_KEY or the file that WEBSOCKET_SECRET_KEY_FILE
    names, the `.env` in `directory`, the file of `auth.key_ring`. An unusable secret is an error and not skipped,
    because the operator intended it. Raises KeyRingError.
    """
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials is not None and exists(Path(credentials) / CREDENTIAL_NAME):
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
    if not exists(path):
        raise KeyRingError(
            f"there is no key ring at {path} (auth.key_ring) and no {SECRET_VARIABLE}: no client could authenticate. "
            "If your configuration names another, give it with --config. To make a key: "
            f"whaled keys generate --key-ring {path}. To go without authentication: whaled run --no-auth"
        )
    return ring_of(read(path), path)


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
