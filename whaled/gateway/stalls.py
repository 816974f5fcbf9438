"""Detects stalls of this process, so that clients are not charged all at once for what they sent in the meantime."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from whaled.gateway.limits import LostTime

LOOK_S = 0.25
# Shorter delays are common, and the burst of each limit covers them.
STALL_S = 0.25


@asynccontextmanager
async def watched(lost: LostTime, clock: Callable[[], float]) -> AsyncIterator[None]:
    """Add stalls to `lost` while the body runs. `clock` is the clock of the limits.

    This is a timer rather than a task, since after a stall the loop runs its timers before the slices that read from
    clients.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look(due: float) -> None:
        nonlocal timer
        now = loop.time()
        if now - due >= STALL_S:
            lost.add(now - due, clock())
        timer = loop.call_at(now + LOOK_S, look, now + LOOK_S)

    look(loop.time())
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
