"""The metrics of the backfill. docs/metrics.md explains each one."""

from collections.abc import Iterable, Sequence

from whaled.backfill.coverage import Cover
from whaled.registry import Registry

LEAD_BUCKETS = (1.0, 10.0, 60.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)


class BackfillMeter:
    """The metrics of the backfill. `reasons` are all reasons for which a request to the backend can fail."""

    def __init__(self, registry: Registry, reasons: Iterable[str]) -> None:
        self._failures = registry.counter(
            "backfill_failures", "Failed requests of the backfill, which are repeated, by reason.", "reason",
            reasons,
        )  # fmt: skip
        self._snapshots = registry.counter("mempool_snapshots", "Snapshots of the whole mempool requested.")
        self._blocks = registry.counter("blocks_scanned", "Blocks scanned.")
        self._unread = registry.counter(
            "snapshot_whales_unread", "Whales of a snapshot that left the mempool unmined before they were fetched."
        )
        self._skipped = registry.counter(
            "blocks_skipped", "Blocks skipped because they are beyond backfill.max_blocks."
        )
        self._reorgs = registry.counter("reorgs", "Reorganisations of the chain.")
        self._depth = registry.counter("reorged_blocks", "Blocks that left the chain.")
        self._covers = registry.counter(
            "block_whales", "Whales in scanned blocks: alerted before the block, late, or missed and why.",
            "cover", Cover,
        )  # fmt: skip
        self._lead = registry.histogram(
            "whale_lead_seconds", "Time from the alert of a whale to its block.", LEAD_BUCKETS
        )
        self._backlog = registry.gauge("backfill_backlog", "Items still to be requested, by kind.", ("what",))
        self._rounds = registry.counter("backfill_rounds", "Completed rounds of the backfill.")
        self.backlog(blocks=0, block_whales=0, candidates=0, tail=0, fates=0)

    def failed(self, reason: str) -> None:
        """Count a failed request, which is repeated."""
        self._failures.labels(reason).inc()

    def snapshot(self) -> None:
        """Count a requested snapshot of the mempool."""
        self._snapshots.inc()

    def scanned(self, covers: Sequence[Cover], leads_s: Sequence[float]) -> None:
        """Count a scanned block, its whales by cover, and the lead times of those alerted before it."""
        self._blocks.inc()
        for cover in covers:
            self._covers.labels(cover).inc()
        for lead_s in leads_s:
            self._lead.observe(lead_s)

    def unread(self) -> None:
        """Count a whale of a snapshot that left the mempool before it was fetched."""
        self._unread.inc()

    def skipped(self, blocks: int) -> None:
        """Count blocks that are not scanned."""
        self._skipped.inc(blocks)

    def reorganised(self, depth: int) -> None:
        """Count a reorganisation, and the blocks that left the chain."""
        self._reorgs.inc()
        self._depth.inc(depth)

    def worked(self) -> None:
        """Count a completed round."""
        self._rounds.inc()

    def backlog(self, *, blocks: int, block_whales: int, candidates: int, tail: int, fates: int) -> None:
        """Set the numbers of items still to be requested."""
        for what, count in (
            ("blocks", blocks),
            ("block_whales", block_whales),
            ("whales", candidates),
            ("transactions", tail),
            ("fates", fates),
        ):
            self._backlog.labels(what).set(count)
