"""The metrics of the gateway. docs/metrics.md explains each one."""

from whaled.errors import ClientErrorCode, TokenRefusal
from whaled.gateway.commands import MessageType
from whaled.gateway.limits import Limit, Refusal
from whaled.gateway.messages import AuthMessage, Sent
from whaled.gateway.share import Lane
from whaled.gateway.tls import TLS_REASONS
from whaled.registry import Component, Registry

CLOSE_CODES = ("1000", "1001", "1002", "1005", "1006", "1007", "1008", "1009", "1011", "1012", "1013", "other")


class GatewayMeter:
    """The metrics of connections, messages and deliveries. The gateway connects the gauges to what they measure."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.GATEWAY)
        self._opened = registry.counter("connections_opened", "WebSocket sessions opened.")
        refused = registry.counter(
            "connections_refused", "Connections that did not become a session, by reason.", "reason", Refusal
        )
        # The children are looked up once, since floods of connections are counted here.
        self._refused = {reason: refused.labels(reason) for reason in Refusal}
        self._tls_failures = registry.counter(
            "tls_failures",
            "TLS failures, by OpenSSL's reason.",
            "reason",
            (reason.lower() for reason in TLS_REASONS),
        )
        self._unaccepted = registry.counter(
            "accepts_failed", "Failed accepts because descriptors or memory were short."
        )
        shares = registry.counter(
            "client_work_seconds", "Time of the event loop spent on the work of clients, by lane.", "lane", Lane
        )
        self._worked = {lane: shares.labels(lane) for lane in Lane}
        self._closed = registry.counter("connections_closed", "Sessions ended, by close code.", "code", CLOSE_CODES)
        outcomes = ("success", *TokenRefusal, *(message.name.lower() for message in AuthMessage))
        self._authentications = registry.counter("authentications", "Authentications, by outcome.", "outcome", outcomes)
        self._families_ended = registry.counter(
            "token_families_ended", "Token families that ended because one of their tokens was refreshed twice."
        )
        self._received = registry.counter("messages_received", "Messages from clients, by type.", "type", MessageType)
        self._received_bytes = registry.counter("received_bytes", "Bytes of messages from clients.")
        self._rejected = registry.counter(
            "messages_rejected", "Client messages answered with an error, by error code.", "code", ClientErrorCode
        )
        self._limited = registry.counter(
            "messages_limited", "Client messages over a rate limit, by whose budget was used up.", "limit", Limit
        )
        self._sent = registry.counter(
            "messages_sent", "Frames written to the kernel or queued, over all clients, by type.", "type", Sent
        )
        self._sent_of = {kind: self._sent.labels(kind) for kind in Sent}
        self._sent_bytes = registry.counter("sent_bytes", "Bytes of frames written to the kernel or queued.")
        self._compressed_bytes = registry.counter(
            "compressed_bytes", "Bytes of alerts and updates sent to clients with compression."
        )
        self._saved_bytes = registry.counter("compression_saved_bytes", "Bytes saved by compression.")
        self._published = registry.counter("events_published", "Events published to the hub.")
        self._alerts = registry.counter("alerts_published", "Alerts published to the hub.")
        self._lagging = registry.counter("clients_lagged", "Times a client fell behind and was switched to replay.")
        self._replays = registry.counter(
            "replays",
            "Replays from the event log, by whether the position could be recovered.",
            "recovered",
            ("true", "false"),
        )
        self._shed = registry.counter("connections_shed", "Sessions closed to save memory.")
        self._replayed = registry.counter("messages_replayed", "Event frames sent by replays.")
        self.connections = registry.gauge("connections", "Open client connections.")
        self.unauthenticated = registry.gauge("connections_unauthenticated", "Open connections not authenticated yet.")
        self.limit = registry.gauge(
            "connections_limit", "gateway.max_connections, or what the limit of descriptors allows."
        )
        self.compressed_clients = registry.gauge("clients_compressed", "Clients that take compressed frames.")
        self.live = registry.gauge("clients_live", "Clients that get events as they are published.")
        self.replaying = registry.gauge("clients_replaying", "Clients being brought up to date from the log.")
        self.filters = registry.gauge("filters", "Distinct filters in use.")
        self.unsent = registry.gauge("unsent_bytes", "Bytes queued for clients that the kernel has not taken.")

    def refused(self, reason: Refusal) -> None:
        """Count a connection that did not become a session."""
        self._refused[reason].inc()

    def tls_failed(self, reason: str) -> None:
        """Count a failed TLS handshake."""
        self._tls_failures.labels(reason.lower()).inc()

    def accept_failed(self) -> None:
        """Count a connection that stays in the kernel because descriptors or memory are short."""
        self._unaccepted.inc()

    def worked(self, lane: Lane, seconds: float) -> None:
        """Count the time that jobs of a lane took."""
        self._worked[lane].inc(seconds)

    def opened(self) -> None:
        """Count an opened session."""
        self._opened.inc()

    def closed(self, code: int) -> None:
        """Count a session that ended with this close code."""
        text = str(code)
        self._closed.labels(text if text in CLOSE_CODES else "other").inc()

    def authenticated(self, failure: TokenRefusal | AuthMessage | None) -> None:
        """Count an authentication. `failure` is None if it succeeded."""
        if failure is None:
            outcome = "success"
        else:
            outcome = failure.value if isinstance(failure, TokenRefusal) else failure.name.lower()
        self._authentications.labels(outcome).inc()

    def received(self, kind: MessageType, size_bytes: int) -> None:
        """Count a message from a client."""
        self._received.labels(kind).inc()
        self._received_bytes.inc(size_bytes)

    def rejected(self, code: ClientErrorCode) -> None:
        """Count a message that was answered with an error."""
        self._rejected.labels(code).inc()

    def limited(self, limit: Limit) -> None:
        """Count a message that was refused because a budget was used up."""
        self._limited.labels(limit).inc()

    def failed(self) -> None:
        """Count a bug met while serving a client."""
        self._errors.inc()

    def delivered(self, alerts: int, updates: int, size_bytes: int) -> None:
        """Count event frames handed to the kernel or queued, for all members together."""
        self._sent_of[Sent.WHALE_ALERT].inc(alerts)
        self._sent_of[Sent.WHALE_UPDATE].inc(updates)
        self._sent_bytes.inc(size_bytes)

    def compressed(self, size_bytes: int, saved_bytes: int) -> None:
        """Count the delivered bytes that went to members with compression, and the bytes that compression saved."""
        self._compressed_bytes.inc(size_bytes)
        self._saved_bytes.inc(saved_bytes)

    def sent(self, kind: Sent, frames: int, size_bytes: int) -> None:
        """Count frames other than events, for all their receivers together."""
        self._sent_of[kind].inc(frames)
        self._sent_bytes.inc(size_bytes)

    def family_ended(self) -> None:
        """Count a token family that ended because one of its tokens was refreshed twice."""
        self._families_ended.inc()

    def shed(self) -> None:
        """Count a session that was closed to save memory."""
        self._shed.inc()

    def published(self, events: int, alerts: int) -> None:
        """Count published events."""
        self._published.inc(events)
        self._alerts.inc(alerts)

    def lagging(self, members: int) -> None:
        """Count members that were switched to replay."""
        self._lagging.inc(members)

    def replayed(self, frames: int, *, recovered: bool) -> None:
        """Count a replay that ended, or, if not `recovered`, a position that could not be recovered."""
        self._replays.labels("true" if recovered else "false").inc()
        self._replayed.inc(frames)
