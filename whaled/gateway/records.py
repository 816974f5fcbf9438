"""Counts and logs what happens to connections and sessions."""

import structlog

from whaled.errors import ClientErrorCode, TokenRefusal
from whaled.gateway.client_lines import ClientLines
from whaled.gateway.commands import MessageType
from whaled.gateway.limits import Limit, Refusal
from whaled.gateway.messages import AuthMessage, Sent
from whaled.gateway.meters import GatewayMeter
from whaled.model import Grant

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Records:
    """The reports of a connection, ignored: the connections of canaries are not those of clients."""

    def turned_away(self, reason: Refusal, network: str) -> None:
        """Record a connection that did not become a session."""

    def tls_failed(self, reason: str) -> None:
        """Record a failed TLS handshake."""

    def origin_refused(self, address: str, origin: str) -> None:
        """Record a connection attempt by a page whose origin is not allowed."""

    def proxy_failed(self, address: str, problem: str) -> None:
        """Record a header of a trusted proxy that cannot be read, or is missing."""

    def received(self, kind: MessageType, size_bytes: int) -> None:
        """Record a message of a client."""

    def answered(self, size_bytes: int) -> None:
        """Record a frame that was sent to one client alone."""

    def failed(self, address: str) -> None:
        """Record the exception being handled, a bug met while serving a client. The connection closes."""


class ClientRecords(Records):
    """The records of clients: metrics, and log lines that clients cannot multiply at will."""

    def __init__(self, meter: GatewayMeter, lines: ClientLines) -> None:
        self._meter = meter
        self._lines = lines

    def turned_away(self, reason: Refusal, network: str) -> None:
        """Record a connection that did not become a session. Health checks are counted only."""
        self._meter.refused(reason)
        if reason is not Refusal.NO_UPGRADE:
            self._lines.turned_away(reason.value, network)

    def tls_failed(self, reason: str) -> None:
        """Count a failed TLS handshake."""
        self._meter.tls_failed(reason)

    def origin_refused(self, address: str, origin: str) -> None:
        """Log a connection attempt by a page whose origin is not allowed."""
        self._lines.origin_refused(address, origin)

    def proxy_failed(self, address: str, problem: str) -> None:
        """Log a header of a trusted proxy that cannot be read, or is missing."""
        self._lines.proxy_failed(address, problem)

    def opened(self) -> None:
        """Count an opened session."""
        self._meter.opened()

    def received(self, kind: MessageType, size_bytes: int) -> None:
        """Count a message of a client."""
        self._meter.received(kind, size_bytes)

    def answered(self, size_bytes: int) -> None:
        """Count a frame that was sent to one client alone."""
        self._meter.sent(Sent.CONTROL, 1, size_bytes)

    def failed(self, address: str) -> None:
        """Log and count the exception being handled, a bug met while serving a client. The connection closes."""
        self._lines.failed(address)
        self._meter.failed()

    def credential_refused(
        self, address: str, message: AuthMessage, reason: TokenRefusal | None, client_id: str
    ) -> None:
        """Log and count a failed authentication."""
        is_limited = message is AuthMessage.RATE_LIMITED
        self._meter.authenticated(message if is_limited or reason is None else reason)
        self._lines.refused(address, str(reason or message), client_id or None)

    def admitted(self, address: str, grant: Grant | None) -> None:
        """Log and count a client that was admitted. `grant` is None if it need not authenticate."""
        if grant is not None:
            self._meter.authenticated(None)
        self._lines.connected(address, grant.client_id if grant is not None else None)

    def family_ended(self, grant: Grant) -> None:
        """Log and count the end of a token family."""
        self._meter.family_ended()
        logger.warning("token_family_ended", client_id=grant.client_id, family=grant.family)

    def limited(self, limit: Limit) -> None:
        """Count a message over a rate limit."""
        self._meter.rejected(ClientErrorCode.RATE_LIMITED)
        self._meter.limited(limit)

    def rejected(self, code: ClientErrorCode) -> None:
        """Count a message that was answered with an error."""
        self._meter.rejected(code)

    def shed(self, address: str, unsent_bytes: int) -> None:
        """Log and count a session that is closed to save memory."""
        self._meter.shed()
        self._lines.shed(address, unsent_bytes)

    def left(self, address: str, client_id: str | None, *, was_ready: bool, code: int, seconds: float) -> None:
        """Log and count the end of a session. `was_ready` is True if the client had been admitted."""
        self._meter.closed(code)
        self._lines.left(address, client_id, was_ready=was_ready, code=code, seconds=round(seconds, 1))
