"""Checks of files that contain a secret: whether other users can read or replace them."""

import grp
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.errors import KeyRingError

MAX_FILE_BYTES = 1024 * 1024
# The group that whaled.service is a member of, and nothing else. It is not `whaled`: systemd refuses a group with the
# name of the unit's dynamic user.
SERVICE_GROUP = "whaled-keys"


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open a file for reading. Yield its descriptor and its status.

    The status is that of the open file: the path may name another file by the time of a separate stat.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor, os.fstat(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(descriptor: int, path: Path, sort: str) -> bytes:
    """Read a whole file. Raises OSError, and KeyRingError that names the `sort` of file if it is too large."""
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise KeyRingError(f"{path} is larger than {MAX_FILE_BYTES} bytes: not a {sort}")
    return raw


def check_privacy(path: Path, info: os.stat_result, name: str, *, is_credential: bool = False) -> None:
    """Raise KeyRingError if other users can read or replace a file that contains a secret.

    Only its owner, root and a group that root chose may read it, and only its owner and root may replace it.
    """
    if not stat.S_ISREG(info.st_mode):
        raise KeyRingError(f"{name} is not a regular file")
    mode = stat.S_IMODE(info.st_mode)
    # systemd 257 passes a credential as 0440 root:root with an ACL for the service, so that the group bits are set:
    # only those of "others" are significant.
    if mode & 0o007 or (mode & 0o070 and not is_credential and not _is_for_our_group(info)):
        raise KeyRingError(f"others can read {name} (mode {mode:04o}); run: chmod 600 {path}{_group_remedy(info)}")
    if is_credential:
        return  # its directory is systemd's
    if info.st_uid not in {0, os.geteuid()}:
        raise KeyRingError(f"{name} belongs to user {info.st_uid}, not to root or to the user that runs this")
    # A symbolic link and its file may be in different directories; write access to either allows replacing the file.
    check_directories(path, name)
    check_directories(path.resolve(), name)


def _is_for_our_group(info: os.stat_result) -> bool:
    """Return whether root owns a file and lets a group read it of which this process is a member (or it runs as root).

    Kubernetes (fsGroup) and Debian (ssl-cert) provide secrets in this way. A user's own file needs no group.
    """
    may_only_read = not stat.S_IMODE(info.st_mode) & 0o030
    is_ours = os.geteuid() == 0 or info.st_gid in {os.getegid(), *os.getgroups()}
    return may_only_read and info.st_uid == 0 and is_ours


def _group_remedy(info: os.stat_result) -> str:
    """Return the remedy for a file that root intended for a group; "" for any other."""
    if info.st_uid != 0 or not info.st_mode & 0o030 or info.st_mode & 0o007:
        return ""
    return f", or to let group {info.st_gid} read it: chmod 640"


def unreadable(path: Path, error: OSError) -> str:
    """Return the remedy for a file that this process may not read; "" for any other error."""
    if not isinstance(error, PermissionError):
        return ""
    return f"; run this as root, or for the service: chgrp {SERVICE_GROUP} {path} && chmod 640 {path}"


def give_to_group(descriptor: int, path: Path) -> None:
    """Give a new file the group of the file that it replaces, if root let that group read it. Raises OSError.

    A file that root makes where there was none is for SERVICE_GROUP, if this machine has that group.
    """
    try:
        old = path.stat()
    except FileNotFoundError:
        if os.geteuid() == 0 and (group := _service_group()) is not None:
            os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, 0o640)
        return
    mode = stat.S_IMODE(old.st_mode)
    if old.st_uid == 0 and mode & 0o077 == 0o040:
        os.fchown(descriptor, -1, old.st_gid)
        os.fchmod(descriptor, mode & 0o640)


def _service_group() -> int | None:
    try:
        return grp.getgrnam(SERVICE_GROUP).gr_gid
    except KeyError:
        return None


def check_directories(path: Path, name: str) -> None:
    """Raise KeyRingError if a directory above the file is writable for everyone, unless it is sticky like /tmp."""
    for directory in path.absolute().parents:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise KeyRingError(
                f"anybody can replace {name}: everyone may write to {directory} (mode {mode:04o}); "
                f"run: chmod o-w {directory}"
            )
