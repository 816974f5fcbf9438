"""Files that hold a secret: who else can read or replace them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.errors import KeyRingError

MAX_FILE_BYTES = 1024 * 1024


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A file to read, and what the open file is: the path could stand for another one by the time it is asked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor, os.fstat(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(descriptor: int, path: Path, sort: str) -> bytes:
    """All of a file of some sort. Raises KeyRingError if it is larger than any of that sort, and OSError."""
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise KeyRingError(f"{path} is larger than {MAX_FILE_BYTES} bytes: no {sort}")
    return raw


def check_privacy(path: Path, info: os.stat_result, name: str, *, is_credential: bool = False) -> None:
    """Raise KeyRingError unless nobody but its owner, root, and a group that root chose can read a file that holds a
    secret, and nobody but its owner and root replace it.
    """
    if not stat.S_ISREG(info.st_mode):
        raise KeyRingError(f"{name} is not a regular file")
    mode = stat.S_IMODE(info.st_mode)
    # systemd 257 hands a credential over as 0440 root:root with an ACL for the service: only "others" tells there.
    if mode & 0o007 or (mode & 0o070 and not is_credential and not _is_for_our_group(info)):
        raise KeyRingError(f"others can read {name} (mode {mode:04o}); run: chmod 600 {path}{_group_remedy(info)}")
    if is_credential:
        return  # its directory is systemd's
    if info.st_uid not in {0, os.geteuid()}:
        raise KeyRingError(f"{name} belongs to user {info.st_uid}, not to root or to who runs this")
    # A link stands in one directory and its file in another: whoever may write to either can put another file there.
    check_directories(path, name)
    check_directories(path.resolve(), name)


def _is_for_our_group(info: os.stat_result) -> bool:
    """True for a file of root's that a group may read, if this process is in that group or is root's.

    Kubernetes (fsGroup) and Debian (ssl-cert) give secrets to a service in this way. A user's own file needs no group.
    """
    may_only_read = not stat.S_IMODE(info.st_mode) & 0o030
    is_ours = os.geteuid() == 0 or info.st_gid in {os.getegid(), *os.getgroups()}
    return may_only_read and info.st_uid == 0 and is_ours


def _group_remedy(info: os.stat_result) -> str:
    """The remedy for a file that root meant for a group; empty for any other."""
    if info.st_uid != 0 or not info.st_mode & 0o030 or info.st_mode & 0o007:
        return ""
    return f", or to let group {info.st_gid} read it: chmod 640"


def keep_group(descriptor: int, path: Path) -> None:
    """Give a new file the group of the one it takes the place of, if root let that group read it. Raises OSError."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(old.st_mode)
    if old.st_uid == 0 and mode & 0o077 == 0o040:
        os.fchown(descriptor, -1, old.st_gid)
        os.fchmod(descriptor, mode & 0o640)


def check_directories(path: Path, name: str) -> None:
    """Raise KeyRingError where everyone may write to a directory on the way, unless it is sticky like /tmp."""
    for directory in path.absolute().parents:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise KeyRingError(
                f"anybody can replace {name}: everyone may write to {directory} (mode {mode:04o}); "
                f"run: chmod o-w {directory}"
            )
