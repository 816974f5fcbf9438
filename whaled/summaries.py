"""Rate limits for log lines that clients can cause at will: the first of each period, then one line with a count.

journald drops all lines of a unit that logs too much (by default 10,000 in 30 s); without a limit, unauthenticated
clients could thus suppress important lines.
"""

import asyncio
import time
from collections.abc import Callable

from structlog.stdlib import BoundLogger

PERIOD_S = 10.0
# Maximum number of sources counted individually in a period; further ones are counted only in the total.
MAX_SOURCES = 1000


class Summary:
    """The log lines of one event. In a period, at most `in_all` are logged, and at most `per_source` of one source.

    A source is an address or a client's id. The line with the count of the others has the same level.
    """

    def __init__(
        self,
        logger: BoundLogger,
        event: str,
        *,
        level: str = "info",
        per_source: int,
        in_all: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._event = event
        self._level = level
        self._per_source = per_source
        self._in_all = in_all
        self._clock = clock
        self._began: float | None = None
        self._shown = 0
        self._shown_of: dict[str, int] = {}
        self._left_out = 0
        self._left_out_of: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def line(self, source: str, **fields: object) -> None:
        """Log a line now, or count it."""
        if self.admits(source):
            getattr(self._logger, self._level)(self._event, **fields)

    def admits(self, source: str) -> bool:
        """Return whether a line is to be logged now; otherwise it is counted."""
        now = self._clock()
        if self._began is None or not 0 <= now - self._began < PERIOD_S:
            self.flush()
            self._began = now
        shown = self._shown_of.get(source, 0)
        if self._shown < self._in_all and shown < self._per_source:
            self._shown += 1
            self._shown_of[source] = shown + 1  # bounded: it has at most as many sources as lines were shown
            return True
        self._left_out += 1
        if source in self._left_out_of or len(self._left_out_of) < MAX_SOURCES:
            self._left_out_of[source] = self._left_out_of.get(source, 0) + 1
        if self._timer is None:
            self._wake_up(self._began + PERIOD_S - now)
        return False

    def flush(self) -> None:
        """End the period: log the number of lines left out, if any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left_out and self._began is not None:
            level = "error" if self._level == "exception" else self._level  # no exception is being handled here
            busiest = max(self._left_out_of, key=self._left_out_of.__getitem__)
            getattr(self._logger, level)(
                "log_lines_suppressed",
                of=self._event,
                lines=self._left_out,
                sources=len(self._left_out_of),
                busiest=busiest,
                busiest_lines=self._left_out_of[busiest],
                seconds=round(min(self._clock() - self._began, PERIOD_S), 1),
            )
        self._began = None
        self._shown = self._left_out = 0
        self._shown_of.clear()
        self._left_out_of.clear()

    def _wake_up(self, after_s: float) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # without a loop, the next line or the owner flushes
        self._timer = loop.call_later(after_s, self.flush)
