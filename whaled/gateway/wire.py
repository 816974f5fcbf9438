"""The messages of the client protocol, which docs/protocol.md specifies: JSON text frames in both directions.

Every `*_frame` function returns a complete WebSocket text frame, header included. Frames from a server are not masked
(RFC 6455, 5.1), so the same bytes serve every client.

Pure.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from whaled import times
from whaled.errors import ClientError, ClientErrorCode, Close
from whaled.model import Event, Grant, Position, UpstreamState

PROTOCOL_VERSION = 1
SUBPROTOCOL = "whaled.v1"
BEARER_SUBPROTOCOL_PREFIX = "bearer."
WELCOME = "Connected to whale alert broadcaster"
PING_FRAME = b"\x89\x00"
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


# --- commands ---------------------------------------------------------------------------------------------------------


class Auth(Struct, frozen=True):
    """Authenticate."""

    credential: str | None


class Ping(Struct, frozen=True):
    """Request a pong, which repeats `id`."""

    id: str | int | float | None = None


class Stats(Struct, frozen=True):
    """Request the counters."""


class Last(Struct, frozen=True, forbid_unknown_fields=True):
    """Start `last` events before the head."""

    last: Annotated[int, Meta(ge=0)]


class At(Struct, frozen=True):
    """Start at a time with a time zone."""

    time: datetime


class _At(Struct, frozen=True, forbid_unknown_fields=True):
    """The wire form of `At`."""

    time: object


Since = Position | Last | At


class Subscribe(Struct, frozen=True):
    """Replace the filter, and the position if `since` is given. `filters` is not validated yet."""

    filters: object
    since: Since | None = None


class Unsubscribe(Struct, frozen=True):
    """Stop delivery until the next subscribe."""


class Refresh(Struct, frozen=True):
    """Request a new token for the same client."""


Command = Auth | Ping | Stats | Subscribe | Unsubscribe | Refresh


class MessageType(StrEnum):
    """The type of a message from a client (a metric label)."""

    AUTH = "auth"
    PING = "ping"
    STATS = "stats"
    SUBSCRIBE = "subscribe"
    UNSUBSCRIBE = "unsubscribe"
    REFRESH = "refresh"
    INVALID = "invalid"

    @classmethod
    def of(cls, command: Command) -> "MessageType":
        """Return the type of a parsed command."""
        return cls[type(command).__name__.upper()]


class Sent(StrEnum):
    """The type of a frame to clients (a metric label). `control` is every frame for one client alone."""

    WHALE_ALERT = "whale_alert"
    WHALE_UPDATE = "whale_update"
    POSITION = "position"
    STATUS = "status"
    CONTROL = "control"


def parse(raw: bytes | bytearray) -> Command:
    """Return the command in a text message. Raises ClientError with the code of the answer."""
    try:
        message = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ClientError(ClientErrorCode.INVALID_JSON, "Invalid JSON") from None
    if not isinstance(message, dict):
        raise ClientError(ClientErrorCode.INVALID_MESSAGE, f"expected a JSON object, found {_kind(message)}")
    match message.get("type"):
        case "auth":
            return Auth(_credential(message))
        case "ping":
            return Ping(_ping_id(message))
        case "stats":
            return Stats()
        case "subscribe":
            return Subscribe(message.get("filters", {}), _since(message.get("since")))
        case "unsubscribe":
            return Unsubscribe()
        case "refresh":
            return Refresh()
        case str(unknown):
            raise ClientError(
                ClientErrorCode.UNKNOWN_TYPE,
                f"unknown type {unknown[:40]!r}; known are auth, ping, stats, subscribe, unsubscribe, refresh",
            )
        case other:
            raise ClientError(
                ClientErrorCode.INVALID_MESSAGE, f"`type` must be a string, found {_kind(other)}", path="type"
            )


def _credential(message: dict[str, Any]) -> str | None:
    for key in ("token", "api_key"):
        value = message.get(key)
        if isinstance(value, str) and value:
            return value
    return None


def _ping_id(message: dict[str, Any]) -> str | int | float | None:
    value = message.get("id")
    if value is None or (isinstance(value, str | int | float) and len(str(value)) <= 128):
        return value
    raise ClientError(
        ClientErrorCode.INVALID_MESSAGE,
        f"`id` must be a number or a string of at most 128 characters, found {_kind(value)}",
        path="id",
    )


def _since(value: object) -> Since | None:
    if value is None:
        return None
    shapes: tuple[tuple[str, type[Position | Last | _At]], ...] = (("offset", Position), ("last", Last), ("time", _At))
    try:
        if isinstance(value, dict):
            for key, shape in shapes:
                if key in value:
                    since: Position | Last | _At = msgspec.convert(value, shape)
                    return At(_time(since.time)) if isinstance(since, _At) else since
        problem = f"found {_kind(value)}"
    except (msgspec.ValidationError, ValueError) as error:
        problem = str(error)
    raise ClientError(
        ClientErrorCode.INVALID_POSITION,
        '`since` must be {"epoch":..,"offset":n}, {"last":n} or {"time":"ISO 8601"}: ' + problem,
        path="since",
    )


def _time(value: object) -> datetime:
    """Return the time of `since`. Raises ValueError."""
    if isinstance(value, str):
        return times.parse(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(times.problem_of_number(value))  # noqa: TRY004 - the value of a message, not a type of ours
    raise ValueError(f"`time` must be a string, found {_kind(value)}")


_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


# --- frames -----------------------------------------------------------------------------------------------------------


def text_frame(payload: bytes, *, is_compressed: bool = False) -> bytes:
    """Return a final, unmasked text frame with this payload (RFC 6455, 5.2)."""
    first = 0xC1 if is_compressed else 0x81
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2) + payload
    return bytes((first, 127)) + size.to_bytes(8) + payload


def payload_of(frame: bytes) -> memoryview:
    """Return the payload of a frame made by `text_frame`."""
    return memoryview(frame)[{126: 4, 127: 10}.get(frame[1], 2) :]


def iso(at: float) -> str:
    """Return Unix seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


