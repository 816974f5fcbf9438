"""Asking for the whole mempool in a stream that only tells changes: the projected blocks, one after the other. Pure."""

from whaled.upstream.dialect import Snapshot, track_block_frame

# By default (MEMPOOL_BLOCKS_AMOUNT). The last one ends at 1.2 million vB, and what is cheaper is in none.
PROJECTED_BLOCKS = 8


class SnapshotRound:
    """What to send next. At most one round is under way; beginning again starts over.

    A backend answers nothing about a block that it does not project: it may be set up for fewer than eight, and its
    mempool may shrink while the questions are asked. So the round ends with the last block that there is, and a
    question that stays unanswered for `timeout_s` ends it as well.
    """

    __slots__ = ("_count", "_due", "_index", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._index: int | None = None
        self._count = PROJECTED_BLOCKS
        self._due = 0.0

    def projected(self, count: int) -> None:
        """The backend says how many blocks it projects."""
        self._count = max(1, min(count, PROJECTED_BLOCKS))

    def begin(self, now: float) -> str:
        """The first question."""
        return self._ask(0, now)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._index is None

    @property
    def due(self) -> float | None:
        """When to stop waiting for an answer, None while no round is under way."""
        return None if self._index is None else self._due

    def answered(self, snapshot: Snapshot, now: float) -> str | None:
        """The next question, None if this was no answer to the last one. The last question ends the asking."""
        if self._index is None or snapshot.index != self._index:
            return None
        if self._index >= self._count - 1 or not snapshot.transactions:
            return self.end()
        return self._ask(self._index + 1, now)

    def end(self) -> str:
        """No more is asked for."""
        self._index = None
        return track_block_frame(-1)

    def _ask(self, index: int, now: float) -> str:
        self._index = index
        self._due = now + self._timeout_s
        return track_block_frame(index)
