"""The metrics of the backend, detection and backfill. docs/metrics.md explains each one."""

import time
from collections.abc import Callable, Sequence

from whaled.backfill.coverage import Cover
from whaled.model import SAT_PER_BTC, Alert, Flow, Kind, Source, UpstreamState
from whaled.registry import Component, Registry
from whaled.source import Continuity
from whaled.sources.mempool_space.dialect import DialectFault
from whaled.sources.mempool_space.http import RestFailure
from whaled.sources.mempool_space.link_errors import LossReason
from whaled.sources.mempool_space.survey import Capability
from whaled.whales.detect import BY_BTC, BY_USD
from whaled.whales.watch import WATCH

# All watch rules share one label value, since the names of rules are not a closed set.
RULES = (BY_BTC, BY_USD, WATCH)
LEAD_BUCKETS = (1.0, 10.0, 60.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)
PREDICTION_BUCKETS = (-6.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 6.0, 12.0, 36.0, 144.0)


class UpstreamMeter:
    """The metrics of the link to the backend and of REST requests."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._errors = registry.errors.labels(Component.UPSTREAM)
        self._rest_errors = registry.errors.labels(Component.REST)
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
            "upstream_frames_undecodable", "Messages with no usable content, by fault.", "fault",
            DialectFault,
        )  # fmt: skip
        self._malformed = registry.counter("upstream_parts_skipped", "Invalid parts of messages, which were skipped.")
        self._incomplete = registry.counter(
            "upstream_snapshots_incomplete",
            "Projected blocks that the backend did not send in time.",
        )
        self._unknown = registry.counter("upstream_keys_unknown", "Keys of messages that whaled does not know.")
        self._sequence = registry.counter(
            "upstream_deltas", "Mempool deltas, by the continuity of their sequence number.", "continuity",
            [step.name.lower() for step in Continuity],
        )  # fmt: skip
        self._requests = registry.counter(
            "rest_requests", "REST requests, by outcome.", "outcome", ("answered", *RestFailure)
        )
        self._request_seconds = registry.histogram("rest_request_seconds", "Duration of a REST request.")
        self._skew = registry.gauge(
            "upstream_clock_skew_seconds", "This machine's clock minus the backend's, at the last REST response."
        )
        self._capability = registry.gauge(
            "upstream_capability", "1 if the backend has a capability, 0 if not.", ("capability",)
        )
        for capability in Capability:
            self._capability.labels(capability)
        self._inputs = registry.counter(
            "rest_inputs_unknown", "Transactions whose inputs could not be fetched, by reason.", "reason", RestFailure
        )

    def capability(self, capability: Capability, *, is_there: bool) -> None:
        """Set whether the backend has a capability."""
        self._capability.labels(capability).set(is_there)

    def clock_skew(self, seconds: float) -> None:
        """Set how far the local clock is ahead of the backend's."""
        self._skew.set(seconds)

    def connected(self) -> None:
        """Count a link on which the backend responded."""
        self._connects.inc()

    def lost(self, reason: LossReason) -> None:
        """Count a lost link or a failed attempt."""
        self._losses.labels(reason).inc()
        self._errors.inc()

    def state(self, state: UpstreamState) -> None:
        """Set the state of the link."""
        for known in UpstreamState:
            self._state.labels(known).set(known is state)

    def received(self, raw_bytes: int, decode_s: float) -> None:
        """Count a message and the time of its decoding."""
        self._frames.inc()
        self._bytes.inc(raw_bytes)
        self._decode.observe(decode_s)
        self._last.set(self._clock())

    def undecodable(self, fault: DialectFault) -> None:
        """Count a message without any usable part."""
        self._undecodable.labels(fault).inc()
        self._errors.inc()

    def malformed(self, parts: int) -> None:
        """Count invalid parts of a message."""
        self._malformed.inc(parts)
        self._errors.inc()

    def snapshot_incomplete(self) -> None:
        """Count a projected block that the backend did not send in time."""
        self._incomplete.inc()

    def unknown(self, keys: int) -> None:
        """Count keys of a message that whaled does not know."""
        self._unknown.inc(keys)

    def observed(self, continuity: Continuity) -> None:
        """Count a delta by the continuity of its sequence number."""
        self._sequence.labels(continuity.name.lower()).inc()

    def requested(self, failure: RestFailure | None, seconds: float) -> None:
        """Count one attempt of a REST request. `failure` is None if it was answered."""
        self._requests.labels(failure or "answered").inc()
        self._request_seconds.observe(seconds)
        if failure is not None and failure is not RestFailure.NOT_FOUND:
            self._rest_errors.inc()

    def inputs_unknown(self, failure: RestFailure) -> None:
        """Count a whale whose inputs could not be fetched."""
        self._inputs.labels(failure).inc()


