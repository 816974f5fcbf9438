"""Where a stream starts: a position, so many events back, or a time."""

import re
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta, Struct

from whaled.model import Position


class Last(Struct, frozen=True):
    """Start `last` events back."""

    last: Annotated[int, Meta(ge=0)]


Since = Position | Last | datetime

_LAST = re.compile(r"last:(\d{1,12})")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_POSITION = re.compile(r"([^\s:]+):(\d{1,18})")


def parse_since(text: str) -> Since:
    """`last:20`, an ISO 8601 time (UTC where it names no zone) or `epoch:offset`. Raises ValueError."""
    text = text.strip()
    if found := _LAST.fullmatch(text):
        return Last(int(found[1]))
    if _DATE.match(text):
        try:
            at = datetime.fromisoformat(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is not an ISO 8601 time: {error}") from None
        return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    if found := _POSITION.fullmatch(text):
        return Position(found[1], int(found[2]))
    raise ValueError(
        f"{text!r} is no starting point; give `last:20`, a time such as 2026-01-31T12:00:00Z, "
        "or a position as epoch:offset"
    )


def to_wire(since: Since) -> object:
    """The `since` of a subscribe message."""
    if isinstance(since, datetime):
        return {"time": (since if since.tzinfo is not None else since.replace(tzinfo=UTC)).isoformat()}
    return since
