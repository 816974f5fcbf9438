"""The messages to clients, which docs/protocol.md specifies, as JSON. How they are framed is the transport's affair.

Pure.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

import msgspec
from msgspec import Struct

from whaled.errors import ClientErrorCode, Close
from whaled.gateway.commands import Ping
from whaled.model import Event, Grant, Position, UpstreamState

PROTOCOL_VERSION = 1
WELCOME = "Connected to whale alert broadcaster"
# The longest `message` of an error. whaled's own texts are shorter, but they may quote text that the client chose.
MAX_ERROR_CHARACTERS = 500

_encode = msgspec.json.Encoder().encode


class AuthMessage(StrEnum):
    """The messages sent when authentication fails. Existing clients compare these texts."""

    FIRST = "First message must be authentication"
    TOKEN_REQUIRED = "Token required"  # noqa: S105 - a text, not a secret
    INVALID = "Invalid or expired token"
    RATE_LIMITED = "Rate limit exceeded"
    TIMEOUT = "Authentication timeout"
    FAILED = "Authentication failed"


class Sent(StrEnum):
    """The type of a frame to clients (a metric label). `control` is every frame for one client alone."""

    WHALE_ALERT = "whale_alert"
    WHALE_UPDATE = "whale_update"
    POSITION = "position"
    STATUS = "status"
    CONTROL = "control"


def iso(at: float) -> str:
    """Return Unix seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


class _Event(Struct):
    type: Literal["whale_alert", "whale_update"]
    data: object
    timestamp: str
    position: Position


class _MatchedEvent(_Event):
    matched_addresses: tuple[str, ...]


def event(event: Event, epoch: str, matched_addresses: tuple[str, ...] = ()) -> bytes:
    """Return a whale_alert or whale_update. `matched_addresses` are the filter's addresses in the transaction."""
    position = Position(epoch, event.offset)
    kind: Literal["whale_alert", "whale_update"] = "whale_alert" if event.update is None else "whale_update"
    data = event.whale.alert if event.update is None else event.update
    if matched_addresses:
        return _encode(_MatchedEvent(kind, data, iso(event.at), position, matched_addresses))
    return _encode(_Event(kind, data, iso(event.at), position))


def _object(**fields: object) -> bytes:
    return _encode(fields)


def _expiry(grant: Grant | None) -> str | None:
    return iso(grant.expires_at) if grant is not None and grant.expires_at is not None else None


def _permissions(grant: Grant | None) -> list[str]:
    return sorted(grant.permissions) if grant is not None else []


def auth_success(grant: Grant | None) -> bytes:
    """Return the answer to an accepted `auth`. `grant` is None on a server without authentication."""
    return _object(
        type="auth_success",
        client_id=grant.client_id if grant is not None else None,
        permissions=_permissions(grant),
        expires_at=_expiry(grant),
    )


def welcome(grant: Grant | None, position: Position, now: float) -> bytes:
    """Return the `welcome` that follows authentication. Alerts are delivered from then on."""
    return _object(
        type="welcome",
        message=WELCOME,
        authenticated=grant is not None,
        client_id=grant.client_id if grant is not None else None,
        permissions=_permissions(grant),
        server_time=iso(now),
        protocol=PROTOCOL_VERSION,
        position=position,
    )


def error(code: ClientErrorCode, message: str, *, path: str | None = None, retry_after_s: float | None = None) -> bytes:
    """Return an error for a message that was refused."""
    if len(message) > MAX_ERROR_CHARACTERS:
        message = message[: MAX_ERROR_CHARACTERS - 1] + "…"
    fields: dict[str, object] = {"type": "error", "code": code, "message": message}
    if path is not None:
        fields["path"] = path
    if retry_after_s is not None:
        fields["retry_after"] = round(retry_after_s, 3)
    return _encode(fields)


def pong(ping: Ping, now: float) -> bytes:
    """Return the answer to `ping`."""
    if ping.id is None:
        return _object(type="pong", timestamp=iso(now))
    return _object(type="pong", timestamp=iso(now), id=ping.id)


class Counters(Struct, frozen=True):
    """The `data` of a `stats` answer: current connections; alerts and failed authentications since the start."""

    total_connections: int
    authenticated_connections: int
    alerts_broadcast: int
    auth_failures: int


def stats(counters: Counters) -> bytes:
    """Return the answer to `stats`."""
    return _object(type="stats", data=counters)


def subscribed(
    filters: object,
    *,
    recovered: bool | None,
    start: Position,
    position: Position,
    oldest: Position | None = None,
    fixed: object = None,
) -> bytes:
    """Return the answer to `subscribe`.

    Delivery begins after `start`. `recovered` is None if no position was requested. `fixed` is the filter of the
    client's API key, None if it has none.
    """
    fields: dict[str, object] = {"type": "subscribed", "filters": filters}
    if fixed is not None:
        fields["fixed_filters"] = fixed
    if recovered is not None:
        fields["recovered"] = recovered
    fields["from"] = start
    fields["position"] = position
    if oldest is not None:
        fields["oldest"] = oldest
    return _encode(fields)


def unsubscribed() -> bytes:
    """Return the answer to `unsubscribe`."""
    return _object(type="unsubscribed")


def token_expiring(grant: Grant) -> bytes:
    """Return the warning that the connection's credential expires soon."""
    return _object(type="token_expiring", expires_at=_expiry(grant))


def token(token: str, grant: Grant) -> bytes:
    """Return the answer to `refresh`."""
    return _object(type="token", token=token, expires_at=_expiry(grant))


def position(position: Position) -> bytes:
    """Return a `position`: the new head, after events that did not match the client's filter."""
    return _object(type="position", position=position)


def status(state: UpstreamState, since: float) -> bytes:
    """Return a `status` with the state of the link to the mempool backend."""
    return _object(type="status", upstream=state, since=iso(since))


def closing(close: Close, retry_after_s: float) -> bytes:
    """Return a `closing`: the connection closes now, and the client should reconnect after `retry_after_s`."""
    return _object(type="closing", code=close.code, retry_after=round(retry_after_s, 3))
