"""How well the mempool was watched: for each whale of a block, whether it was known before, and if not, why. Pure."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from statistics import median

from msgspec import Struct

from whaled.model import Scan

# Outages and gaps remembered; older ones concern blocks that were scanned long ago.
SPANS_LIMIT = 1000


class Cover(StrEnum):
    """When a whale of a block was known (a metric label): before the block, after it, or only from it, and why."""

    SEEN = "seen"
    LATE = "late"
    DOWN = "missed_down"
    GAP = "missed_gap"
    NEVER_RELAYED = "missed_never_relayed"


class Sighting(Struct, frozen=True):
    """A whale of a block. `lead_s` is how long before the block it was alerted, negative if after; None: not at all."""

    lead_s: float | None


class Spans:
    """When the backend could not be heard. Times are Unix seconds."""

    def __init__(self) -> None:
        self._down: list[tuple[float, float]] = []
        self._gaps: list[float] = []
        self._since: float | None = None
        # Why the mempool of now is not known whole.
        self._excuse: Cover | None = None

    def excuse(self) -> Cover | None:
        """Why a whale of a block that comes now may be unknown although it was relayed; None if it cannot be."""
        return self._excuse

    def caught_up(self) -> None:
        """Everything in the mempool has been looked at since the stream was heard again."""
        if self._since is None:
            self._excuse = None

    def lost(self, now: float) -> None:
        """Nothing is heard from now on."""
        self._excuse = Cover.DOWN
        if self._since is None:
            self._since = now

    def connected(self, now: float) -> None:
        """SeenBlock again."""
        if self._since is not None:
            self.was_down(self._since, now)
            self._since = None

    def was_down(self, start: float, end: float) -> None:
        """Nothing was heard between the two."""
        self._down.append((start, end))
        del self._down[:-SPANS_LIMIT]

    def gap(self, now: float) -> None:
        """Messages are missing that should have come before now."""
        self._excuse = self._excuse or Cover.GAP
        self._gaps.append(now)
        del self._gaps[:-SPANS_LIMIT]

    def why_missed(self, start: float, end: float) -> Cover:
        """Why a whale that was in the mempool at some time between the two, if at all, was not alerted there."""
        if any(down <= end and up >= start for down, up in self._down) or (
            self._since is not None and self._since <= end
        ):
            return Cover.DOWN
        return Cover.GAP if any(start <= gap <= end for gap in self._gaps) else Cover.NEVER_RELAYED


def covers(sightings: Iterable[Sighting], missed: Cover) -> list[Cover]:
    """What each sighting is. Those without a lead were missed for that reason."""
    return [missed if seen.lead_s is None else Cover.SEEN if seen.lead_s > 0 else Cover.LATE for seen in sightings]


def scan_of(
    height: int, block_hash: str, mined_at: float, now: float, sightings: Sequence[Sighting], missed: Cover
) -> Scan:
    """The row of a block."""
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
