"""Event loop lag, and the pings to systemd's watchdog, which restarts a daemon that no longer delivers alerts."""

import asyncio
from collections.abc import Callable

import structlog

from whaled.ops.systemd import Notifier
from whaled.registry import Registry

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The interval between two measurements of loop lag.
LOOK_S = 0.25


class LoopMeter:
    """The metric of the event loop."""

    def __init__(self, registry: Registry) -> None:
        self._lag = registry.histogram("event_loop_lag_seconds", "Delay of a timer of the event loop.")

    def lagged(self, seconds: float) -> None:
        """Record the delay of a timer."""
        self._lag.observe(seconds)


class LoopWatch:
    """A monitor of how late the event loop's timers fire."""

    def __init__(self, meter: LoopMeter) -> None:
        self._meter = meter
        self._worst_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOK_S
            await asyncio.sleep(LOOK_S)
            lag_s = max(0.0, loop.time() - due)
            self._meter.lagged(lag_s)
            self._worst_s = max(self._worst_s, lag_s)

    def worst_s(self) -> float:
        """Return the worst lag since the last call."""
        worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s


async def feed_watchdog(notifier: Notifier, loop_watch: LoopWatch, is_canary_alive: Callable[[], bool]) -> None:
    """Send a ping to systemd's watchdog periodically, while canaries arrive and the event loop is on time.

    The interval is a third of the watchdog's timeout. A loop that was blocked for that long gets no ping.
    """
    if notifier.watchdog_s is None:
        return
    period_s = notifier.watchdog_s / 3
    was_well = True
    while True:
        is_well = is_canary_alive() and loop_watch.worst_s() < period_s
        if is_well:
            notifier.alive()
        elif was_well:
            logger.error(
                "watchdog_ping_withheld", canary_arrives=is_canary_alive(), restart_after_s=notifier.watchdog_s
            )
        was_well = is_well
        await asyncio.sleep(period_s)
