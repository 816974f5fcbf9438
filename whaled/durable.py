"""Files that survive a crash: atomic replacement, and directory entries on the disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, is_durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file that only this user can read. It replaces `path` when the body ends without an error.

    A crash leaves either the old file or the new one, complete. With `is_durable` the new file and its name are on the
    disk at the end. Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            yield file
            if is_durable:
                file.flush()
                os.fsync(descriptor)
        Path(name).replace(path)
        if is_durable:
            sync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Write the entries of a directory to the disk: fsync of a file does not include its name. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
