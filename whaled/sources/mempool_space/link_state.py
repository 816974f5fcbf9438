"""The state of the link, and the interfaces to the survey of its backend and to its metrics."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from whaled.model import Block, UpstreamState
from whaled.registry import Component, Registry
from whaled.source import Continuity, Shortfall, StateChanged, degraded_by
from whaled.sources.mempool_space.dialect import DialectFault
from whaled.sources.mempool_space.link_errors import LinkLostError, LossReason
from whaled.sources.mempool_space.shapes import BackendInfo

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


class FeedMeter:
    """The metrics of the link to the backend and of its messages. `clock` returns the time in seconds."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._errors = registry.errors.labels(Component.UPSTREAM)
        self._state = registry.gauge(
            "upstream_state", "1 for the current state of the link to the backend.", ("state",)
        )
        self.state(UpstreamState.DISCONNECTED)
        self._connects = registry.counter("upstream_connects", "Links on which the backend responded.")
        self._losses = registry.counter(
            "upstream_reconnects", "Lost links and failed attempts, each followed by a new attempt, by reason.",
            "reason", LossReason,
        )  # fmt: skip
        self._frames = registry.counter("upstream_frames", "Messages from the backend.")
        self._bytes = registry.counter("upstream_received_bytes", "Bytes of messages from the backend.")
        self._decode = registry.histogram("upstream_decode_seconds", "Time to decode a message.")
        self._last = registry.gauge("upstream_last_message_timestamp_seconds", "Arrival time of the last message.")
        self._undecodable = registry.counter(
            "upstream_frames_undecodable", "Messages with no usable content, by fault.", "fault", DialectFault
        )
        self._malformed = registry.counter("upstream_parts_skipped", "Invalid parts of messages, which were skipped.")
        self._incomplete = registry.counter(
            "upstream_snapshots_incomplete", "Projected blocks that the backend did not send in time."
        )
        self._unknown = registry.counter("upstream_keys_unknown", "Keys of messages that whaled does not know.")
        self._sequence = registry.counter(
            "upstream_deltas", "Mempool deltas, by the continuity of their sequence number.", "continuity",
            [step.name.lower() for step in Continuity],
        )  # fmt: skip

    def connected(self) -> None:
        """Count a link on which the backend answered the subscription."""
        self._connects.inc()

    def lost(self, reason: LossReason) -> None:
        """Count a link that ended, or an attempt that failed."""
        self._losses.labels(reason).inc()
        self._errors.inc()

    def state(self, state: UpstreamState) -> None:
        """Set the state of the link."""
        for known in UpstreamState:
            self._state.labels(known).set(known is state)

    def received(self, raw_bytes: int, decode_s: float) -> None:
        """Count a message, its size and the duration of its decoding."""
        self._frames.inc()
        self._bytes.inc(raw_bytes)
        self._decode.observe(decode_s)
        self._last.set(self._clock())

    def undecodable(self, fault: DialectFault) -> None:
        """Count a message without any usable part."""
        self._undecodable.labels(fault).inc()
        self._errors.inc()

    def malformed(self, parts: int) -> None:
        """Count parts of a message, or transactions in it, that were skipped because they could not be read."""
        self._malformed.inc(parts)
        self._errors.inc()

    def snapshot_incomplete(self) -> None:
        """Count a projected block that the backend did not send in time."""
        self._incomplete.inc()

    def unknown(self, keys: int) -> None:
        """Count keys of a message that the dialect does not have."""
        self._unknown.inc(keys)

    def observed(self, continuity: Continuity) -> None:
        """Count a delta by the continuity of its sequence number."""
        self._sequence.labels(continuity.name.lower()).inc()


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
