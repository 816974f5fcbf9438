"""What is counted of the backend, and of what is made of what it sends. docs/metrics.md explains each metric."""

import time
from collections.abc import Callable, Sequence

from whaled.backfill.coverage import Cover
from whaled.model import SAT_PER_BTC, Alert, Flow, Kind, Source, UpstreamState
from whaled.ops.registry import Component, Registry
from whaled.upstream.continuity import Continuity
from whaled.upstream.dialect import DialectFault
from whaled.upstream.http import RestFailure
from whaled.upstream.link_errors import LossReason
from whaled.upstream.survey import Capability
from whaled.whales.detect import BY_BTC, BY_USD
from whaled.whales.watch import WATCH

# Rules of the watch list are one sort: a label for each name would not be a closed set.
RULES = (BY_BTC, BY_USD, WATCH)
LEAD_BUCKETS = (1.0, 10.0, 60.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)
PREDICTION_BUCKETS = (-6.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 6.0, 12.0, 36.0, 144.0)


class UpstreamMeter:
    """The link to the backend, and the questions asked of its REST API."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._errors = registry.errors.labels(Component.UPSTREAM)
        self._rest_errors = registry.errors.labels(Component.REST)
        self._state = registry.gauge("upstream_state", "1 for the state the link is in.", ("state",))
        self.state(UpstreamState.DISCONNECTED)
        self._connects = registry.counter("upstream_connects", "Links the backend answered on.")
        self._losses = registry.counter(
            "upstream_reconnects", "Links lost and attempts failed, each followed by another, by reason.", "reason",
            LossReason,
        )  # fmt: skip
        self._frames = registry.counter("upstream_frames", "Messages from the backend.")
        self._bytes = registry.counter("upstream_received_bytes", "Bytes of messages from the backend.")
        self._decode = registry.histogram("upstream_decode_seconds", "Time to decode a message.")
        self._last = registry.gauge("upstream_last_message_timestamp_seconds", "When the last message came.")
        self._undecodable = registry.counter(
            "upstream_frames_undecodable", "Messages of which nothing was usable, by what was wrong.", "fault",
            DialectFault,
        )  # fmt: skip
        self._malformed = registry.counter("upstream_parts_skipped", "Parts of messages that could not be read.")
        self._incomplete = registry.counter(
            "upstream_snapshots_incomplete",
            "Times a projected block was not answered in time.",
        )
        self._unknown = registry.counter("upstream_keys_unknown", "Keys of messages that whaled does not know.")
        self._sequence = registry.counter(
            "upstream_deltas", "Mempool deltas by how their sequence number continues.", "continuity",
            [step.name.lower() for step in Continuity],
        )  # fmt: skip
        self._requests = registry.counter(
            "rest_requests", "REST requests, by outcome.", "outcome", ("answered", *RestFailure)
        )
        self._request_seconds = registry.histogram("rest_request_seconds", "Time of a REST request.")
        self._skew = registry.gauge(
            "upstream_clock_skew_seconds", "This machine's clock minus the backend's, from its last REST answer."
        )
        self._capability = registry.gauge(
            "upstream_capability", "1 for what the backend answers, 0 for what it does not.", ("capability",)
        )
        for capability in Capability:
            self._capability.labels(capability)
        self._inputs = registry.counter(
            "rest_inputs_unknown", "Transactions whose inputs could not be fetched, by reason.", "reason", RestFailure
        )

    def capability(self, capability: Capability, *, is_there: bool) -> None:
        """Whether the backend answers what this needs."""
        self._capability.labels(capability).set(is_there)

    def clock_skew(self, seconds: float) -> None:
        """How far the clock here is ahead of the backend's."""
        self._skew.set(seconds)

    def connected(self) -> None:
        """A link that the backend answered on."""
        self._connects.inc()

    def lost(self, reason: LossReason) -> None:
        """A link that ended, or an attempt that failed."""
        self._losses.labels(reason).inc()
        self._errors.inc()

    def state(self, state: UpstreamState) -> None:
        """The state from now on."""
        for known in UpstreamState:
            self._state.labels(known).set(known is state)

    def received(self, raw_bytes: int, decode_s: float) -> None:
        """A message, and how long its decoding took."""
        self._frames.inc()
        self._bytes.inc(raw_bytes)
        self._decode.observe(decode_s)
        self._last.set(self._clock())

    def undecodable(self, fault: DialectFault) -> None:
        """A message of which nothing was usable."""
        self._undecodable.labels(fault).inc()
        self._errors.inc()

    def malformed(self, parts: int) -> None:
        """Parts of a message that could not be read."""
        self._malformed.inc(parts)
        self._errors.inc()

    def snapshot_incomplete(self) -> None:
        """A projected block was not answered in time."""
        self._incomplete.inc()

    def unknown(self, keys: int) -> None:
        """Keys of a message that the dialect does not have."""
        self._unknown.inc(keys)

    def observed(self, continuity: Continuity) -> None:
        """A delta's place in the sequence."""
        self._sequence.labels(continuity.name.lower()).inc()

    def requested(self, failure: RestFailure | None, seconds: float) -> None:
        """One attempt of a REST request ended."""
        self._requests.labels(failure or "answered").inc()
        self._request_seconds.observe(seconds)
        if failure is not None and failure is not RestFailure.NOT_FOUND:
            self._rest_errors.inc()

    def inputs_unknown(self, failure: RestFailure) -> None:
        """The inputs of a whale could not be fetched."""
        self._inputs.labels(failure).inc()


