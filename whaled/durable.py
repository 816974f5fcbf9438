"""Files that survive a crash: atomic replacement, and directory entries on the disk."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, is_durable: bool = True, is_private: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces `path` when the body ends without an error.

    A crash leaves either the old file or the new one, complete. With `is_durable` the new file and its name are on the
    disk at the end. With `is_private` only this user can read it; otherwise the umask decides. Raises OSError.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(new, flags, 0o600 if is_private else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if is_private:
                os.fchmod(descriptor, 0o600)  # whatever the umask
            yield file
            if is_durable:
                file.flush()
                os.fsync(descriptor)
        new.replace(path)
        if is_durable:
            sync_directory(path.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Write the entries of a directory to the disk: fsync of a file does not include its name. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
