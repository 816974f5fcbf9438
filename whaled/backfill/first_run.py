"""State of the first run: when whaled was first started, and the newest blocks at that time.

It is stored as soon as it is known, so a first run that is killed early leaves it to the next start.
"""

from collections.abc import Iterable

from whaled.bookmarks import BEGAN_AT, BLOCKS_AT_START, FIRST_BLOCK, Keeper
from whaled.model import Block

# A backend reports at most this many blocks in one message.
BLOCKS_LIMIT = 8


class FirstRun:
    """The newest blocks when the backend first reported any."""

    def __init__(self, event_log: Keeper) -> None:
        self._event_log = event_log
        self._blocks: list[Block] = []
        self._is_stored = False

    def observe(self, blocks: Iterable[Block]) -> None:
        """Take these as the newest blocks if none were reported before."""
        if not self._blocks:
            self._blocks = sorted(blocks, key=lambda block: block.height)[-BLOCKS_LIMIT:]

    async def store(self) -> None:
        """Store the reported blocks if this is the first run. Does nothing once that is done."""
        if self._blocks and not self._is_stored:
            log = self._event_log
            if await log.recall(BLOCKS_AT_START) is None and await log.recall(FIRST_BLOCK) is None:
                await log.keep(BLOCKS_AT_START, self._blocks)
            self._is_stored = True


async def blocks_at_start(event_log: Keeper) -> list[Block]:
    """Return the newest blocks at the first start, ascending.

    Returns none if the log is from a version that did not store them.
    """
    return await event_log.recall(BLOCKS_AT_START) or []


async def began_at(event_log: Keeper, now: float) -> float:
    """Return when whaled was first started (Unix seconds), 0 if that is not stored.

    A stored time in the future came from a wrong clock. It is corrected to the time of the newest block at the first
    start, which the start cannot precede.
    """
    began = await event_log.recall(BEGAN_AT) or 0.0
    if began <= now:
        return began
    blocks = await blocks_at_start(event_log)
    corrected = min(began, float(blocks[-1].timestamp) if blocks else now)
    if corrected != began:
        await event_log.keep(BEGAN_AT, corrected)
    return corrected


def chain_below(blocks: Iterable[Block], height: int) -> dict[int, str]:
    """Return height and hash of the blocks that lie directly below a height without a gap between them, descending."""
    found: dict[int, str] = {}
    for block in sorted(blocks, key=lambda block: -block.height):
        if block.height == height - 1 - len(found) and block.hash:
            found[block.height] = block.hash
    return found
