"""Accepts client connections, a few per slice and within the limit of descriptors. The others wait in the kernel."""

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from whaled.gateway.meters import GatewayMeter
from whaled.gateway.share import Lane, LoopShare
from whaled.listening import SHORTAGES, peer_address
from whaled.summaries import Summary

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The number of connections that one job accepts, at 50 us each.
ACCEPTS = 4
# Connections arrive faster than they can be accepted if the accept queue has not been empty for this time.
BEHIND_S = 0.1
# The same while a recent flood is remembered.
BEHIND_AGAIN_S = 0.01
# At a lower rate of connections per second there is no flood: whaled is slow for another reason.
FLOOD_RATE = 500
# States of a connection in struct tcp_info (linux/tcp_states.h).
_CLOSE, _CLOSE_WAIT = 7, 8
# The part of the accept queue from which on it counts as deep. A queue of 4,096 overflows a third of a second after a
# flood of 12,000 connections a second began; then the kernel drops packets of new clients, which repeat them after 1 s.
DEEP_PART = 1 / 8
# The response to a flood continues where the previous one ended. At most REMEMBERED_S of the previous flood's duration
# is remembered; FORGOTTEN_S of it is forgotten for each second in which the queue is empty.
REMEMBERED_S, FORGOTTEN_S = 2.0, 0.2
# The time that connections are left in the kernel when there is no descriptor for them.
SHORT_WAIT_S = 0.25
# A shortage has ended when no accept has failed for this time.
RESUMED_AFTER_S = 1.0


def waiting_part(sock: socket.socket) -> float:
    """Return how full the accept queue of a listening socket is, 0 to 1, and 0 where the kernel does not report it.

    For a listening socket, Linux reports the length of the queue as tcpi_unacked and its limit as tcpi_sacked, at
    bytes 24 and 28 of struct tcp_info (linux/tcp.h).
    """
    try:
        waiting, limit = struct.unpack_from("=II", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 24)
    except (OSError, struct.error):  # a Unix socket, or no Linux
        return 0.0
    return waiting / limit if limit else 0.0


def has_left(sock: socket.socket) -> bool:
    """Return whether the peer of an accepted TCP socket has already closed its side or reset the connection."""
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (OSError, IndexError):  # a Unix socket, or no Linux
        return False
    return state in (_CLOSE, _CLOSE_WAIT)


