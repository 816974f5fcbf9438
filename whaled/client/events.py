"""The events that a stream yields, and the decoder that makes them from frames.

A server may be newer than this client: unknown fields and frame types are ignored, and only the fields that every
version has are required. Enumerated values (`shape`, `flow_type` ...) are plain strings, since a newer server may have
more of them; they compare equal to the enums of whaled.model.
"""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct, field

from whaled.client.failures import ProtocolError
from whaled.client.since import Since
from whaled.model import Position

# At most this much of a frame is quoted in an error message.
QUOTED_BYTES = 120


class AlertData(Struct, frozen=True, kw_only=True):
    """A whale: the fields of whale_alert.data in docs/protocol.md. None means unknown."""

    transaction_id: str
    btc_value: float
    value_sat: int | None = None
    moved_sat: int | None = None
    fee_sat: int | None = None
    usd_value: float | None = None
    btc_usd: float | None = None
    fee_rate: float | None = None
    vsize: float | None = None
    urgency_score: float | None = None
    flow_type: str = "unknown"
    flow_sat: int | None = None
    exchange_addresses: tuple[str, ...] = ()
    confidence_score: float | None = None
    from_labels: tuple[str, ...] = ()
    to_labels: tuple[str, ...] = ()
    shape: str = "transfer"
    reasons: tuple[str, ...] = ()
    input_count: int | None = None
    output_count: int | None = None
    rbf_enabled: bool | None = None
    predicted_confirmation_block: int | None = None
    detection_timestamp: datetime | None = None
    status: str = "pending"
    source: str = "live"
    replaces: str | None = None
    price_timestamp: datetime | None = None
    matched_rules: tuple[str, ...] = ()
    from_other_labels: tuple[str, ...] = ()
    to_other_labels: tuple[str, ...] = ()


class UpdateData(Struct, frozen=True, kw_only=True):
    """The new status of a whale: the fields of whale_update.data in docs/protocol.md. None means not applicable."""

    transaction_id: str
    status: str
    btc_value: float | None = None
    block_height: int | None = None
    block_hash: str | None = None
    replaced_by: str | None = None
    seconds_to_confirmation: float | None = None
    predicted_confirmation_block: int | None = None
    blocks_off: int | None = None


# --- what a stream yields ---------------------------------------------------------------------------------------------


class WhaleAlert(Struct, frozen=True, kw_only=True):
    """A new whale. `raw` is the frame as received, including fields that this client does not know.

    `matched_addresses` are the addresses in the stream's filter that the transaction spends from or pays to.
    """

    data: AlertData
    timestamp: datetime
    position: Position
    raw: bytes
    matched_addresses: tuple[str, ...] = ()


class WhaleUpdate(Struct, frozen=True, kw_only=True):
    """A whale was confirmed, replaced or dropped, or is pending again. `raw` is the frame as received.

    `matched_addresses` is the same as in the whale's alert.
    """

    data: UpdateData
    timestamp: datetime
    position: Position
    raw: bytes
    matched_addresses: tuple[str, ...] = ()


class UpstreamStatus(Struct, frozen=True, kw_only=True, tag="status"):
    """The state of the server's link to its backend: `connected`, `degraded` or `disconnected`, and since when.

    While it is not `connected`, alerts are delayed, not lost: the server backfills the gap afterwards.
    """

    state: str = field(name="upstream")
    since: datetime | None = None


class Missed(Struct, frozen=True, kw_only=True):
    """A gap: the server no longer has all events after `since`, so events up to `position` may be lost.

    The stream continues live after `position`. `oldest` is the oldest event in the server's log, if the server sent it.
    """

    since: Since
    position: Position
    oldest: Position | None = None


class Connected(Struct, frozen=True, kw_only=True):
    """The stream is connected and subscribed.

    `head` is the server's newest event. If `is_recovered` is true, all events since the last position follow.
    """

    client_id: str | None
    head: Position | None
    is_recovered: bool


class Disconnected(Struct, frozen=True, kw_only=True):
    """The connection was lost or could not be opened; the stream reconnects in `retry_in_s` seconds."""

    reason: str
    code: int
    retry_in_s: float


