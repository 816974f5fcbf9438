"""The messages of clients, which docs/protocol.md specifies: JSON texts in, commands out.

Pure.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from whaled import times
from whaled.errors import ClientError, ClientErrorCode, json_kind
from whaled.model import Position


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


def parse(raw: bytes | bytearray) -> Command:
    """Return the command in a text message. Raises ClientError with the code of the answer."""
    try:
        message = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ClientError(ClientErrorCode.INVALID_JSON, "Invalid JSON") from None
    if not isinstance(message, dict):
        raise ClientError(ClientErrorCode.INVALID_MESSAGE, f"expected a JSON object, found {json_kind(message)}")
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
                ClientErrorCode.INVALID_MESSAGE, f"`type` must be a string, found {json_kind(other)}", path="type"
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
        f"`id` must be a number or a string of at most 128 characters, found {json_kind(value)}",
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
        problem = f"found {json_kind(value)}"
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
    raise ValueError(f"`time` must be a string, found {json_kind(value)}")
