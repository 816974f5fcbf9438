"""The rate limit of requests over all connections."""

import asyncio
from collections import deque

# The number of requests that may be answered at once before the rate applies.
BURST = 20


class Pace:
    """A token bucket with a queue.

    A request that stops waiting has taken no token, so connections that come and go do not delay the others.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._level = float(BURST)
        self._updated = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def reconfigure(self, per_second: float) -> None:
        """Apply a new rate, also to the requests that wait."""
        self._refill()
        self._per_second = per_second
        if self._timer is not None:
            self._timer.cancel()
            self._sleep()

    def turn(self) -> asyncio.Future[None] | None:
        """Return None if a request may be answered now, else a future to await or cancel."""
        self._refill()
        if self._timer is None and self._level >= 1:
            self._level -= 1
            return None
        while self._waiting and self._waiting[-1].done():  # cancelled; those before a waiting request are kept
            self._waiting.pop()
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if self._timer is None:
            self._sleep()
        return turn

    def _refill(self) -> None:
        now = self._loop.time()
        self._level = min(BURST, self._level + (now - self._updated) * self._per_second)
        self._updated = now

    def _sleep(self) -> None:
        self._timer = self._loop.call_later((1 - self._level) / self._per_second, self._wake_up)

    def _wake_up(self) -> None:
        self._timer = None
        self._refill()
        while self._waiting and (self._waiting[0].done() or self._level >= 1):
            turn = self._waiting.popleft()
            if not turn.done():
                self._level -= 1
                turn.set_result(None)
        if self._waiting:
            self._sleep()