class Backlog:
    """The time for which connections have arrived at a socket faster than they can be accepted.

    `clock` is monotonic. `is_deep` is True while so many connections wait that the kernel may soon drop further ones.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None  # the time since when the queue has not been empty
        self._count = 0  # connections accepted since then
        self._before = 0.0  # the remembered duration of the previous flood
        self._emptied_at = 0.0
        self.is_deep = False

    def filled(self) -> None:
        """Record that a connection has arrived in the empty queue."""
        now = self._clock()
        self._before = max(0.0, self._before - FORGOTTEN_S * (now - self._emptied_at))
        self._since, self._count, self.is_deep = now, 0, False

    def measured(self, part: float) -> None:
        """Record how full the queue is, 0 to 1."""
        self.is_deep = part >= DEEP_PART

    def accepted(self) -> None:
        """Record that a connection was accepted."""
        self._count += 1

    def emptied(self) -> None:
        """Record that the queue is empty, or that nothing can be accepted from it for now."""
        self._before = min(REMEMBERED_S, max(self._before, self.behind_s))
        self._since, self._emptied_at, self.is_deep = None, self._clock(), False

    @property
    def behind_s(self) -> float:
        """The seconds for which connections have arrived too fast, plus those remembered of the previous flood.

        It is 0 if the queue was empty recently, and if few connections arrived, since then their number is not why
        they wait.
        """
        if self._since is None:
            return 0.0
        busy_s = self._clock() - self._since
        is_behind = self.is_deep or busy_s > (BEHIND_AGAIN_S if self._before else BEHIND_S)
        return self._before + busy_s if is_behind and self._count > FLOOD_RATE * busy_s else 0.0


class Listener:
    """The listening sockets of the gateway. `arrive` is called with every accepted socket and its peer's address."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        arrive: Callable[[socket.socket, str], None],
        share: LoopShare,
        meter: GatewayMeter,
        reserve: "Reserve",
    ) -> None:
        self.sockets = list(sockets)
        self._arrive = arrive
        self._share = share
        self._meter = meter
        self._reserve = reserve
        self._is_open = False
        self._backlogs = {sock: Backlog() for sock in sockets}
        self._short_since: float | None = None
        self._recovery: asyncio.TimerHandle | None = None
        self._shortages = Summary(logger, "accept_paused", level="error", per_source=1, in_all=1)
        self._recoveries = Summary(logger, "accept_resumed", level="warning", per_source=1, in_all=1)

    def start(self, backlog: int) -> None:
        """Start to accept connections."""
        self._is_open = True
        for sock in self.sockets:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                # Accepted sockets inherit it. Without it, an alert right after another frame would wait until the
                # client acknowledges that frame, which may take 40 ms.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.listen(backlog)  # replaces the backlog of a passed socket
            self._wait(sock)

    def stop(self) -> None:
        """Stop accepting. Connections not accepted yet wait in the sockets for as long as those are open."""
        if self._is_open:
            self._is_open = False
            for sock in self.sockets:
                asyncio.get_running_loop().remove_reader(sock)

    def close(self) -> None:
        """Stop accepting and close the sockets."""
        self.stop()
        self._cancel_recovery()
        self._shortages.flush()
        self._recoveries.flush()
        for sock in self.sockets:
            sock.close()

    @property
    def behind_s(self) -> float:
        """The seconds for which connections have arrived faster than they can be accepted, the maximum over sockets."""
        return max(backlog.behind_s for backlog in self._backlogs.values())

    @property
    def is_deep(self) -> bool:
        """True if the accept queue of one of the sockets is deep."""
        return any(backlog.is_deep for backlog in self._backlogs.values())

    def _wait(self, sock: socket.socket) -> None:
        if self._is_open:
            asyncio.get_running_loop().add_reader(sock, self._ready, sock)

    def _ready(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        self._backlogs[sock].filled()
        self._share.add(Lane.ACCEPT, partial(self._accept, sock), sock)

    def _accept(self, sock: socket.socket) -> bool:
        self._backlogs[sock].measured(waiting_part(sock))
        for _ in range(ACCEPTS):
            if not self._is_open:
                return False
            try:
                accepted, peer = sock.accept()
            except (BlockingIOError, InterruptedError):
                self._backlogs[sock].emptied()
                self._wait(sock)
                return False
            except OSError as error:
                if error.errno not in SHORTAGES:
                    continue  # the error is of one connection that its peer has already closed (accept(2))
                self._wait_for_descriptors(sock, error)
                return False
            self._backlogs[sock].accepted()
            self._arrive(accepted, peer_address(peer))
        return True

    def _wait_for_descriptors(self, sock: socket.socket, error: OSError) -> None:
        self._backlogs[sock].emptied()
        self._reserve.release()
        self._meter.accept_failed()
        self._cancel_recovery()
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
            self._cancel_recovery()
            self._recovery = asyncio.get_running_loop().call_later(RESUMED_AFTER_S, self._log_recovery)
        else:
            self._try_later(sock)

    def _cancel_recovery(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None

    def _log_recovery(self) -> None:
        self._recovery = None
        if self._short_since is not None:
            after_s = time.monotonic() - self._short_since
            self._short_since = None
            self._recoveries.line("accept", after_s=round(after_s, 1))


class Reserve:
    """Descriptors held in reserve, so that the daemon can open its own files when clients have taken all others."""

    SIZE = 16

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self) -> bool:
        """Reserve the descriptors. Return False, reserving none, if there are not enough."""
        try:
            while len(self._held) < self.SIZE:
                self._held.append(socket.socket(socket.AF_UNIX))
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Release the descriptors for the next files that this process opens."""
        while self._held:
            self._held.pop().close()
