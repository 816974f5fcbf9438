"""Log lines about a fault that may come a thousand times a second: the first, then one per interval with the count."""

from collections.abc import Callable, Hashable


class Sampler:
    """Says for each occurrence of a fault whether it gets a log line.

    Keys must come from a closed set: each is remembered.
    """

    def __init__(self, interval_s: float, monotonic: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._seen: dict[Hashable, tuple[float, int]] = {}

    def admit(self, key: Hashable) -> int | None:
        """How many were passed over since the last line about `key`, or None if this one is passed over too."""
        now = self._monotonic()
        last, suppressed = self._seen.get(key, (None, 0))
        if last is not None and now - last < self._interval_s:
            self._seen[key] = (last, suppressed + 1)
            return None
        self._seen[key] = (now, 0)
        return suppressed
