"""The metrics of transactions, whales and their outcomes. docs/metrics.md explains each one."""

from whaled.model import SAT_PER_BTC, Alert, Flow, Kind, Source
from whaled.registry import Registry
from whaled.whales.detect import BY_BTC, BY_USD
from whaled.whales.watch import WATCH

# All watch rules share one label value, since the names of rules are not a closed set.
RULES = (BY_BTC, BY_USD, WATCH)
PREDICTION_BUCKETS = (-6.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 6.0, 12.0, 36.0, 144.0)


class DetectionMeter:
    """The metrics of transactions, whales and their outcomes.

    `usd_rule_blind`, `book_addresses` and `book_owners` are gauges that the pipeline connects to its state.
    """

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
        self.usd_rule_blind = registry.gauge(
            "threshold_usd_blind", "1 while detection.threshold_usd matches nothing: the price is unknown."
        )
        self.book_addresses = registry.gauge("address_book_addresses", "Addresses in the address book in force.")
        self.book_owners = registry.gauge("address_book_owners", "Labels in the address book in force.")
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
