"""The state of the link, and the interfaces to the survey of its backend and to its metrics."""

from collections.abc import Sequence
from typing import Protocol

import structlog

from whaled.model import Block, UpstreamState
from whaled.source import Continuity, Shortfall, StateChanged, degraded_by
from whaled.sources.mempool_space.dialect import BackendInfo, DialectFault
from whaled.sources.mempool_space.link_errors import LinkLostError, LossReason

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Surveyor(Protocol):
    """Examines a backend when a link to it comes up, and repeatedly afterwards."""

    @property
    def refusal(self) -> LinkLostError | None:
        """The reason to refuse the backend; None if it is accepted."""
        ...

    @property
    def shortfall(self) -> str | None:
        """The capabilities that the backend lacks, as text; None if it lacks none."""
        ...

    async def connected(self, info: BackendInfo | None, blocks: Sequence[Block]) -> None:
        """Examine a backend that has answered the subscription. Raises LinkLostError to refuse it."""
        ...


class FeedMeter(Protocol):
    """The metrics of the feed."""

    def connected(self) -> None:
        """Count a link on which the backend answered the subscription."""
        ...

    def lost(self, reason: LossReason) -> None:
        """Count a link that ended, or an attempt that failed."""
        ...

    def state(self, state: UpstreamState) -> None:
        """Record the state of the link from now on."""
        ...

    def received(self, raw_bytes: int, decode_s: float) -> None:
        """Count a message, its size and the duration of its decoding."""
        ...

    def undecodable(self, fault: DialectFault) -> None:
        """Count a message without any usable part."""
        ...

    def malformed(self, parts: int) -> None:
        """Count parts of a message, or transactions in it, that were skipped because they could not be read."""
        ...

    def snapshot_incomplete(self) -> None:
        """Count a projected block that the backend did not send in time."""
        ...

    def unknown(self, keys: int) -> None:
        """Count keys of a message that the dialect does not have."""
        ...

    def observed(self, continuity: Continuity) -> None:
        """Count the continuity of a delta."""
        ...


class LinkState:
    """The state of the link that whaled reports to clients."""

    def __init__(self, meter: FeedMeter) -> None:
        self._meter = meter
        self._now = UpstreamState.DISCONNECTED
        self._shortfall: str | None = None
        meter.state(self._now)

    @property
    def shown(self) -> UpstreamState:
        """The reported state: a connected backend that lacks something needed is degraded."""
        return degraded_by(self._shortfall, self._now)

    def lacks(self, shortfall: str | None) -> Shortfall | None:
        """Record what the backend lacks. Return the change, None if there is none."""
        if shortfall == self._shortfall:
            return None
        self._shortfall = shortfall
        self._meter.state(self.shown)
        return Shortfall(shortfall)

    def become(self, state: UpstreamState, why: str) -> StateChanged | None:
        """Enter a state. Return the change, None if there is none."""
        before, self._now = self._now, state
        if before is state:
            return None
        self._meter.state(self.shown)
        if state is UpstreamState.DEGRADED:
            logger.warning("upstream_degraded", why=why)
        elif before is UpstreamState.DEGRADED and state is UpstreamState.CONNECTED:
            logger.info("upstream_recovered", why=why)
        return StateChanged(state, why)
