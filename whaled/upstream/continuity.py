"""Continuity checks of the stream: sequence numbers of deltas, parent hashes of blocks. Pure."""

from collections.abc import Iterable
from enum import Enum, auto

from whaled.model import Block

# Number of blocks remembered to recognise a repeated one. The backend repeats 8 after a restart (api/blocks.ts); one
# day of blocks is far more than any reorganisation that it follows.
BLOCKS_REMEMBERED = 144


class Continuity(Enum):
    """The relation of a delta's sequence number to the previous one.

    Only GAP and RESTARTED mean with certainty that something is missing; contiguous numbers do not prove completeness.
    """

    FIRST = auto()
    IN_ORDER = auto()
    NOT_IN_SYNC = auto()
    GAP = auto()
    RESTARTED = auto()


class SequenceTracker:
    """The sequence numbers of deltas, across reconnects (websocket-handler.ts: `mempoolSequence`).

    The number is not an id: it is 0 until the backend is in sync, stops advancing whenever the backend falls out of
    sync, and restarts with the backend's process.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: int | None = None

    def observe(self, sequence: int) -> Continuity:
        """Record the sequence number of a delta and return its relation to the previous one."""
        last, self.last = self.last, sequence
        if last is None:
            return Continuity.FIRST if sequence > 0 else Continuity.NOT_IN_SYNC
        if sequence < last:
            return Continuity.RESTARTED
        if sequence == last:
            return Continuity.NOT_IN_SYNC
        return Continuity.IN_ORDER if sequence == last + 1 else Continuity.GAP


class ChainStep(Enum):
    """The relation of a block to the known chain. After JUMP and REORG, the chain must be verified by REST."""

    FIRST = auto()
    EXTENDS = auto()
    JUMP = auto()
    REORG = auto()
    REPEAT = auto()


class ChainTracker:
    """The tip, followed by the parent hashes of blocks.

    The backend reports neither reorganisations (without a database) nor that it skipped blocks.
    """

    __slots__ = ("_hashes", "tip")

    def __init__(self) -> None:
        self.tip: Block | None = None
        self._hashes: dict[int, str] = {}

    def observe(self, block: Block) -> ChainStep:
        """Record a block and return its relation to the known chain.

        REPEAT leaves the tip unchanged: the block is known, or lies below all remembered blocks (the backend sends its
        last 8 blocks again after a restart). REORG: it replaces a known block, or its parent is not the known one.
        """
        tip = self.tip
        if tip is None:
            self._extend(block)
            return ChainStep.FIRST
        if self._hashes.get(block.height) == block.hash or block.height < min(self._hashes):
            return ChainStep.REPEAT
        if block.height > tip.height + 1:
            # The blocks in between are unknown, so the remembered ones may be on another branch.
            self._forget_from(0)
            self._extend(block)
            return ChainStep.JUMP
        extends = block.height == tip.height + 1 and block.previous_hash == tip.hash
        self._forget_from(block.height if self._hashes.get(block.height - 1) == block.previous_hash else 0)
        self._extend(block)
        return ChainStep.EXTENDS if extends else ChainStep.REORG

    def observe_all(self, blocks: Iterable[Block]) -> list[ChainStep]:
        """Record several blocks in ascending order, as an init object lists them."""
        return [self.observe(block) for block in blocks]

    def _forget_from(self, height: int) -> None:
        self._hashes = {known: block_hash for known, block_hash in self._hashes.items() if known < height}

    def _extend(self, block: Block) -> None:
        self.tip = block
        self._hashes[block.height] = block.hash
        self._hashes.pop(block.height - BLOCKS_REMEMBERED, None)
