"""Sampling of log lines about a fault that may occur a thousand times a second.

The first occurrence is logged, then at most one per interval, with the number of those suppressed.
"""

from collections.abc import Callable, Hashable


class Sampler:
    """Decides for each occurrence of a fault whether it is logged.

    Keys must come from a closed set, because each is remembered.
    """

    def __init__(self, interval_s: float, monotonic: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._seen: dict[Hashable, tuple[float, int]] = {}

    def admit(self, key: Hashable) -> int | None:
        """Return the number suppressed since the last line about `key`, or None if this one is suppressed too."""
        now = self._monotonic()
        last, suppressed = self._seen.get(key, (None, 0))
        if last is not None and now - last < self._interval_s:
            self._seen[key] = (last, suppressed + 1)
            return None
        self._seen[key] = (now, 0)
        return suppressed
