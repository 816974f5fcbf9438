"""The interface to systemd: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Without systemd every call does nothing.
"""

import asyncio
import contextlib
import errno
import math
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping

import sdnotify
from msgspec import Struct

from whaled.errors import OperatorError

# The number of the first passed descriptor (sd_listen_fds(3)).
FIRST_DESCRIPTOR = 3
# The interval of retries for messages that the manager did not take, and the most that are kept. A reload is two
# messages.
RETRY_S = 0.25
MAX_WAITING = 16


class Notifier:
    """The sender of messages to the service manager, if one started this process.

    It never waits. The manager may be blocked (a long daemon-reload, a frozen process 1), and its socket holds only a
    few datagrams (net.unix.max_dgram_qlen). Messages that change the state of the unit (`ready`, `reloading`,
    `stopping`) are kept until the socket takes them. `watchdog_s` is the longest time between calls of `alive`, None if
    the manager does not watch this process.
    """

    def __init__(self) -> None:
        self.watchdog_s = _watchdog_s(os.environ)
        self._notifier = sdnotify.SystemdNotifier() if os.environ.get("NOTIFY_SOCKET") else None
        if self._notifier is not None and self._notifier.socket is not None:
            self._notifier.socket.setblocking(False)
            self._notifier.debug = True  # raise errors of a send instead of dropping the message
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._ping_until = -math.inf
        self._retry: asyncio.TimerHandle | None = None
        self._status = ""

    def ready(self) -> None:
        """Report that the start or a reload is complete."""
        self._send_in_order(b"READY=1")

    def reloading(self) -> None:
        """Report that a reload begins. systemd then waits for `ready`."""
        self._send_in_order(b"RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))

    def stopping(self) -> None:
        """Report that the process is stopping."""
        self._send_in_order(b"STOPPING=1")

    def alive(self) -> None:
        """Ping the watchdog. A ping that is not taken is retried until the next one is due, and then dropped."""
        self._ping_until = time.monotonic() + (self.watchdog_s or 0.0) / 3
        self._send_waiting()

    def status(self, text: str) -> None:
        """Set the line in `systemctl status`. It is sent only if it has changed, and dropped if it is not taken now."""
        if text != self._status and not self._waiting and self._send(f"STATUS={text}".encode(errors="replace")):
            self._status = text

    def close(self) -> None:
        """Send nothing more."""
        if self._retry is not None:
            self._retry.cancel()
        if self._notifier is not None and self._notifier.socket is not None:
            self._notifier.socket.close()
        self._notifier = None

    def _send_in_order(self, message: bytes) -> None:
        self._waiting.append(message)
        self._send_waiting()

    def _send_waiting(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        while self._waiting and self._send(self._waiting[0]):
            self._waiting.popleft()
        if time.monotonic() < self._ping_until and self._send(b"WATCHDOG=1"):
            self._ping_until = -math.inf
        if self._waiting or time.monotonic() < self._ping_until:
            with contextlib.suppress(RuntimeError):  # no loop: before the start, or after the end
                self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._send_waiting)

    def _send(self, message: bytes) -> bool:
        """Send a message. Return False if it must be retried; True if it was taken or cannot be sent at all."""
        if self._notifier is None or self._notifier.socket is None:
            return True
        try:
            # sdnotify encodes as Latin-1, so decoding as Latin-1 makes it send exactly these bytes, which are UTF-8.
            self._notifier.notify(message.decode("latin-1"))
        except OSError as error:
            return error.errno not in {errno.EAGAIN, errno.ENOBUFS}
        return True


def _watchdog_s(environ: MutableMapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    limit_us = environ.get("WATCHDOG_USEC", "")
    return int(limit_us) / 1e6 if limit_us.isdecimal() and int(limit_us) else None


class Passed(Struct, frozen=True):
    """The listening sockets that systemd passed. They exist before and after this process."""

    clients: tuple[socket.socket, ...] = ()
    metrics: tuple[socket.socket, ...] = ()
    admin: tuple[socket.socket, ...] = ()


def passed_sockets(environ: MutableMapping[str, str]) -> Passed:
    """Return the sockets of the socket units, by FileDescriptorName=: `ws`, `metrics` (the HTTP server), `admin`.

    The variables are removed from `environ`, as sd_listen_fds does, since they are meant for this process only. Raises
    OperatorError for a socket that whaled cannot use.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return Passed()
    by_name: dict[str, list[socket.socket]] = {"ws": [], "metrics": [], "admin": []}
    for number, name in zip(range(int(count)), [*names.split(":"), *("" for _ in range(int(count)))], strict=False):
        os.set_inheritable(FIRST_DESCRIPTOR + number, False)
        if name not in by_name:
            raise OperatorError(
                f"systemd passed a socket named {name!r}; known are 'ws' (clients), 'metrics' (HTTP) and 'admin': "
                "set FileDescriptorName= in the socket unit"
            )
        by_name[name].append(_listening(FIRST_DESCRIPTOR + number, name))
    return Passed(*(tuple(by_name[name]) for name in ("ws", "metrics", "admin")))


def _listening(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
        is_usable = sock.type == socket.SOCK_STREAM and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise OperatorError(
            f"the descriptor that systemd passed as {name!r} is not a socket: {error.strerror}"
        ) from error
    if not is_usable:
        raise OperatorError(
            f"the socket that systemd passed as {name!r} does not listen for streams: "
            "the socket unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return sock
