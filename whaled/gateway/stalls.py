"""Notices when this process stood still, so that clients are not charged at once for what they sent meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from whaled.gateway.limits import LostTime

LOOK_S = 0.25
# Shorter delays are every day's, and the burst of each limit makes up for them.
STALL_S = 0.25


@asynccontextmanager
async def watched(lost: LostTime, clock: Callable[[], float]) -> AsyncIterator[None]:
    """Add to `lost` while the body runs. `clock` is that of the limits.

    A timer, not a task: a loop that was stopped runs its timers before the slices in which clients are read.
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