class _EventFrame(Struct):
    type: Literal["whale_alert", "whale_update"]
    data: object
    timestamp: str
    position: Position


class _MatchedEventFrame(_EventFrame):
    matched_addresses: tuple[str, ...]


def event_frame(event: Event, epoch: str, matched_addresses: tuple[str, ...] = ()) -> bytes:
    """Return a whale_alert or whale_update. `matched_addresses` are the filter's addresses in the transaction."""
    position = Position(epoch, event.offset)
    kind: Literal["whale_alert", "whale_update"] = "whale_alert" if event.update is None else "whale_update"
    data = event.whale.alert if event.update is None else event.update
    if matched_addresses:
        return text_frame(_encode(_MatchedEventFrame(kind, data, iso(event.at), position, matched_addresses)))
    return text_frame(_encode(_EventFrame(kind, data, iso(event.at), position)))


def _object(**fields: object) -> bytes:
    return text_frame(_encode(fields))


def _expiry(grant: Grant | None) -> str | None:
    return iso(grant.expires_at) if grant is not None and grant.expires_at is not None else None


def _permissions(grant: Grant | None) -> list[str]:
    return sorted(grant.permissions) if grant is not None else []


def auth_success_frame(grant: Grant | None) -> bytes:
    """Return the answer to an accepted `auth`. `grant` is None on a server without authentication."""
    return _object(
        type="auth_success",
        client_id=grant.client_id if grant is not None else None,
        permissions=_permissions(grant),
        expires_at=_expiry(grant),
    )


def welcome_frame(grant: Grant | None, position: Position, now: float) -> bytes:
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


def error_frame(
    code: ClientErrorCode, message: str, *, path: str | None = None, retry_after_s: float | None = None
) -> bytes:
    """Return an error for a message that was refused."""
    if len(message) > MAX_ERROR_CHARACTERS:
        message = message[: MAX_ERROR_CHARACTERS - 1] + "…"
    fields: dict[str, object] = {"type": "error", "code": code, "message": message}
    if path is not None:
        fields["path"] = path
    if retry_after_s is not None:
        fields["retry_after"] = round(retry_after_s, 3)
    return text_frame(_encode(fields))


def pong_frame(ping: Ping, now: float) -> bytes:
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


def stats_frame(counters: Counters) -> bytes:
    """Return the answer to `stats`."""
    return _object(type="stats", data=counters)


def subscribed_frame(
    filters: object, *, recovered: bool | None, start: Position, position: Position, oldest: Position | None = None
) -> bytes:
    """Return the answer to `subscribe`.

    Delivery begins after `start`. `recovered` is None if no position was requested.
    """
    fields: dict[str, object] = {"type": "subscribed", "filters": filters}
    if recovered is not None:
        fields["recovered"] = recovered
    fields["from"] = start
    fields["position"] = position
    if oldest is not None:
        fields["oldest"] = oldest
    return text_frame(_encode(fields))


def unsubscribed_frame() -> bytes:
    """Return the answer to `unsubscribe`."""
    return _object(type="unsubscribed")


def token_expiring_frame(grant: Grant) -> bytes:
    """Return the warning that the connection's credential expires soon."""
    return _object(type="token_expiring", expires_at=_expiry(grant))


def token_frame(token: str, grant: Grant) -> bytes:
    """Return the answer to `refresh`."""
    return _object(type="token", token=token, expires_at=_expiry(grant))


def position_frame(position: Position) -> bytes:
    """Return a `position`: the new head, after events that did not match the client's filter."""
    return _object(type="position", position=position)


def status_frame(state: UpstreamState, since: float) -> bytes:
    """Return a `status` with the state of the link to the mempool backend."""
    return _object(type="status", upstream=state, since=iso(since))


def closing_frame(close: Close, retry_after_s: float) -> bytes:
    """Return a `closing`: the connection closes now, and the client should reconnect after `retry_after_s`."""
    return _object(type="closing", code=close.code, retry_after=round(retry_after_s, 3))
