"""What is counted of clients. docs/metrics.md explains each metric."""

from whaled.errors import ClientErrorCode, TokenRefusal
from whaled.gateway.limits import Limit, Refusal
from whaled.gateway.share import Lane
from whaled.gateway.tls import TLS_REASONS
from whaled.gateway.wire import AuthMessage, MessageType, Sent
from whaled.ops.registry import Component, Registry

CLOSE_CODES = ("1000", "1001", "1002", "1005", "1006", "1007", "1008", "1009", "1011", "1012", "1013", "other")


class GatewayMeter:
    """Clients: connections, messages, deliveries."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.GATEWAY)
        self._opened = registry.counter("connections_opened", "WebSocket sessions opened.")
        refused = registry.counter(
            "connections_refused", "Connections that did not become a session, by reason.", "reason", Refusal
        )
        # Looked up once: floods of connections are counted here.
        self._refused = {reason: refused.labels(reason) for reason in Refusal}
        self._tls_failures = registry.counter(
            "tls_failures",
            "TLS that failed, by OpenSSL's reason.",
            "reason",
            (reason.lower() for reason in TLS_REASONS),
        )
        self._unaccepted = registry.counter(
            "accepts_failed", "Times no connection could be accepted for want of descriptors or memory."
        )
        shares = registry.counter("client_work_seconds", "Time of the event loop given to clients' work.", "lane", Lane)
        self._worked = {lane: shares.labels(lane) for lane in Lane}
        self._closed = registry.counter("connections_closed", "Sessions ended, by close code.", "code", CLOSE_CODES)
        outcomes = ("success", *TokenRefusal, *(message.name.lower() for message in AuthMessage))
        self._authentications = registry.counter("authentications", "Authentications by outcome.", "outcome", outcomes)
        self._families_ended = registry.counter(
            "token_families_ended", "Families of tokens that ended because one of them was refreshed twice."
        )
        self._received = registry.counter("messages_received", "Messages from clients, by type.", "type", MessageType)
        self._received_bytes = registry.counter("received_bytes", "Bytes of messages from clients.")
        self._rejected = registry.counter(
            "messages_rejected", "Client messages answered with an error, by its code.", "code", ClientErrorCode
        )
        self._limited = registry.counter(
            "messages_limited", "Client messages that a budget had no room for, by whose it was.", "limit", Limit
        )
        self._sent = registry.counter(
            "messages_sent", "Frames handed to the kernel or queued, for all clients, by type.", "type", Sent
        )
        self._sent_of = {kind: self._sent.labels(kind) for kind in Sent}
        self._sent_bytes = registry.counter("sent_bytes", "Bytes of these frames.")
        self._compressed_bytes = registry.counter(
            "compressed_bytes", "Bytes of alerts and updates sent to clients with compression."
        )
        self._saved_bytes = registry.counter("compression_saved_bytes", "Bytes that compression saved.")
        self._published = registry.counter("events_published", "Events published to the hub.")
        self._alerts = registry.counter("alerts_published", "Alerts published to the hub.")
        self._lagging = registry.counter("clients_lagged", "Times a client fell behind and was switched to replay.")
        self._replays = registry.counter(
            "replays",
            "Replays from the log, by whether the position could be honoured.",
            "recovered",
            ("true", "false"),
        )
        self._shed = registry.counter("connections_shed", "Sessions closed to save memory.")
        self._replayed = registry.counter("messages_replayed", "Event frames sent from the log.")

    def refused(self, reason: Refusal) -> None:
        """A connection that did not become a session."""
        self._refused[reason].inc()

    def tls_failed(self, reason: str) -> None:
        """A TLS handshake failed."""
        self._tls_failures.labels(reason.lower()).inc()

    def accept_failed(self) -> None:
        """A connection could not be accepted, and waits in the kernel."""
        self._unaccepted.inc()

    def worked(self, lane: Lane, seconds: float) -> None:
        """Work of a lane took so much of a slice."""
        self._worked[lane].inc(seconds)

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

    def received(self, kind: MessageType, size_bytes: int) -> None:
        """A message from a client."""
        self._received.labels(kind).inc()
        self._received_bytes.inc(size_bytes)

    def rejected(self, code: ClientErrorCode) -> None:
        """A message that was answered with an error."""
        self._rejected.labels(code).inc()

    def limited(self, limit: Limit) -> None:
        """A message that was not taken because a budget was used up."""
        self._limited.labels(limit).inc()

    def failed(self) -> None:
        """A bug met while serving a client."""
        self._errors.inc()

    def delivered(self, alerts: int, updates: int, size_bytes: int) -> None:
        """Event frames handed to the kernel or queued, for all members together."""
        self._sent_of[Sent.WHALE_ALERT].inc(alerts)
        self._sent_of[Sent.WHALE_UPDATE].inc(updates)
        self._sent_bytes.inc(size_bytes)

    def compressed(self, size_bytes: int, saved_bytes: int) -> None:
        """The part of these bytes that went to members that take compressed frames, and what that saved."""
        self._compressed_bytes.inc(size_bytes)
        self._saved_bytes.inc(saved_bytes)

    def sent(self, kind: Sent, frames: int, size_bytes: int) -> None:
        """Other frames, for all who got them together."""
        self._sent_of[kind].inc(frames)
        self._sent_bytes.inc(size_bytes)

    def family_ended(self) -> None:
        """A token was refreshed twice."""
        self._families_ended.inc()

    def shed(self) -> None:
        """A session closed to save memory."""
        self._shed.inc()

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