class DetectionMeter:
    """What the pipeline saw and said."""

    def __init__(self, registry: Registry) -> None:
        self._transactions = registry.counter("transactions_seen", "Transactions of the backend looked at.")
        self._whales = registry.counter("whales", "Whales alerted, by flow.", "flow", Flow)
        self._by_source = registry.counter("whale_sources", "Whales alerted, by how they were found.", "source", Source)
        self._flows = registry.counter(
            "whale_flow_btc", "What flowed in the whales alerted, in BTC, by flow.", "flow",
            [flow for flow in Flow if flow is not Flow.UNKNOWN],
        )  # fmt: skip
        self._satoshi = registry.counter("whales_satoshi", "Sum of the amounts of whales alerted, in satoshi.")
        self._updates = registry.counter(
            "whale_updates", "Outcomes of whales, by kind.", "kind", [kind for kind in Kind if kind is not Kind.ALERT]
        )
        self._inputs_unknown = registry.counter(
            "whales_inputs_unknown", "Whales alerted without their inputs: the backend did not give them in time."
        )
        self._watch_inputs_unknown = registry.counter(
            "watch_inputs_unknown",
            "Transactions whose inputs a watch rule needs, and the backend did not give in time.",
        )
        self._rules = registry.counter(
            "whale_rules", "Whales alerted, by the sort of rule that matched; one can match several.", "rule", RULES
        )
        self._price = registry.gauge("price_timestamp_seconds", "The time of the price that is known; 0 if unknown.")
        self._committed = registry.histogram(
            "frame_to_commit_seconds", "From the arrival of an upstream frame to the commit of its events."
        )
        self._published = registry.histogram(
            "frame_to_sent_seconds", "From the arrival of an upstream frame to the last write to a live client."
        )
        self._off = registry.histogram(
            "prediction_error_blocks",
            "Actual minus predicted block of whales that were confirmed; positive is later.",
            PREDICTION_BUCKETS,
        )
        self._last_whale = registry.gauge("last_whale_timestamp_seconds", "When the last whale was committed.")

    def transactions(self, count: int) -> None:
        """Transactions looked at."""
        self._transactions.inc(count)

    def whale(self, alert: Alert, at: float) -> None:
        """A whale, committed."""
        self._whales.labels(alert.flow_type).inc()
        self._by_source.labels(alert.source).inc()
        self._satoshi.inc(alert.value_sat)
        for rule in {name.partition(":")[0] for name in alert.matched_rules}:
            self._rules.labels(rule).inc()
        if alert.flow_sat is not None:
            self._flows.labels(alert.flow_type).inc(alert.flow_sat / SAT_PER_BTC)
        self.last_whale(at)

    def last_whale(self, at: float) -> None:
        """When the newest whale was committed; one of an earlier run counts as no new one."""
        self._last_whale.set(at)

    def inputs_unknown(self) -> None:
        """A whale whose inputs could not be had in time."""
        self._inputs_unknown.inc()

    def watch_inputs_unknown(self, count: int) -> None:
        """Transactions that watch rules could not be tried on in full: their inputs are unknown."""
        self._watch_inputs_unknown.inc(count)

    def price(self, at: float | None) -> None:
        """The price that is known now, by its time; None if it is unknown."""
        self._price.set(at or 0)

    def updated(self, kind: Kind, blocks_off: int | None) -> None:
        """A whale's fate, committed; `blocks_off` is how far the predicted block was off."""
        self._updates.labels(kind).inc()
        if blocks_off is not None:
            self._off.observe(blocks_off)

    def latency(self, committed_s: float, published_s: float) -> None:
        """From the frame's arrival to the commit, and to the last client's socket."""
        self._committed.observe(committed_s)
        self._published.observe(published_s)


