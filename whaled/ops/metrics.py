"""Every number whaled exports, in one registry that is passed in. docs/metrics.md explains each of them.

The classes here are the "meters" that lower rooms ask for as small protocols. Labels come from closed sets only, and
every child exists at 0 from the start, so that rate() sees the first event.
"""

import platform
import time
from collections.abc import Callable, Iterable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from whaled import __version__
from whaled.errors import ClientErrorCode, LogFailure, TokenRefusal
from whaled.gateway.limits import Refusal
from whaled.gateway.wire import AuthMessage
from whaled.model import Alert, Flow, Kind, Source, UpstreamState
from whaled.upstream.continuity import Continuity
from whaled.upstream.dialect import DialectFault
from whaled.upstream.http import RestFailure
from whaled.upstream.losses import LossReason

CLOSE_CODES = ("1000", "1001", "1002", "1005", "1006", "1007", "1008", "1009", "1011", "1012", "1013", "other")
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Component(StrEnum):
    """Where an error happened."""

    UPSTREAM = "upstream"
    REST = "rest"
    DETECT = "detect"
    EVENTLOG = "eventlog"
    GATEWAY = "gateway"
    CONFIG = "config"


class _ProcessCollector(ProcessCollector):
    """The stock collector reads /proc/stat for the boot time and exports nothing where ProcSubset=pid hides it."""

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Metrics:
    """The registry and what feeds it."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's own function has no annotations
        self.registry = CollectorRegistry()
        _ProcessCollector(registry=self.registry)
        info = self.gauge("build_info", "Always 1; the labels say what runs.", ("version", "python"))
        info.labels(version=__version__, python=platform.python_version()).set(1)
        self.errors = self.counter("errors", "Errors by the component that met them.", "component", Component)
        self.upstream = UpstreamMeter(self)
        self.detection = DetectionMeter(self)
        self.eventlog = EventLogMeter(self)
        self.gateway = GatewayMeter(self)
        self.config = ConfigMeter(self)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    # --- how a metric is made: prefix, registry, all children at 0 ---

    def counter(self, name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
        counter = Counter(f"whaled_{name}", text, [label] if label else [], registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"whaled_{name}", text, labels, registry=self.registry)

    def gauge_of(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self.gauge(name, text).set_function(value)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        return Histogram(f"whaled_{name}", text, registry=self.registry, buckets=buckets)


class UpstreamMeter:
    """The link to the backend, and the questions asked of its REST API."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._errors = metrics.errors.labels(Component.UPSTREAM)
        self._rest_errors = metrics.errors.labels(Component.REST)
        self._state = metrics.gauge("upstream_state", "1 for the state the link is in.", ("state",))
        self.state(UpstreamState.DISCONNECTED)
        self._connects = metrics.counter("upstream_connects", "Links the backend answered on.")
        self._losses = metrics.counter(
            "upstream_reconnects", "Links lost and attempts failed, each followed by another, by reason.", "reason",
            LossReason,
        )  # fmt: skip
        self._frames = metrics.counter("upstream_frames", "Messages from the backend.")
        self._bytes = metrics.counter("upstream_received_bytes", "Bytes of messages from the backend.")
        self._decode = metrics.histogram("upstream_decode_seconds", "Time to decode a message.")
        self._last = metrics.gauge("upstream_last_message_timestamp_seconds", "When the last message came.")
        self._undecodable = metrics.counter(
            "upstream_frames_undecodable", "Messages of which nothing was usable, by what was wrong.", "fault",
            DialectFault,
        )  # fmt: skip
        self._malformed = metrics.counter("upstream_parts_skipped", "Parts of messages that could not be read.")
        self._unknown = metrics.counter("upstream_keys_unknown", "Keys of messages that whaled does not know.")
        self._sequence = metrics.counter(
            "upstream_deltas", "Mempool deltas by how their sequence number continues.", "continuity",
            [step.name.lower() for step in Continuity],
        )  # fmt: skip
        self._requests = metrics.counter(
            "rest_requests", "REST requests, by outcome.", "outcome", ("answered", *RestFailure)
        )
        self._request_seconds = metrics.histogram("rest_request_seconds", "Time of a REST request.")
        self._skew = metrics.gauge(
            "upstream_clock_skew_seconds", "This machine's clock minus the backend's, from its last REST answer."
        )
        self._inputs = metrics.counter(
            "rest_inputs_unknown", "Whales whose inputs could not be fetched, by reason.", "reason", RestFailure
        )

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


