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
# The same while a flood is remembered.
BEHIND_AGAIN_S = 0.01
# Fewer than so many a second are no flood: whaled is slow for another reason.
FLOOD_RATE = 500
# A flood that comes again soon is met as the last one was left: time of it that is not forgotten at once, and how much
# of that is forgotten in each second in which the queue is empty.
REMEMBERED_S, FORGOTTEN_S = 2.0, 0.2
# How long to leave connections in the kernel when there is no descriptor for them.
SHORT_WAIT_S = 0.25
# Accepting goes on when no attempt has failed for so long.
RESUMED_AFTER_S = 1.0


class ListenerMeter(Protocol):
    """What is counted of accepting."""

    def accept_failed(self) -> None:
        """A connection could not be accepted for want of descriptors or memory, and waits in the kernel."""
        ...


class Backlog:
    """For how long more connections have arrived at a socket than can be accepted. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None  # the queue has not been empty
        self._count = 0  # accepted since then
        self._before = 0.0  # for how long it was so until the queue was empty last
        self._emptied_at = 0.0

    def filled(self) -> None:
        """There is a connection in the queue, which was empty."""
        now = self._clock()
        self._before = max(0.0, self._before - FORGOTTEN_S * (now - self._emptied_at))
        self._since, self._count = now, 0

    def accepted(self) -> None:
        """One of the queue was accepted."""
        self._count += 1

    def emptied(self) -> None:
        """The queue is empty, or nothing can be accepted from it for now."""
        self._before = min(REMEMBERED_S, max(self._before, self.behind_s))
        self._since, self._emptied_at = None, self._clock()

    @property
    def behind_s(self) -> float:
        """Seconds; those of a flood that went on until a moment ago are added. 0 if the queue was empty lately, or if
        few arrived: then it is not their number that keeps them waiting.
        """
        if self._since is None:
            return 0.0
        busy_s = self._clock() - self._since
        is_behind = busy_s > (BEHIND_AGAIN_S if self._before else BEHIND_S)
        return self._before + busy_s if is_behind and self._count > FLOOD_RATE * busy_s else 0.0


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
        self._backlogs = {sock: Backlog() for sock in sockets}
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
        """For how long more connections have arrived than can be accepted; the longest of all sockets."""
        return max(backlog.behind_s for backlog in self._backlogs.values())

    def _wait(self, sock: socket.socket) -> None:
        if self._is_open:
            asyncio.get_running_loop().add_reader(sock, self._ready, sock)

    def _ready(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        self._backlogs[sock].filled()
        self._share.add(Lane.ACCEPT, partial(self._accept, sock), sock)

    def _accept(self, sock: socket.socket) -> bool:
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
                    continue  # it concerns one connection that its peer has given up already (accept(2))
                self._short(sock, error)
                return False
            self._backlogs[sock].accepted()
            self._arrive(accepted, peer_address(peer))
        return True

    def _short(self, sock: socket.socket, error: OSError) -> None:
        self._backlogs[sock].emptied()
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
