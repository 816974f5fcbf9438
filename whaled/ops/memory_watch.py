"""The monitor of memory, which sheds load before the kernel kills the process."""

import asyncio
import math
import sys
import time

import structlog

from whaled.config.sections import MemorySettings
from whaled.gateway.server import Gateway
from whaled.ops import memory
from whaled.registry import Registry

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The interval between two checks of memory. A flood takes tens of MiB in that time.
LOOK_S = 0.25
# The interval at which the C library returns its free memory to the kernel: large frames leave holes in the heap.
# Returning 40 MB takes 5 ms, during which no other thread can allocate; with nothing to return it takes 0.1 ms.
GIVE_BACK_S = 60.0
# The interval between two full garbage collections. One also precedes load shedding, unless the last one was less than
# COLLECT_AGAIN_S ago.
COLLECT_S = 600.0
COLLECT_AGAIN_S = 60.0
# Load shedding ends when memory use falls below this fraction of the threshold that started it, or the number of
# clients below this fraction of the number at that time.
RELIEF_USED = 0.98
RELIEF_CLIENTS = 0.9
# Above this fraction of the distance from `shed_at` to the limit, clients without unsent bytes are closed as well, down
# to this fraction of the clients at the start of shedding. The others did not fill the memory, so closing them would
# not free it.
URGENT = 0.5
SHED_DOWN_TO = 0.5


class MemoryMeter:
    """The metrics of memory."""

    def __init__(self, registry: Registry) -> None:
        self._used = registry.gauge(
            "memory_used_bytes", "Working set of the cgroup if that has a limit, else resident memory."
        )
        self._limit = registry.gauge(
            "memory_limit_bytes", "memory.limit or the limit of the cgroup, the lower one; +Inf without either."
        )
        self._anonymous = registry.gauge(
            "memory_anonymous_bytes", "Resident memory that is not pages of files: heap, arenas and stacks."
        )
        self._shedding = registry.gauge("memory_shedding", "1 while load is shed to save memory.")
        # Read at each rendering: 0.3 us with 36,000 blocks, 0.6 ms with 9 million.
        registry.gauge("memory_allocated_blocks", "Blocks that Python's allocator has in use.").set_function(
            sys.getallocatedblocks
        )

    def observed(self, found: memory.Memory, *, is_shedding: bool) -> None:
        """Set the used memory, its limit, and whether load is shed."""
        self._used.set(found.used_bytes)
        self._limit.set(found.limit_bytes)
        self._anonymous.set(found.anonymous_bytes)
        self._shedding.set(is_shedding)


class MemoryWatch:
    """A memory monitor that sheds load before the kernel kills the process.

    Memory that clients have used is free for new clients, but Python returns little of it to the kernel. Shedding
    therefore does not last until memory use falls, but ends when enough of the clients that filled the memory are gone.
    It starts again when memory use exceeds the previous maximum, not when it reaches the same value.
    """

    def __init__(self, settings: MemorySettings, gateway: Gateway, meter: MemoryMeter, gauge: memory.Gauge) -> None:
        self.settings = settings
        self._gateway = gateway
        self._meter = meter
        self._gauge = gauge
        self._clients_when_full = 0
        self._used_when_full = 0.0
        self._collected_at = time.monotonic()
        self.found = memory.Memory(0, math.inf, 0)  # by the last look

    def reconfigure(self, settings: MemorySettings) -> None:
        """Apply new settings. What was used at an earlier limit does not delay shedding at a new one."""
        if settings != self.settings:
            self._used_when_full = 0.0
        self.settings = settings

    async def run(self) -> None:
        """Check memory until cancelled."""
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
        """Compare memory use with the limit, and start, continue or end load shedding."""
        gateway, found = self._gateway, self._gauge.read(self.settings.limit)
        limit = found.limit_bytes
        start = limit * self.settings.shed_at
        urgent = start + (limit - start) * URGENT
        if found.used_bytes > start and self._collect(COLLECT_AGAIN_S):
            memory.give_back()
            found = self._gauge.read(self.settings.limit)
        self.found = found
        used = found.used_bytes
        clients = gateway.connections
        if gateway.is_short_of_memory:
            self._used_when_full = max(self._used_when_full, used)
            if used < start * RELIEF_USED or (clients < self._clients_when_full * RELIEF_CLIENTS and used < urgent):
                gateway.relieved()
                logger.info("load_shedding_ended", used_bytes=used, limit_bytes=limit, clients=clients)
        elif used > min(max(start, self._used_when_full / RELIEF_USED), urgent):
            logger.warning("load_shedding_started", used_bytes=used, limit_bytes=limit, clients=clients)
            self._clients_when_full = clients
            self._used_when_full = used
            gateway.short_of_memory()
        if gateway.is_short_of_memory:
            is_urgent = used > urgent and clients > self._clients_when_full * SHED_DOWN_TO
            gateway.relieve(math.ceil(used - start), is_urgent=is_urgent)
            memory.give_back()
        self._meter.observed(found, is_shedding=gateway.is_short_of_memory)

    def _collect(self, unless_since_s: float) -> bool:
        """Run a full garbage collection, unless the last one is less than this time ago. Return True if it ran."""
        now = time.monotonic()
        if now - self._collected_at < unless_since_s:
            return False
        memory.collect_all()
        self._collected_at = time.monotonic()
        return True
