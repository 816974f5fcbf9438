"""The meter of the backfill."""

from collections.abc import Sequence
from typing import Protocol

from whaled.backfill.coverage import Cover


class BackfillMeter(Protocol):
    """The metrics of the backfill."""

    def failed(self, reason: str) -> None:
        """Count a request that failed and will be repeated. `reason` is that of a BackendError."""
        ...

    def snapshot(self) -> None:
        """Count a snapshot of the whole mempool."""
        ...

    def scanned(self, covers: Sequence[Cover], leads_s: Sequence[float]) -> None:
        """Count a scanned block: the cover of each of its whales, and the leads of those that were seen, in seconds."""
        ...

    def backlog(self, *, blocks: int, block_whales: int, candidates: int, tail: int, fates: int) -> None:
        """Set the amount of remaining work. Called whenever it changes."""
        ...

    def worked(self) -> None:
        """Count a finished round of work."""
        ...

    def unread(self) -> None:
        """Count a whale of a snapshot that left, unmined, before the backend returned it: it is not alerted."""
        ...

    def skipped(self, blocks: int) -> None:
        """Count blocks that are not scanned because they are further back than backfill.max_blocks."""
        ...

    def reorganised(self, depth: int) -> None:
        """Count a reorganisation and the `depth` blocks that left the chain."""
        ...
