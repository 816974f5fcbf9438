"""What the first start found. It is kept at once: whatever ends that start early, the next one goes on from there."""

from collections.abc import Iterable

import msgspec

from whaled.backfill.tools import Log
from whaled.model import Block

BEGAN_KEY = "began_at"
FIRST_KEY = "first_block"
BLOCKS_KEY = "told_blocks"
# As many as a backend tells at once.
BLOCKS_LIMIT = 8


class FirstRun:
    """The newest blocks there were when the backend was heard for the first time."""

    def __init__(self, event_log: Log) -> None:
        self._log = event_log
        self._blocks: list[Block] = []
        self._is_kept = False

    def observe(self, blocks: Iterable[Block]) -> None:
        """The stream said that these were the newest blocks. What it says later is not asked for."""
        if not self._blocks:
            self._blocks = sorted(blocks, key=lambda block: block.height)[-BLOCKS_LIMIT:]

    async def keep(self) -> None:
        """Store what was told, if this is the first start. Costs nothing once it is done."""
        if self._blocks and not self._is_kept:
            if await self._log.state(BLOCKS_KEY) is None and await self._log.state(FIRST_KEY) is None:
                await self._log.set_state(BLOCKS_KEY, msgspec.json.encode(self._blocks).decode())
            self._is_kept = True


async def blocks_at_start(event_log: Log) -> list[Block]:
    """The newest blocks there were at the first start, ascending; none in a log that is older than this is kept."""
    stored = await event_log.state(BLOCKS_KEY)
    return [] if stored is None else msgspec.json.decode(stored, type=list[Block])


async def began_at(event_log: Log, now: float) -> float:
    """When whaled was started first (Unix seconds), 0 if that was not noted.

    A time that is yet to come was told by a wrong clock. What is known then is that it was after the tip of that time.
    """
    began = float(await event_log.state(BEGAN_KEY) or 0)
    if began <= now:
        return began
    blocks = await blocks_at_start(event_log)
    corrected = min(began, float(blocks[-1].timestamp) if blocks else now)
    if corrected != began:
        await event_log.set_state(BEGAN_KEY, str(corrected))
    return corrected


def standing_below(blocks: Iterable[Block], height: int) -> dict[int, str]:
    """Height and hash of those that lie below a height without a hole, descending."""
    found: dict[int, str] = {}
    for block in sorted(blocks, key=lambda block: -block.height):
        if block.height == height - 1 - len(found) and block.hash:
            found[block.height] = block.hash
    return found
