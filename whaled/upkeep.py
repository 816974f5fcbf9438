"""What the daemon does about itself, beside its work: watches loop and memory, feeds the watchdog, says how it is."""

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import structlog

from whaled.canary import Canary
from whaled.config import sections
from whaled.eventlog.store import EventLog
from whaled.gateway.server import Gateway
from whaled.model import SAT_PER_BTC
from whaled.ops import memory
from whaled.ops.systemd import Notifier
from whaled.pipeline import Pipeline
from whaled.whales.owners import summary

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# How often the loop's lag and the memory are looked at. A flood takes tens of MiB in that time.
LOOK_S = 0.25
# What the C library holds free is returned this often: large frames leave holes behind. That takes 5 ms for 40 MB,
# during which no other thread can allocate, and a tenth of a millisecond for none.
GIVE_BACK_S = 60.0
# Everything is looked through for garbage this often, and before load is shed, unless that was a minute ago.
COLLECT_S = 600.0
COLLECT_AGAIN_S = 60.0
# Shedding ends when so much of what started it is used, or so many of the clients there were then are left.
RELIEF_USED = 0.98
RELIEF_CLIENTS = 0.9
# Beyond this part of the way from `shed_at` to the limit clients are closed too, down to this part of them: the others
# did not fill the memory, and closing them would not empty it.
URGENT = 0.5
SHED_DOWN_TO = 0.5
# STATUS= is for people: no need to wake systemd more often. It is said only when it changed.
STATUS_S = 1.0


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
            logger.error(
                "no ping for the watchdog", canary_arrives=canary.is_alive(), restart_after_s=notifier.watchdog_s
            )
        was_well = is_well
        await asyncio.sleep(period_s)


class MemoryWatch:
    """Sheds load before the kernel ends the process. `settings` may be replaced at any time (reload).

    What clients leave behind is free for the next ones, but not for the kernel: Python gives little of it back. So load
    is not shed for as long as memory stays high, but for as long as those are connected who filled it; and it is shed
    again when memory grows beyond what it was, not when it is as high as it was.
    """

    def __init__(self, settings: sections.Memory, gateway: Gateway, meter: MemoryMeter, gauge: memory.Gauge) -> None:
        self.settings = settings
        self._gateway = gateway
        self._meter = meter
        self._gauge = gauge
        self._clients_when_full = 0
        self._used_when_full = 0.0
        self._collected_at = time.monotonic()

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        give_back_at = loop.time() + GIVE_BACK_S
        while True:
            self.look()
            if loop.time() >= give_back_at:
                give_back_at = loop.time() + GIVE_BACK_S
                self._collect(COLLECT_S)
                await asyncio.to_thread(memory.give_back)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Compare with the limit and act."""
        gateway, found = self._gateway, self._gauge.read(self.settings.limit)
        limit = found.limit_bytes
        start = limit * self.settings.shed_at
        urgent = start + (limit - start) * URGENT
        if found.used_bytes > start and self._collect(COLLECT_AGAIN_S):
            memory.give_back()
            found = self._gauge.read(self.settings.limit)
        used = found.used_bytes
        clients = gateway.connections
        if gateway.is_short_of_memory:
            self._used_when_full = max(self._used_when_full, used)
            if used < start * RELIEF_USED or (clients < self._clients_when_full * RELIEF_CLIENTS and used < urgent):
                gateway.relieved()
                logger.info("load is shed no more", used_bytes=used, limit_bytes=limit, clients=clients)
        elif used > min(max(start, self._used_when_full / RELIEF_USED), urgent):
            logger.warning("memory short, load is shed", used_bytes=used, limit_bytes=limit, clients=clients)
            self._clients_when_full = clients
            self._used_when_full = used
            gateway.short_of_memory()
        if gateway.is_short_of_memory:
            is_urgent = used > urgent and clients > self._clients_when_full * SHED_DOWN_TO
            gateway.relieve(math.ceil(used - start), is_urgent=is_urgent)
            memory.give_back()
        self._meter.observed(used, limit, is_shedding=gateway.is_short_of_memory)

    def _collect(self, unless_since_s: float) -> bool:
        """Look through everything for garbage unless that was done within this time. Returns whether it was."""
        now = time.monotonic()
        if now - self._collected_at < unless_since_s:
            return False
        memory.collect_all()
        self._collected_at = time.monotonic()
        return True


def status_text(gateway: Gateway, event_log: EventLog, pipeline: Pipeline) -> str:
    """How the daemon is, in one line."""
    whale = "none yet" if event_log.head == 0 else "none in the log"
    if pipeline.last_whale is not None:
        alert, at = pipeline.last_whale
        when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whale = f"{when} {alert.value_sat / SAT_PER_BTC:.2f} BTC"
    parts = [
        f"upstream {gateway.upstream.value}" + (f" ({pipeline.shortfall})" if pipeline.shortfall is not None else ""),
        f"{gateway.connections} clients",
        f"last whale {whale}",
        f"offset {event_log.head}",
        f"clients connect to {', '.join(gateway.addresses)}",
    ]
    owners = pipeline.detector.book.owners
    if owners:
        parts.append(f"address book: {summary(owners)}")
    if gateway.is_short_of_memory:
        parts.append("memory short, shedding load")
    return "; ".join(parts)


async def report_status(notifier: Notifier, text: Callable[[], str]) -> None:
    """Keep the status line of `systemctl status` current until cancelled."""
    while True:
        notifier.status(text())
        await asyncio.sleep(STATUS_S)
