"""What the first start found. It is kept at once: whatever ends that start early, the next one goes on from there."""

from collections.abc import Iterable

import msgspec

from whaled.model import Block
from whaled.reconcile.tools import Log

BEGAN_KEY = "began_at"
FIRST_KEY = "first_block"
TOLD_KEY = "told_blocks"
# As many as a backend tells at once.
TOLD_LIMIT = 8


class Start:
    """The newest blocks there were when the backend was heard for the first time."""

    def __init__(self, log_: Log) -> None:
        self._log = log_
        self._told: list[Block] = []
        self._is_kept = False

    def told(self, blocks: Iterable[Block]) -> None:
        """The stream said that these were the newest blocks. What it says later is not asked for."""
        if not self._told:
            self._told = sorted(blocks, key=lambda block: block.height)[-TOLD_LIMIT:]

    async def keep(self) -> None:
        """Store what was told, if this is the first start. Costs nothing once it is done."""
        if self._told and not self._is_kept:
            if await self._log.state(TOLD_KEY) is None and await self._log.state(FIRST_KEY) is None:
                await self._log.set_state(TOLD_KEY, msgspec.json.encode(self._told).decode())
            self._is_kept = True


async def blocks_at_start(log_: Log) -> list[Block]:
    """The newest blocks there were at the first start, ascending; none in a log that is older than this is kept."""
    stored = await log_.state(TOLD_KEY)
    return [] if stored is None else msgspec.json.decode(stored, type=list[Block])


async def began_at(log_: Log, now: float) -> float:
    """When whaled was started first (Unix seconds), 0 if that was not noted.

    A time that is yet to come was told by a wrong clock. What is known then is that it was after the tip of that time.
    """
    began = float(await log_.state(BEGAN_KEY) or 0)
    if began <= now:
        return began
    told = await blocks_at_start(log_)
    corrected = min(began, float(told[-1].timestamp) if told else now)
    if corrected != began:
        await log_.set_state(BEGAN_KEY, str(corrected))
    return corrected


def standing_below(blocks: Iterable[Block], height: int) -> dict[int, str]:
    """Height and hash of those that lie below a height without a hole, descending."""
    found: dict[int, str] = {}
    for block in sorted(blocks, key=lambda block: -block.height):
        if block.height == height - 1 - len(found) and block.hash:
            found[block.height] = block.hash
    return found
