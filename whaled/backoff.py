"""Exponential backoff per key: what fails is retried later each time, without delaying anything else."""

import math
from collections.abc import Callable, Hashable, Iterable

from whaled.tables import Tables

INITIAL_S = 1.0
MAX_S = 60.0
# A server's Retry-After is honoured up to this many seconds.
MAX_RETRY_AFTER_S = 3600.0


class Backoff:
    """The keys that failed, and when each may be retried.

    A key is remembered until `forget` or `retain` removes it; its owner keeps it in a bounded queue. Times are those of
    `monotonic`, so setting the wall clock back delays nothing.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._waits: dict[Hashable, tuple[float, float]] = {}
        self._tables = Tables(self._waits)

    def failed(self, key: Hashable, retry_after_s: float | None = None) -> float:
        """Record a failure. Returns the seconds until the retry, at least `retry_after_s` as far as it is honoured."""
        _, wait_s = self._waits.get(key, (0.0, INITIAL_S))
        pause_s = max(wait_s, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))
        self._waits[key] = (self._monotonic() + pause_s, min(2 * wait_s, MAX_S))
        self._tables.shrink()
        return pause_s

    def forget(self, key: Hashable) -> bool:
        """Remove a key that succeeded or is no longer wanted. Returns whether it had failed."""
        had_failed = self._waits.pop(key, None) is not None
        self._tables.shrink()
        return had_failed

    def retain(self, keys: Iterable[Hashable]) -> None:
        """Remove all keys but these."""
        if self._waits:
            for key in self._waits.keys() - set(keys):
                del self._waits[key]
            self._tables.shrink()

    def is_due(self, key: Hashable) -> bool:
        """Return whether a key may be tried now."""
        return key not in self._waits or self._waits[key][0] <= self._monotonic()

    def due(self, key: Hashable) -> float:
        """Return when a key may be tried again (monotonic), minus infinity if it did not fail."""
        return self._waits[key][0] if key in self._waits else -math.inf

    def next_due(self, is_running: Callable[[str], bool] | None = None) -> float | None:
        """Return when the first failed key may be tried again (monotonic), None if there is none.

        Keys with a running request are left out, since its response needs no waiting for.
        """
        dues = (due for key, (due, _) in self._waits.items() if is_running is None or not is_running(str(key)))
        return min(dues, default=None)
