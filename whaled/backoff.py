"""When to ask again what could not be answered: later each time, while everything else goes on."""

import math
from collections.abc import Callable, Hashable, Iterable

from whaled.tables import Tables

FIRST_S = 1.0
MOST_S = 60.0
# A server may ask for any pause; beyond this it is not believed.
ASKED_MOST_S = 3600.0


class Backoff:
    """What failed lately. Keys are remembered until they are forgotten: their owner has them in a bounded queue.

    Times are those of `monotonic`: a clock that is set back must not make anything wait.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._waits: dict[Hashable, tuple[float, float]] = {}
        self._tables = Tables(self._waits)

    def failed(self, key: Hashable, asked_s: float | None = None) -> float:
        """It could not be answered. Returns how many seconds it waits, at least those that the server asked for."""
        _, wait_s = self._waits.get(key, (0.0, FIRST_S))
        pause_s = max(wait_s, min(asked_s or 0.0, ASKED_MOST_S))
        self._waits[key] = (self._monotonic() + pause_s, min(2 * wait_s, MOST_S))
        self._tables.shrink()
        return pause_s

    def forget(self, key: Hashable) -> bool:
        """It was answered, or nobody wants to know any more. Whether it had failed."""
        had_failed = self._waits.pop(key, None) is not None
        self._tables.shrink()
        return had_failed

    def keep(self, keys: Iterable[Hashable]) -> None:
        """Only these are still wanted."""
        if self._waits:
            for key in self._waits.keys() - set(keys):
                del self._waits[key]
            self._tables.shrink()

    def is_due(self, key: Hashable) -> bool:
        """Whether it may be asked now."""
        return key not in self._waits or self._waits[key][0] <= self._monotonic()

    def due(self, key: Hashable) -> float:
        """When it may be asked again; long ago if it did not fail."""
        return self._waits[key][0] if key in self._waits else -math.inf

    def next_due(self, is_asked: Callable[[str], bool] | None = None) -> float | None:
        """When the first of those that failed may be asked again. Leaves out those that are being asked: their answer
        comes by itself.
        """
        dues = (due for key, (due, _) in self._waits.items() if is_asked is None or not is_asked(str(key)))
        return min(dues, default=None)