class EventLogMeter:
    """The event log: commits, failures, size."""

    def __init__(self, metrics: Metrics) -> None:
        self._errors = metrics.errors.labels(Component.EVENTLOG)
        self._events = metrics.counter("eventlog_events", "Events committed.")
        self._commit = metrics.histogram("eventlog_commit_seconds", "Time of a commit with new events, fsync included.")
        self._failures = metrics.counter("eventlog_failures", "Failed operations by reason.", "reason", LogFailure)
        self._pruned = metrics.counter("eventlog_pruned_events", "Events removed by retention.")
        self._size = metrics.gauge("eventlog_size_bytes", "Database and write-ahead log on disk.")

    def committed(self, events: int, seconds: float) -> None:
        """A transaction with new events was stored."""
        self._events.inc(events)
        self._commit.observe(seconds)

    def failed(self, reason: LogFailure) -> None:
        """An operation failed."""
        self._failures.labels(reason).inc()
        self._errors.inc()

    def pruned(self, events: int) -> None:
        """Retention removed events."""
        self._pruned.inc(events)

    def size(self, size_bytes: int) -> None:
        """What database and write-ahead log take on disk."""
        self._size.set(size_bytes)


class DetectionMeter:
    """What the pipeline saw and said."""

    def __init__(self, metrics: Metrics) -> None:
        self._transactions = metrics.counter("transactions_seen", "Transactions of the backend looked at.")
        self._whales = metrics.counter("whales", "Whales alerted, by flow.", "flow", Flow)
        self._by_source = metrics.counter("whale_sources", "Whales alerted, by how they were found.", "source", Source)
        self._satoshi = metrics.counter("whales_satoshi", "Sum of the amounts of whales alerted, in satoshi.")
        self._updates = metrics.counter(
            "whale_updates", "Fates of whales, by kind.", "kind", [kind for kind in Kind if kind is not Kind.ALERT]
        )
        self._inputs_unknown = metrics.counter(
            "whales_inputs_unknown", "Whales alerted without their inputs: the backend did not give them in time."
        )
        self._committed = metrics.histogram(
            "frame_to_commit_seconds", "From the arrival of an upstream frame to the commit of its events."
        )
        self._published = metrics.histogram(
            "frame_to_sent_seconds", "From the arrival of an upstream frame to the last write to a live client."
        )
        self._last_whale = metrics.gauge("last_whale_timestamp_seconds", "When the last whale was committed.")

    def transactions(self, count: int) -> None:
        """Transactions looked at."""
        self._transactions.inc(count)

    def whale(self, alert: Alert, at: float) -> None:
        """A whale, committed."""
        self._whales.labels(alert.flow_type).inc()
        self._by_source.labels(alert.source).inc()
        self._satoshi.inc(alert.value_sat)
        self._last_whale.set(at)

    def inputs_unknown(self) -> None:
        """A whale whose inputs could not be had in time."""
        self._inputs_unknown.inc()

    def updated(self, kind: Kind) -> None:
        """A whale's fate, committed."""
        self._updates.labels(kind).inc()

    def latency(self, committed_s: float, published_s: float) -> None:
        """From the frame's arrival to the commit, and to the last client's socket."""
        self._committed.observe(committed_s)
        self._published.observe(published_s)


