"""Continuity checks of the stream by the sequence numbers of its deltas. Pure."""

from whaled.source import Continuity


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
