"""What the feed tells: its messages, its state, and what it counts."""

from collections.abc import Sequence
from typing import Protocol

import structlog
from msgspec import Struct

from whaled.model import Block, UpstreamState
from whaled.upstream.continuity import Continuity
from whaled.upstream.dialect import BackendInfo, DialectFault, Frame
from whaled.upstream.link_errors import LinkLostError, LossReason

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Connected(Struct, frozen=True):
    """The backend answered the subscription. `attempt` counts from 1, over again after a link that was stable."""

    attempt: int


class Received(Struct, frozen=True, kw_only=True):
    """A frame, with the wall clock and the monotonic clock at its receipt. `continuity` is that of its delta."""

    frame: Frame
    received_at: float
    received_monotonic: float
    raw_bytes: int
    continuity: Continuity | None = None


class Lost(Struct, frozen=True):
    """There is no link; the next attempt comes in `next_delay_s` seconds."""

    reason: LossReason
    next_delay_s: float


class StateChanged(Struct, frozen=True):
    """The link is in another state than before. It begins as disconnected."""

    state: UpstreamState
    why: str


class SnapshotTaken(Struct, frozen=True):
    """The frames before this one held the mempool as the backend projects it into blocks; it is in sync."""


class Shortfall(Struct, frozen=True):
    """The backend cannot give something that is needed, or it can again (None). The stream itself goes on."""

    why: str | None


FeedMessage = Connected | Received | Lost | StateChanged | SnapshotTaken | Shortfall


class Surveyor(Protocol):
    """Judges a backend when a link to it comes up, and again from time to time."""

    @property
    def refusal(self) -> LinkLostError | None:
        """Why its events must not be taken (any more)."""
        ...

    @property
    def shortfall(self) -> str | None:
        """What it cannot give."""
        ...

    async def connected(self, info: BackendInfo | None, blocks: Sequence[Block]) -> None:
        """It has answered the subscription. Raises LinkLostError to refuse it."""
        ...


class FeedMeter(Protocol):
    """What the feed counts."""

    def connected(self) -> None:
        """A link that the backend answered on."""
        ...

    def lost(self, reason: LossReason) -> None:
        """A link that ended, or an attempt that failed."""
        ...

    def state(self, state: UpstreamState) -> None:
        """The state from now on."""
        ...

    def received(self, raw_bytes: int, decode_s: float) -> None:
        """A message, and how long its decoding took."""
        ...

    def undecodable(self, fault: DialectFault) -> None:
        """A message of which nothing was usable."""
        ...

    def malformed(self, parts: int) -> None:
        """Parts of a message, or transactions in it, that were passed over because they could not be read."""
        ...

    def snapshot_incomplete(self) -> None:
        """A projected block that the backend did not answer for in time."""
        ...

    def unknown(self, keys: int) -> None:
        """Keys of a message that the dialect does not have."""
        ...

    def observed(self, continuity: Continuity) -> None:
        """A delta's place in the sequence."""
        ...


def degraded_by(shortfall: str | None, state: UpstreamState) -> UpstreamState:
    """`state`, or degraded where a connected backend cannot give something that is needed."""
    return UpstreamState.DEGRADED if shortfall is not None and state is UpstreamState.CONNECTED else state


class LinkState:
    """The state that clients are told."""

    def __init__(self, meter: FeedMeter) -> None:
        self._meter = meter
        self._now = UpstreamState.DISCONNECTED
        self._shortfall: str | None = None
        meter.state(self._now)

    @property
    def shown(self) -> UpstreamState:
        """The state with what the backend lacks: a stream without the rest is degraded."""
        return degraded_by(self._shortfall, self._now)

    def lacks(self, shortfall: str | None) -> Shortfall | None:
        """The change in what the backend cannot give, or None if it is none."""
        if shortfall == self._shortfall:
            return None
        self._shortfall = shortfall
        self._meter.state(self.shown)
        return Shortfall(shortfall)

    def become(self, state: UpstreamState, why: str) -> StateChanged | None:
        """The change, or None if it is none."""
        before, self._now = self._now, state
        if before is state:
            return None
        self._meter.state(self.shown)
        if state is UpstreamState.DEGRADED:
            logger.warning("mempool backend degraded", why=why)
        elif before is UpstreamState.DEGRADED and state is UpstreamState.CONNECTED:
            logger.info("mempool backend recovered", why=why)
        return StateChanged(state, why)
