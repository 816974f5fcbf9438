"""Exponential backoff per request: a failed request is repeated after a growing delay, and others are not held up."""

import math
from collections.abc import Callable, Hashable, Iterable

from whaled.tables import Tables

FIRST_S = 1.0
MOST_S = 60.0
# Upper limit for the delay that a server requests.
ASKED_MOST_S = 3600.0


class Backoff:
    """The requests that failed, by key. Keys are remembered until forgotten: the caller's queue of them is bounded.

    Times are those of `monotonic`, so that setting the wall clock back does not prolong a delay.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._waits: dict[Hashable, tuple[float, float]] = {}
        self._tables = Tables(self._waits)

    def failed(self, key: Hashable, asked_s: float | None = None) -> float:
        """Record a failed request. Return its delay in seconds, which is at least the one that the server requested."""
        _, wait_s = self._waits.get(key, (0.0, FIRST_S))
        pause_s = max(wait_s, min(asked_s or 0.0, ASKED_MOST_S))
        self._waits[key] = (self._monotonic() + pause_s, min(2 * wait_s, MOST_S))
        self._tables.shrink()
        return pause_s

    def forget(self, key: Hashable) -> bool:
        """Forget a request that succeeded or is no longer needed. Return whether it had failed."""
        had_failed = self._waits.pop(key, None) is not None
        self._tables.shrink()
        return had_failed

    def keep(self, keys: Iterable[Hashable]) -> None:
        """Forget all requests except these."""
        if self._waits:
            for key in self._waits.keys() - set(keys):
                del self._waits[key]
            self._tables.shrink()

    def is_due(self, key: Hashable) -> bool:
        """Return whether a request may be sent now."""
        return key not in self._waits or self._waits[key][0] <= self._monotonic()

    def due(self, key: Hashable) -> float:
        """Return the time from which a request may be sent again; minus infinity if it has not failed."""
        return self._waits[key][0] if key in self._waits else -math.inf

    def next_due(self, is_asked: Callable[[str], bool] | None = None) -> float | None:
        """Return the earliest time at which a failed request may be sent again, None if there is none.

        Requests for which `is_asked` is true are left out: they are in progress and need no timer.
        """
        dues = (due for key, (due, _) in self._waits.items() if is_asked is None or not is_asked(str(key)))
        return min(dues, default=None)