class ConfigMeter:
    """Reloads."""

    def __init__(self, metrics: Metrics) -> None:
        self._errors = metrics.errors.labels(Component.CONFIG)
        self._successful = metrics.gauge("config_last_reload_successful", "1 if the last reload was applied.")
        self._successful.set(1)
        self._at = metrics.gauge("config_last_reload_success_timestamp_seconds", "When a configuration was applied.")

    def reloaded(self, now: float, *, success: bool) -> None:
        """A reload was applied or refused."""
        self._successful.set(success)
        if success:
            self._at.set(now)
        else:
            self._errors.inc()


class GatewayMeter:
    """Clients: connections, messages, deliveries."""

    def __init__(self, metrics: Metrics) -> None:
        self._errors = metrics.errors.labels(Component.GATEWAY)
        self._opened = metrics.counter("connections_opened", "WebSocket sessions opened.")
        self._refused = metrics.counter(
            "connections_refused", "Connections that did not become a session, by reason.", "reason", Refusal
        )
        self._closed = metrics.counter("connections_closed", "Sessions ended, by close code.", "code", CLOSE_CODES)
        outcomes = ("success", *TokenRefusal, *(message.name.lower() for message in AuthMessage))
        self._authentications = metrics.counter("authentications", "Authentications by outcome.", "outcome", outcomes)
        self._received = metrics.counter("messages_received", "Messages from clients.")
        self._received_bytes = metrics.counter("received_bytes", "Bytes of messages from clients.")
        self._rejected = metrics.counter(
            "messages_rejected", "Client messages answered with an error, by its code.", "code", ClientErrorCode
        )
        self._sent = metrics.counter("messages_sent", "Event frames handed to the kernel, for all clients.")
        self._sent_bytes = metrics.counter("sent_bytes", "Bytes of event frames handed to the kernel.")
        self._published = metrics.counter("events_published", "Events published to the hub.")
        self._alerts = metrics.counter("alerts_published", "Alerts published to the hub.")
        self._lagging = metrics.counter("clients_lagged", "Times a client fell behind and was switched to replay.")
        self._replays = metrics.counter(
            "replays",
            "Replays from the log, by whether the position could be honoured.",
            "recovered",
            ("true", "false"),
        )
        self._replayed = metrics.counter("messages_replayed", "Event frames sent from the log.")

    def refused(self, reason: Refusal) -> None:
        """A connection that did not become a session."""
        self._refused.labels(reason).inc()

    def opened(self) -> None:
        """A session."""
        self._opened.inc()

    def closed(self, code: int) -> None:
        """A session ended with this close code."""
        text = str(code)
        self._closed.labels(text if text in CLOSE_CODES else "other").inc()

    def authenticated(self, failure: TokenRefusal | AuthMessage | None) -> None:
        """A credential was judged; None is success."""
        if failure is None:
            outcome = "success"
        else:
            outcome = failure.value if isinstance(failure, TokenRefusal) else failure.name.lower()
        self._authentications.labels(outcome).inc()

    def received(self, size_bytes: int) -> None:
        """A message from a client."""
        self._received.inc()
        self._received_bytes.inc(size_bytes)

    def rejected(self, code: ClientErrorCode) -> None:
        """A message that was answered with an error."""
        self._rejected.labels(code).inc()

    def failed(self) -> None:
        """A bug met while serving a client."""
        self._errors.inc()

    def delivered(self, frames: int, size_bytes: int) -> None:
        """Frames handed to the kernel or queued, for all members together."""
        self._sent.inc(frames)
        self._sent_bytes.inc(size_bytes)

    def published(self, events: int, alerts: int) -> None:
        """Events published."""
        self._published.inc(events)
        self._alerts.inc(alerts)

    def lagging(self, members: int) -> None:
        """Members that were switched to replay."""
        self._lagging.inc(members)

    def replayed(self, frames: int, *, recovered: bool) -> None:
        """A replay ended, or a position was not honoured."""
        self._replays.labels("true" if recovered else "false").inc()
        self._replayed.inc(frames)
