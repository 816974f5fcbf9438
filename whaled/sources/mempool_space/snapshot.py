"""A snapshot of the mempool over a stream that sends only changes: the projected blocks, requested in turn. Pure."""

from whaled.model import PROJECTED_BLOCKS
from whaled.sources.mempool_space.dialect import Snapshot, track_block_frame


class SnapshotRound:
    """A round of requests, one for each projected block. At most one round is active; `begin` restarts it.

    The last projected block ends at 1.2 million vB; cheaper transactions are in no block.

    A backend sends no response for a block that it does not project: it may be configured for fewer than eight, and its
    mempool may shrink during the round. So the round ends with the last projected block, or with a request that stays
    unanswered for `timeout_s`.
    """

    __slots__ = ("_count", "_due", "_index", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._index: int | None = None
        self._count = PROJECTED_BLOCKS
        self._due = 0.0

    def projected(self, count: int) -> None:
        """Record the number of blocks that the backend projects."""
        self._count = max(1, min(count, PROJECTED_BLOCKS))

    def begin(self, now: float) -> str:
        """Begin a round. Return the first request."""
        return self._request(0, now)

    @property
    def is_over(self) -> bool:
        """True if no round is active."""
        return self._index is None

    @property
    def due(self) -> float | None:
        """The time at which the pending request times out, None while no round is active."""
        return None if self._index is None else self._due

    def answered(self, snapshot: Snapshot, now: float) -> str | None:
        """Record a response. Return the next frame to send, None if this was not the response to the last request.

        After the last block that frame ends the tracking.
        """
        if self._index is None or snapshot.index != self._index:
            return None
        if self._index >= self._count - 1 or not snapshot.transactions:
            return self.end()
        return self._request(self._index + 1, now)

    def end(self) -> str:
        """End the round. Return the frame that ends the tracking."""
        self._index = None
        return track_block_frame(-1)

    def _request(self, index: int, now: float) -> str:
        self._index = index
        self._due = now + self._timeout_s
        return track_block_frame(index)
