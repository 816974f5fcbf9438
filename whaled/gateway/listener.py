"""Accepts client connections: a few per slice, as many as there are descriptors for; the rest waits in the kernel."""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import structlog

from whaled.gateway.share import Lane, LoopShare
from whaled.listening import SHORTAGES, peer_address
from whaled.summaries import Summary

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Connections accepted by one job, 50 us each.
ACCEPTS = 4
# More arrive than can be accepted when there has been one waiting for so long.
BEHIND_S = 0.1
# Fewer than so many a second are no flood: whaled is slow for another reason.
FLOOD_RATE = 500
# How long to leave connections in the kernel when there is no descriptor for them.
SHORT_WAIT_S = 0.25
# Accepting goes on when no attempt has failed for so long.
RESUMED_AFTER_S = 1.0


class ListenerMeter(Protocol):
    """What is counted of accepting."""

    def accept_failed(self) -> None:
        """A connection could not be accepted for want of descriptors or memory, and waits in the kernel."""
        ...


class Listener:
    """Listening sockets of one kind of client. `arrive` gets every accepted socket with the peer's address."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        arrive: Callable[[socket.socket, str], None],
        share: LoopShare,
        meter: ListenerMeter,
        reserve: "Reserve",
    ) -> None:
        self.sockets = list(sockets)
        self._arrive = arrive
        self._share = share
        self._meter = meter
        self._reserve = reserve
        self._is_open = False
        # Of sockets whose queue has not been empty: since when, and how many were accepted meanwhile.
        self._busy: dict[socket.socket, tuple[float, int]] = {}
        self._short_since: float | None = None
        self._resumed: asyncio.TimerHandle | None = None
        self._shortages = Summary(
            logger, "no new connections are accepted for now", level="error", per_source=1, in_all=1
        )
        self._recoveries = Summary(
            logger, "new connections are accepted again", level="warning", per_source=1, in_all=1
        )

    def start(self, backlog: int) -> None:
        """Accept from now on."""
        self._is_open = True
        for sock in self.sockets:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                # Accepted sockets inherit it. Without it an alert right behind another frame waits for the client's
                # acknowledgement of that, which may take 40 ms.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.listen(backlog)  # a socket that was passed came with a backlog of its own
            self._wait(sock)

    def stop(self) -> None:
        """Accept nothing more. What was accepted has arrived; what was not waits in the socket while that is open."""
        if self._is_open:
            self._is_open = False
            for sock in self.sockets:
                asyncio.get_running_loop().remove_reader(sock)

    def close(self) -> None:
        """Stop, and close the sockets."""
        self.stop()
        self._await_no_recovery()
        self._shortages.flush()
        self._recoveries.flush()
        for sock in self.sockets:
            sock.close()

    @property
    def behind_s(self) -> float:
        """For how long more connections have arrived than can be accepted. 0 if the queue was empty lately, or if they
        were few: then it is not their number that keeps them waiting.
        """
        now = time.monotonic()
        return max((now - since for since, count in self._busy.values() if _is_behind(now - since, count)), default=0.0)

    def _wait(self, sock: socket.socket) -> None:
        if self._is_open:
            asyncio.get_running_loop().add_reader(sock, self._ready, sock)

    def _ready(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        self._busy[sock] = (time.monotonic(), 0)
        self._share.add(Lane.ACCEPT, partial(self._accept, sock), sock)

    def _accept(self, sock: socket.socket) -> bool:
        for _ in range(ACCEPTS):
            if not self._is_open:
                return False
            try:
                accepted, peer = sock.accept()
            except (BlockingIOError, InterruptedError):
                self._busy.pop(sock, None)
                self._wait(sock)
                return False
            except OSError as error:
                if error.errno not in SHORTAGES:
                    continue  # it concerns one connection that its peer has given up already (accept(2))
                self._short(sock, error)
                return False
            since, count = self._busy[sock]
            self._busy[sock] = (since, count + 1)
            self._arrive(accepted, peer_address(peer))
        return True

    def _short(self, sock: socket.socket, error: OSError) -> None:
        self._busy.pop(sock, None)
        self._reserve.release()
        self._meter.accept_failed()
        self._await_no_recovery()
        if self._short_since is None:
            self._short_since = time.monotonic()
        self._shortages.line(
            "accept", problem=error.strerror, what_to_do="raise LimitNOFILE=, or lower gateway.max_connections"
        )
        self._try_later(sock)

    def _try_later(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().call_later(SHORT_WAIT_S, self._try_again, sock)

    def _try_again(self, sock: socket.socket) -> None:
        if not self._is_open:
            return
        if self._reserve.take():
            self._wait(sock)
            self._await_no_recovery()
            self._resumed = asyncio.get_running_loop().call_later(RESUMED_AFTER_S, self._is_over)
        else:
            self._try_later(sock)

    def _await_no_recovery(self) -> None:
        if self._resumed is not None:
            self._resumed.cancel()
            self._resumed = None

    def _is_over(self) -> None:
        self._resumed = None
        if self._short_since is not None:
            after_s = time.monotonic() - self._short_since
            self._short_since = None
            self._recoveries.line("accept", after_s=round(after_s, 1))


def _is_behind(busy_s: float, count: int) -> bool:
    return busy_s > BEHIND_S and count > FLOOD_RATE * busy_s


class Reserve:
    """Descriptors that are held so that the daemon's own files can be opened when clients have taken all others."""

    SIZE = 16

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self) -> bool:
        """Hold them. False, holding none, if there are not enough."""
        try:
            while len(self._held) < self.SIZE:
                self._held.append(socket.socket(socket.AF_UNIX))
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Leave them to whoever in this process opens a file next."""
        while self._held:
            self._held.pop().close()
