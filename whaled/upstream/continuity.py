"""Whether the stream hangs together: sequence numbers of deltas, parents of blocks. Pure."""

from collections.abc import Iterable
from enum import Enum, auto

from whaled.model import Block

# Blocks remembered to recognise one that comes again: the backend repeats 8 after a restart (api/blocks.ts), a day
# is far beyond any reorganisation it follows.
BLOCKS_REMEMBERED = 144


class Continuity(Enum):
    """What a delta's sequence number says about the one before. Only GAP and RESTARTED mean that something is missing
    for certain; contiguous is not complete.
    """

    FIRST = auto()
    IN_ORDER = auto()
    NOT_IN_SYNC = auto()
    GAP = auto()
    RESTARTED = auto()


class SequenceTracker:
    """Follows the sequence numbers of deltas, over reconnects (websocket-handler.ts: `mempoolSequence`).

    The number is no id: it is 0 until the backend is in sync, stands still whenever it falls out of sync, and starts
    over with the process.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: int | None = None

    def observe(self, sequence: int) -> Continuity:
        """Take note of a delta."""
        last, self.last = self.last, sequence
        if last is None:
            return Continuity.FIRST if sequence > 0 else Continuity.NOT_IN_SYNC
        if sequence < last:
            return Continuity.RESTARTED
        if sequence == last:
            return Continuity.NOT_IN_SYNC
        return Continuity.IN_ORDER if sequence == last + 1 else Continuity.GAP


class ChainStep(Enum):
    """How a block relates to what was known of the chain. JUMP and REORG: ask before believing anything."""

    FIRST = auto()
    EXTENDS = auto()
    JUMP = auto()
    REORG = auto()
    REPEAT = auto()


class ChainTracker:
    """Follows the tip by the blocks' own links: the backend tells neither a reorganisation (without a database) nor
    that it skipped blocks.
    """

    __slots__ = ("_hashes", "tip")

    def __init__(self) -> None:
        self.tip: Block | None = None
        self._hashes: dict[int, str] = {}

    def observe(self, block: Block) -> ChainStep:
        """Take note of a block.

        REPEAT leaves the tip: the block is known, or lies below all that is remembered (the backend sends its last
        8 blocks again after a restart). REORG: it replaces a known block, or its parent is not the known one.
        """
        tip = self.tip
        if tip is None:
            self._extend(block)
            return ChainStep.FIRST
        if self._hashes.get(block.height) == block.hash or block.height < min(self._hashes):
            return ChainStep.REPEAT
        if block.height > tip.height + 1:
            # Nothing is known of the blocks between: those before may be on another branch.
            self._forget_from(0)
            self._extend(block)
            return ChainStep.JUMP
        extends = block.height == tip.height + 1 and block.previous_hash == tip.hash
        self._forget_from(block.height if self._hashes.get(block.height - 1) == block.previous_hash else 0)
        self._extend(block)
        return ChainStep.EXTENDS if extends else ChainStep.REORG

    def observe_all(self, blocks: Iterable[Block]) -> list[ChainStep]:
        """Take note of several, as an init object brings them: ascending."""
        return [self.observe(block) for block in blocks]

    def _forget_from(self, height: int) -> None:
        self._hashes = {known: block_hash for known, block_hash in self._hashes.items() if known < height}

    def _extend(self, block: Block) -> None:
        self.tip = block
        self._hashes[block.height] = block.hash
        self._hashes.pop(block.height - BLOCKS_REMEMBERED, None)
