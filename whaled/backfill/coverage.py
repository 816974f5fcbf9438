"""Coverage of the mempool: for each whale of a block, whether it was known before the block, and if not, why. Pure."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from statistics import median

from msgspec import Struct

from whaled.model import Scan

# Outages and gaps to remember. Blocks of older ones were scanned long ago.
INTERRUPTIONS_LIMIT = 1000


class Cover(StrEnum):
    """The coverage of a whale in a block (a metric label): alerted before the block, after it, or missed and why."""

    SEEN = "seen"
    LATE = "late"
    DOWN = "missed_down"
    GAP = "missed_gap"
    NEVER_RELAYED = "missed_never_relayed"


class Sighting(Struct, frozen=True):
    """A whale of a block.

    `lead_s` is the time from its alert to the block, negative if it was alerted after the block, None if it was found
    only in the block.
    """

    lead_s: float | None


class Interruptions:
    """The outages and gaps of the stream. Times are Unix seconds."""

    def __init__(self) -> None:
        self._down: list[tuple[float, float]] = []
        self._gaps: list[float] = []
        self._down_since: float | None = None
        # Why the current mempool is not completely known.
        self._cause: Cover | None = None

    def current_cause(self) -> Cover | None:
        """Return why a relayed whale of a block that arrives now may be unknown.

        Returns None if the mempool is completely known.
        """
        return self._cause

    def caught_up(self) -> None:
        """Record that the whole mempool has been examined since the stream was interrupted."""
        if self._down_since is None:
            self._cause = None

    def lost(self, now: float) -> None:
        """Record that the stream is down from now on."""
        self._cause = Cover.DOWN
        if self._down_since is None:
            self._down_since = now

    def connected(self, now: float) -> None:
        """Record that the stream is up again."""
        if self._down_since is not None:
            self.was_down(self._down_since, now)
            self._down_since = None

    def was_down(self, start: float, end: float) -> None:
        """Record an outage between two times."""
        self._down.append((start, end))
        del self._down[:-INTERRUPTIONS_LIMIT]

    def gap(self, now: float) -> None:
        """Record that messages are missing that should have arrived before now."""
        self._cause = self._cause or Cover.GAP
        self._gaps.append(now)
        del self._gaps[:-INTERRUPTIONS_LIMIT]

    def why_missed(self, start: float, end: float) -> Cover:
        """Return why the stream missed a whale that was in the mempool, if at all, between these two times."""
        if any(down <= end and up >= start for down, up in self._down) or (
            self._down_since is not None and self._down_since <= end
        ):
            return Cover.DOWN
        return Cover.GAP if any(start <= gap <= end for gap in self._gaps) else Cover.NEVER_RELAYED


def covers(sightings: Iterable[Sighting], missed: Cover) -> list[Cover]:
    """Return the cover of each sighting; `missed` is that of sightings without a lead."""
    return [missed if seen.lead_s is None else Cover.SEEN if seen.lead_s > 0 else Cover.LATE for seen in sightings]


def scan_of(
    height: int, block_hash: str, mined_at: float, now: float, sightings: Sequence[Sighting], missed: Cover
) -> Scan:
    """Return the scan of a block to be stored: its whales counted by cover, and the median lead."""
    found = covers(sightings, missed)
    leads = [seen.lead_s for seen in sightings if seen.lead_s is not None and seen.lead_s > 0]
    return Scan(
        height=height,
        hash=block_hash,
        mined_at=mined_at,
        scanned_at=now,
        seen=found.count(Cover.SEEN),
        late=found.count(Cover.LATE),
        missed_down=found.count(Cover.DOWN),
        missed_gap=found.count(Cover.GAP),
        missed_never_relayed=found.count(Cover.NEVER_RELAYED),
        lead_s=round(median(leads), 3) if leads else None,
    )