class Progress(Struct, frozen=True, kw_only=True):
    """No event up to `position` matches the stream's filter. A bot that saves its position can save this one."""

    position: Position


class TokenRenewed(Struct, frozen=True, kw_only=True):
    """The server issued a new token in place of the current one. Save it: using an older one again may revoke them all.

    Yielded ahead of buffered events. `expires_at` is the token's expiry, if the server sent it. The repr omits the
    token.
    """

    token: str
    expires_at: datetime | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(token=..., expires_at={self.expires_at!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Return the fields that the library rich displays."""
        return [("expires_at", self.expires_at)]


StreamEvent = WhaleAlert | WhaleUpdate | UpstreamStatus | Missed | Connected | Disconnected | Progress | TokenRenewed


# --- other frames -----------------------------------------------------------------------------------------------------


class Welcome(Struct, frozen=True, tag="welcome"):
    """The server accepted the client and delivers events from here on."""

    authenticated: bool = False
    client_id: str | None = None
    permissions: tuple[str, ...] = ()
    position: Position | None = None


class Subscribed(Struct, frozen=True, tag="subscribed"):
    """The response to `subscribe`. `recovered` is None if the server did not send it."""

    recovered: bool | None = None
    position: Position | None = None
    oldest: Position | None = None


class ErrorFrame(Struct, frozen=True, tag="error"):
    """The server refused a message."""

    message: str = ""
    code: str = ""
    path: str | None = None
    retry_after: float | None = None


class Closing(Struct, frozen=True, tag="closing"):
    """The server is about to close the connection."""

    code: int = 1012
    retry_after: float | None = None


class TokenExpiring(Struct, frozen=True, tag="token_expiring"):
    """The token of this connection is about to expire."""


class Token(Struct, frozen=True, tag="token"):
    """A new token for the same client."""

    token: str
    expires_at: datetime | None = None


class Moved(Struct, frozen=True, tag="position"):
    """The head of the log advanced without an event that matches the filter."""

    position: Position


class _Alert(Struct, frozen=True, tag="whale_alert"):
    data: AlertData
    timestamp: datetime
    position: Position
    matched_addresses: tuple[str, ...] = ()


class _Update(Struct, frozen=True, tag="whale_update"):
    data: UpdateData
    timestamp: datetime
    position: Position
    matched_addresses: tuple[str, ...] = ()


Frame = (
    WhaleAlert
    | WhaleUpdate
    | UpstreamStatus
    | Welcome
    | Subscribed
    | ErrorFrame
    | Closing
    | TokenExpiring
    | Token
    | Moved
)
_Plain = UpstreamStatus | Welcome | Subscribed | ErrorFrame | Closing | TokenExpiring | Token | Moved


class _Head(Struct):
    type: str


_head = msgspec.json.Decoder(_Head)
_alert = msgspec.json.Decoder(_Alert)
_update = msgspec.json.Decoder(_Update)
_plain: msgspec.json.Decoder[_Plain] = msgspec.json.Decoder(_Plain)
_PLAIN = {"status", "welcome", "subscribed", "error", "closing", "token_expiring", "token", "position"}


def decode(raw: bytes) -> Frame | None:
    """Decode a message; None for a frame type that this client does not know. Raises ProtocolError."""
    try:
        kind = _head.decode(raw).type
        if kind == "whale_alert":
            alert = _alert.decode(raw)
            return WhaleAlert(
                data=alert.data,
                timestamp=alert.timestamp,
                position=alert.position,
                raw=raw,
                matched_addresses=alert.matched_addresses,
            )
        if kind == "whale_update":
            update = _update.decode(raw)
            return WhaleUpdate(
                data=update.data,
                timestamp=update.timestamp,
                position=update.position,
                raw=raw,
                matched_addresses=update.matched_addresses,
            )
        return _plain.decode(raw) if kind in _PLAIN else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # A frame that may contain a token is not quoted.
        quoted = "(not shown)" if b'"token"' in raw else ascii(raw[:QUOTED_BYTES].decode(errors="replace"))
        raise ProtocolError(
            f"the server sent an invalid frame for protocol 1 ({error}): {quoted}; is this a whaled server, "
            "and is this client recent enough for it?"
        ) from error
