"""The Unix socket of the admin API: where it is, and how it is made and removed."""

import errno
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from whaled.config.sections import AdminSettings
from whaled.errors import OperatorError

# Where whaled-admin.socket listens, and the state directory of the unit that it belongs to.
UNIT_SOCKET = Path("/run/whaled/admin.sock")
UNIT_STATES = frozenset({Path("/var/lib/whaled"), Path("/var/lib/private/whaled")})
# sun_path has 108 bytes, with the zero at the end (unix(7)).
_MOST_PATH_BYTES = 107
BACKLOG = 16


def own_path(settings: AdminSettings, event_log: Path, environ: Mapping[str, str]) -> Path:
    """Return where the daemon makes its socket, if systemd passes none."""
    if settings.socket is not None:
        return Path(settings.socket)
    directory = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(directory) / "admin.sock" if directory else beside(event_log)


def beside(event_log: Path) -> Path:
    """Return the path of a socket beside the event log."""
    resolved = event_log.resolve()
    return resolved.with_name(f"{resolved.stem}.admin.sock")


def paths_of_daemon(settings: AdminSettings, event_log: Path) -> list[Path]:
    """Return where a command looks for the socket of the daemon with this event log, in order.

    The socket of the unit belongs to the event log of the unit: a command for another one must not reach it.
    """
    if settings.socket is not None:
        return [Path(settings.socket)]
    resolved = event_log.resolve()
    of_unit = [UNIT_SOCKET] if {event_log.parent, resolved.parent} & UNIT_STATES else []
    return [*of_unit, beside(event_log)]


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Yield an address of a socket that bind(2) and connect(2) take, also if its path is too long for them.

    Raises OSError.
    """
    if len(os.fsencode(path)) <= _MOST_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a new socket with mode 0600; remove it on exit. Raises OperatorError."""
    _remove_stale(path)
    sock = _unix_socket()
    made: os.stat_result | None = None
    try:
        try:
            with reachable(path) as address:
                sock.bind(address)
            path.chmod(0o600)  # nobody can connect before listen(2), whatever the umask
            sock.listen(BACKLOG)
            made = path.lstat()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OperatorError(
                f"admin.socket: cannot listen on {path}: {reason}; name a path in a directory that whaled may write "
                "to, or set admin.enabled to false"
            ) from error
        yield sock
    finally:
        sock.close()
        with suppress(OSError):
            if made is not None and os.path.samestat(path.lstat(), made):
                path.unlink()


def _unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed. Raises OperatorError for anything else at this path."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OperatorError(f"admin.socket: {path} exists and is not a socket: remove it, or name another path")
        with _unix_socket() as sock, reachable(path) as address:
            sock.connect(address)
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            with suppress(OSError):
                path.unlink()
            return
        if error.errno != errno.EAGAIN:  # full, so somebody listens
            return  # missing, or bind(2) will report it
    except ValueError:  # a zero byte; bind(2) will report it
        return
    raise OperatorError(
        f"admin.socket: another process listens on {path}: stop it, or name another path for this daemon"
    )
