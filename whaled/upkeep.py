"""What the daemon does about itself, beside its work: watches loop and memory, feeds the watchdog, says how it is."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import structlog

from whaled.canary import Canary
from whaled.config import sections
from whaled.eventlog.store import EventLog
from whaled.gateway.server import Gateway
from whaled.model import SAT_PER_BTC, Alert
from whaled.ops import memory
from whaled.ops.systemd import Notifier

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# How often the loop's lag and the memory are looked at. A flood of connections takes some MiB in that time.
LOOK_S = 0.5
# `shed_at` of the limit starts shedding; this much less of it ends it, so that one client more does not start it again.
RELIEF = 0.05
# Load is shed harder beyond this part of the way from `shed_at` to the limit.
URGENT = 0.5
# STATUS= is for people: no need to wake systemd more often.
STATUS_S = 5.0


class LoopMeter(Protocol):
    """What is counted of the event loop."""

    def lagged(self, seconds: float) -> None:
        """A timer fired so late."""
        ...


class MemoryMeter(Protocol):
    """What is measured of memory."""

    def observed(self, used_bytes: int, limit_bytes: float, *, is_shedding: bool) -> None:
        """How much is used of how much."""
        ...


class LoopWatch:
    """Measures how late the event loop's timers fire. `worst_s` is since it was asked for last."""

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
        """The worst lag since the last call."""
        worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s


async def feed_watchdog(notifier: Notifier, canary: Canary, loop_watch: LoopWatch) -> None:
    """Tell systemd that all is well, as long as it is: canaries arrive, and the loop is on time.

    Called a third of the watchdog's time apart. A loop that was blocked as long as that is on its way to be killed.
    """
    if notifier.watchdog_s is None:
        return
    period_s = notifier.watchdog_s / 3
    was_well = True
    while True:
        is_well = canary.is_alive() and loop_watch.worst_s() < period_s
        if is_well:
            notifier.alive()
        elif was_well:
            log.error("no ping for the watchdog", canary_arrives=canary.is_alive(), restart_after_s=notifier.watchdog_s)
        was_well = is_well
        await asyncio.sleep(period_s)


class MemoryWatch:
    """Sheds load before the kernel ends the process. `settings` may be replaced at any time (reload)."""

    def __init__(self, settings: sections.Memory, gateway: Gateway, meter: MemoryMeter, gauge: memory.Gauge) -> None:
        self.settings = settings
        self._gateway = gateway
        self._meter = meter
        self._gauge = gauge
        self._warned = False

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Compare with the limit and act."""
        gateway, settings = self._gateway, self.settings
        found = self._gauge.read(settings.limit)
        used, limit = found.used_bytes, found.limit_bytes
        start = limit * settings.shed_at
        if used > start:
            if not gateway.is_short_of_memory:
                log.warning("memory short, load is shed", used_bytes=used, limit_bytes=limit)
            gateway.relieve(math.ceil(used - start), is_urgent=used > start + (limit - start) * URGENT)
            memory.give_back()
        elif gateway.is_short_of_memory and used < start - limit * RELIEF:
            gateway.relieved()
            log.info("memory is enough again", used_bytes=used, limit_bytes=limit)
        self._meter.observed(used, limit, is_shedding=gateway.is_short_of_memory)


def status_text(gateway: Gateway, log_: EventLog, last_whale: tuple[Alert, float] | None) -> str:
    """How the daemon is, in one line."""
    whale = "none yet"
    if last_whale is not None:
        alert, at = last_whale
        when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whale = f"{when} {alert.value_sat / SAT_PER_BTC:.2f} BTC"
    parts = [
        f"upstream {gateway.upstream.value}",
        f"{gateway.connections} clients",
        f"last whale {whale}",
        f"offset {log_.head}",
    ]
    if gateway.is_short_of_memory:
        parts.append("memory short, shedding load")
    return "; ".join(parts)


async def tell_status(notifier: Notifier, text: Callable[[], str]) -> None:
    """Keep the status line of `systemctl status` current until cancelled."""
    while True:
        notifier.status(text())
        await asyncio.sleep(STATUS_S)
