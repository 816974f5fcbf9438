"""Asking for the whole mempool in a stream that only tells changes: the projected blocks, one after the other. Pure."""

from whaled.upstream.dialect import Snapshot, track_block_frame

# The backend projects eight; the last one ends at 1.2 million vB, and what is cheaper is in none.
PROJECTED_BLOCKS = 8


class SnapshotRound:
    """What to send next. At most one round is under way; beginning again starts over."""

    __slots__ = ("_index",)

    def __init__(self) -> None:
        self._index: int | None = None

    def begin(self) -> str:
        """The first question."""
        self._index = 0
        return track_block_frame(0)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._index is None

    def answered(self, snapshot: Snapshot) -> str | None:
        """The next question, None if this was no answer to the last one. The last question ends the asking."""
        if snapshot.index != self._index:
            return None
        if self._index == PROJECTED_BLOCKS - 1 or not snapshot.transactions:
            self._index = None
            return track_block_frame(-1)
        self._index += 1
        return track_block_frame(self._index)