class BackfillMeter:
    """What the backend was asked for because its stream did not tell it."""

    def __init__(self, registry: Registry) -> None:
        self._failures = registry.counter(
            "backfill_failures", "Requests of the backfill that failed and will be repeated, by reason.", "reason",
            RestFailure,
        )  # fmt: skip
        self._snapshots = registry.counter("mempool_snapshots", "Times the whole mempool was asked for.")
        self._blocks = registry.counter("blocks_scanned", "Blocks looked through.")
        self._unread = registry.counter(
            "snapshot_whales_unread", "Whales of a snapshot that left, unmined, before the backend gave them."
        )
        self._skipped = registry.counter("blocks_skipped", "Blocks not looked through: beyond backfill.max_blocks.")
        self._reorgs = registry.counter("reorgs", "Reorganisations of the chain.")
        self._depth = registry.counter("reorged_blocks", "Blocks that left the chain.")
        self._covers = registry.counter(
            "block_whales", "Whales in blocks, by when they were known: before the block, late, or missed and why.",
            "cover", Cover,
        )  # fmt: skip
        self._lead = registry.histogram(
            "whale_lead_seconds", "How long before its block a whale was alerted.", LEAD_BUCKETS
        )
        self._backlog = registry.gauge("backfill_backlog", "What is still to be asked for.", ("what",))
        self._rounds = registry.counter("backfill_rounds", "Rounds of work of the backfill that are over.")
        self.backlog(blocks=0, block_whales=0, candidates=0, tail=0, fates=0)

    def failed(self, reason: RestFailure) -> None:
        """The backend could not be asked; it is asked again."""
        self._failures.labels(reason).inc()

    def snapshot(self) -> None:
        """The whole mempool was asked for."""
        self._snapshots.inc()

    def scanned(self, covers: Sequence[Cover], leads_s: Sequence[float]) -> None:
        """A block was looked through."""
        self._blocks.inc()
        for cover in covers:
            self._covers.labels(cover).inc()
        for lead_s in leads_s:
            self._lead.observe(lead_s)

    def unread(self) -> None:
        """A whale of a snapshot left before the backend gave it."""
        self._unread.inc()

    def skipped(self, blocks: int) -> None:
        """Blocks that are not going to be looked through."""
        self._skipped.inc(blocks)

    def reorganised(self, depth: int) -> None:
        """Blocks left the chain."""
        self._reorgs.inc()
        self._depth.inc(depth)

    def worked(self) -> None:
        """A round of work is over."""
        self._rounds.inc()

    def backlog(self, *, blocks: int, block_whales: int, candidates: int, tail: int, fates: int) -> None:
        """What is still to be asked for."""
        for what, count in (
            ("blocks", blocks),
            ("block_whales", block_whales),
            ("whales", candidates),
            ("transactions", tail),
            ("fates", fates),
        ):
            self._backlog.labels(what).set(count)
