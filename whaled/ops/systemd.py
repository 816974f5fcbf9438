"""What systemd gives and is told: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Without systemd every call
does nothing.
"""

import os
import socket
import time
from collections.abc import MutableMapping

import sdnotify
from msgspec import Struct

from whaled.errors import OperatorError

# sd_listen_fds(3): passed descriptors begin here.
FIRST_DESCRIPTOR = 3


class Notifier:
    """Speaks to the service manager that started this process, if one did.

    `watchdog_s` is the time within which it wants to hear `alive`, None where it does not watch this process.
    """

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        self._status = ""
        self.watchdog_s = _watchdog_s(os.environ)

    def ready(self) -> None:
        """Start-up, or a reload, is finished."""
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        """A reload begins. systemd waits for `ready`."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The process is on its way out."""
        self._notifier.notify("STOPPING=1")

    def alive(self) -> None:
        """What the watchdog waits for."""
        self._notifier.notify("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; said again only when it changed."""
        if text != self._status:
            self._status = text
            # sdnotify sends Latin-1, systemd takes UTF-8 only: these letters become those bytes.
            self._notifier.notify(f"STATUS={text}".encode(errors="replace").decode("latin-1"))

    def close(self) -> None:
        """Say nothing more."""
        if self._notifier.socket is not None:
            self._notifier.socket.close()


def _watchdog_s(environ: MutableMapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    limit_us = environ.get("WATCHDOG_USEC", "")
    return int(limit_us) / 1e6 if limit_us.isdecimal() and int(limit_us) else None


class Passed(Struct, frozen=True):
    """Sockets that listened before this process was there, and go on when it is gone."""

    clients: tuple[socket.socket, ...] = ()
    metrics: tuple[socket.socket, ...] = ()


def passed_sockets(environ: MutableMapping[str, str]) -> Passed:
    """The sockets of the socket units, by their FileDescriptorName=: `ws` for clients, `metrics` for the HTTP server.

    The variables are taken out of `environ`, as sd_listen_fds does: they are not meant for anybody else. Raises
    OperatorError for a socket that nobody here can use.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return Passed()
    by_name: dict[str, list[socket.socket]] = {"ws": [], "metrics": []}
    for number, name in zip(range(int(count)), [*names.split(":"), *("" for _ in range(int(count)))], strict=False):
        os.set_inheritable(FIRST_DESCRIPTOR + number, False)
        if name not in by_name:
            raise OperatorError(
                f"systemd passed a socket named {name!r}; known are 'ws' (clients) and 'metrics' (HTTP): "
                "set FileDescriptorName= in the socket unit"
            )
        by_name[name].append(_listening(FIRST_DESCRIPTOR + number, name))
    return Passed(tuple(by_name["ws"]), tuple(by_name["metrics"]))


def _listening(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
        is_usable = sock.type == socket.SOCK_STREAM and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise OperatorError(f"what systemd passed as {name!r} is no socket: {error.strerror}") from error
    if not is_usable:
        raise OperatorError(
            f"the socket that systemd passed as {name!r} does not listen for streams: "
            "the socket unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return sock