class DetectionMeter:
    """The metrics of transactions, whales and their outcomes."""

    def __init__(self, registry: Registry) -> None:
        self._transactions = registry.counter("transactions_seen", "Transactions examined.")
        self._whales = registry.counter("whales", "Whales alerted, by flow.", "flow", Flow)
        self._by_source = registry.counter("whale_sources", "Whales alerted, by how they were found.", "source", Source)
        self._flows = registry.counter(
            "whale_flow_btc", "Flow amount of the whales alerted, in BTC, by flow.", "flow",
            [flow for flow in Flow if flow is not Flow.UNKNOWN],
        )  # fmt: skip
        self._satoshi = registry.counter("whales_satoshi", "Sum of the amounts of the whales alerted, in satoshi.")
        self._updates = registry.counter(
            "whale_updates", "Outcomes of whales, by kind.", "kind", [kind for kind in Kind if kind is not Kind.ALERT]
        )
        self._inputs_unknown = registry.counter(
            "whales_inputs_unknown", "Whales alerted without inputs, which the backend did not provide in time."
        )
        self._watch_inputs_unknown = registry.counter(
            "watch_inputs_unknown",
            "Transactions whose inputs a watch rule needs but the backend did not provide in time.",
        )
        self._rules = registry.counter(
            "whale_rules", "Whales alerted, by the kind of matching rule; a whale can match several.", "rule", RULES
        )
        self._price = registry.gauge("price_timestamp_seconds", "Time of the current price; 0 if unknown.")
        self._committed = registry.histogram(
            "frame_to_commit_seconds", "Time from the arrival of a message of the backend to the commit of its events."
        )
        self._published = registry.histogram(
            "frame_to_sent_seconds",
            "Time from the arrival of a message of the backend to the last write to a live client.",
        )
        self._off = registry.histogram(
            "prediction_error_blocks",
            "Actual minus predicted block of confirmed whales; positive if later than predicted.",
            PREDICTION_BUCKETS,
        )
        self._last_whale = registry.gauge("last_whale_timestamp_seconds", "Commit time of the last whale.")

    def transactions(self, count: int) -> None:
        """Count examined transactions."""
        self._transactions.inc(count)

    def whale(self, alert: Alert, at: float) -> None:
        """Count a committed whale."""
        self._whales.labels(alert.flow_type).inc()
        self._by_source.labels(alert.source).inc()
        self._satoshi.inc(alert.value_sat)
        for rule in {name.partition(":")[0] for name in alert.matched_rules}:
            self._rules.labels(rule).inc()
        if alert.flow_sat is not None:
            self._flows.labels(alert.flow_type).inc(alert.flow_sat / SAT_PER_BTC)
        self.last_whale(at)

    def last_whale(self, at: float) -> None:
        """Set the commit time of the newest whale, without counting it: it may be of an earlier run."""
        self._last_whale.set(at)

    def inputs_unknown(self) -> None:
        """Count a whale whose inputs the backend did not provide in time."""
        self._inputs_unknown.inc()

    def watch_inputs_unknown(self, count: int) -> None:
        """Count transactions that watch rules could not evaluate in full, because their inputs are unknown."""
        self._watch_inputs_unknown.inc(count)

    def price(self, at: float | None) -> None:
        """Set the time of the current price; None if there is none."""
        self._price.set(at or 0)

    def updated(self, kind: Kind, blocks_off: int | None) -> None:
        """Count a committed outcome. `blocks_off` is the actual minus the predicted block."""
        self._updates.labels(kind).inc()
        if blocks_off is not None:
            self._off.observe(blocks_off)

    def latency(self, committed_s: float, published_s: float) -> None:
        """Record the times from the arrival of a message to the commit, and to the last write to a client."""
        self._committed.observe(committed_s)
        self._published.observe(published_s)


class BackfillMeter:
    """The metrics of the backfill, which requests from REST what the stream did not deliver."""

    def __init__(self, registry: Registry) -> None:
        self._failures = registry.counter(
            "backfill_failures", "Failed requests of the backfill, which are repeated, by reason.", "reason",
            RestFailure,
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
        """Count a failed request, which is repeated. `reason` is that of a BackendError."""
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
