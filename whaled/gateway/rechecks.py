"""Checks the credentials of open sessions again: after a reload, the end of a token family, or a step of the clock."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from whaled.gateway.roster import Roster
from whaled.gateway.share import Lane, LoopShare

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The interval at which the wall clock is compared with the monotonic clock, and the difference that counts as a step. A
# slewed clock (at most 500 ppm) takes half an hour to reach it, and an unnecessary recheck does no harm.
CLOCK_LOOK_S = 1.0
CLOCK_STEP_S = 1.0
# The time that one job spends on rechecking sessions.
SLICE_S = 0.0005


class Rechecks:
    """Closes sessions whose key was retired, whose family ended, or whose token expired by a step of the clock.

    Timers run on the monotonic clock, but tokens expire by the wall clock, `clock`, so the two are compared.
    """

    def __init__(self, roster: Roster, share: LoopShare, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._share = share
        self._clock = clock
        self._requested = asyncio.Event()
        self.clock_steps = 0

    def request(self) -> None:
        """Have all sessions checked soon."""
        self._requested.set()

    async def run(self) -> None:
        """Check sessions when it is requested or the clock was set, until cancelled."""
        offset = self._clock() - time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOCK_LOOK_S):
                    await self._requested.wait()
            moved_s = self._clock() - time.monotonic() - offset
            if abs(moved_s) >= CLOCK_STEP_S:
                offset += moved_s
                self.clock_steps += 1
                logger.warning("system_clock_stepped", seconds=round(moved_s, 1))
            elif not self._requested.is_set():
                continue
            self._requested.clear()
            self._check_all()

    def _check_all(self) -> None:
        """Check every session, in slices. A check takes about 5 us, a close 50 us, and there may be 10,000."""
        waiting = self._roster.all()

        def job() -> bool:
            until = time.perf_counter() + SLICE_S
            while waiting and time.perf_counter() < until:
                waiting.pop().recheck()
            return bool(waiting)

        self._share.add(Lane.KNOWN, job, "credentials")
