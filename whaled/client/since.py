"""The start of a stream: a position, a number of events back, or a time."""

import re
from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct

from whaled import times
from whaled.model import Position


class Last(Struct, frozen=True):
    """Start `last` events back."""

    last: Annotated[int, Meta(ge=0)]


Since = Position | Last | datetime

_LAST = re.compile(r"last:(\d{1,12})")
# Texts that are meant as a time, valid or not. A time of day alone (10:00) also has the form of a position.
_LIKE_TIME = re.compile(r"\d{4}-|\d{8}T|\d{1,2}:\d{2}(?!\d)|\d{8,}(\.|$)|\d{1,4}[./]\d", re.ASCII)
_POSITION = re.compile(r"([^\s:]+):(\d{1,18})")


class NoStartError(ValueError):
    """A text that is in none of the forms of a starting point."""


def parse_since(text: str) -> Since:
    """Parse `last:20`, a time as `times.parse` reads it (UTC without a zone), or `epoch:offset`. Raises ValueError."""
    text = text.strip()
    if found := _LAST.fullmatch(text):
        return Last(int(found[1]))
    if _LIKE_TIME.match(text):
        return times.parse(text)
    if found := _POSITION.fullmatch(text):
        return Position(found[1], int(found[2]))
    raise NoStartError(
        f"{text!r} is not a starting point; give `last:20`, a time such as 2026-01-31T12:00:00Z, "
        "or a position as epoch:offset"
    )


def checked(since: Since | str | None) -> Since | None:
    """Return the start of a stream from its `since` argument. Raises ValueError."""
    if isinstance(since, str):
        return parse_since(since)
    if isinstance(since, datetime) and since.utcoffset() is None:
        raise ValueError(
            f"`since` {since.isoformat()} has no time zone: give it one, as datetime.now(UTC) and astimezone() do"
        )
    return since


def to_wire(since: Since) -> object:
    """Return the `since` of a `subscribe` message."""
    if isinstance(since, datetime):
        return {"time": since.isoformat()}
    return since
