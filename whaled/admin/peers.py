"""Who may use the admin API: the kernel names the user at the other end of a Unix socket (SO_PEERCRED)."""

import os
import pwd
import socket
import struct
from collections.abc import Iterable, Mapping

from aiohttp import web
from msgspec import Struct

from whaled.errors import OperatorError

# struct ucred: pid, uid, gid (unix(7)).
_UCRED = struct.Struct("3i")
# The user that the kernel reports for every user unknown to this process's user namespace (PrivateUsers= of the unit).
NOBODY = 65534
_MOST_UID = 2**32 - 2


class Peer(Struct, frozen=True):
    """The process at the other end."""

    pid: int
    uid: int


def peer_of(request: web.BaseRequest) -> Peer | None:
    """Return the peer of a request; None if its connection is lost or not a Unix socket."""
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    try:
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    return Peer(pid, uid & 0xFFFFFFFF)


def allowed_users(users: Iterable[str]) -> Mapping[int, str]:
    """Return the users who may use the admin API, by number, with the text that names each in logs.

    Names are looked up now, since a look-up may block. Raises OperatorError for an unknown name.
    """
    found = {os.geteuid(): f"uid {os.geteuid()} (whaled's own user)"}
    for user in users:
        if user.isascii() and user.isdigit():
            uid = int(user)
        else:
            try:
                uid = pwd.getpwnam(user).pw_uid
            except (KeyError, ValueError):
                raise OperatorError(f"admin.users: this machine has no user {user!r}: correct the name") from None
        if uid == NOBODY or uid > _MOST_UID:
            raise OperatorError(
                f"admin.users: found {user!r}: this number stands for every user that the kernel does not know here: "
                "name a real user"
            )
        found.setdefault(uid, f"uid {uid} ({user})")
    return found | {0: "uid 0 (root)"}
