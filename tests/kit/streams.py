"""Streams that reconnect at once, and their events."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kit.scripted_server import EPOCH
from whaled.client import (
    Position,
    Retry,
    WhaleAlert,
    WhaleStream,
    WhaleUpdate,
)

Kind = TypeVar("Kind")
SOON = Retry(initial_s=0.001, max_s=0.005)


def stream(url: str, **options: Any) -> WhaleStream:
    """Return a stream that tries again at once."""
    return WhaleStream(url, **{"retry": SOON, **options})


def at(offset: int, epoch: str = EPOCH) -> Position:
    """Return a position of the scripted server."""
    return Position(epoch, offset)


async def next_offsets(source: WhaleStream, count: int) -> list[int]:
    """Return the offsets of the next alerts and updates; nothing else may come between."""
    found = []
    for _ in range(count):
        event = await anext(source)
        assert isinstance(event, WhaleAlert | WhaleUpdate), event
        found.append(event.position.offset)
    return found


async def next_of(source: WhaleStream, kind: type[Kind]) -> Kind:
    """Return the next event of a kind; others are passed over."""
    async for event in source:
        if isinstance(event, kind):
            return event
    raise AssertionError("the stream ended")


def always(token: str) -> Callable[[], Awaitable[str]]:
    """Return a provider that gives this token each time."""

    async def provide() -> str:
        return token

    return provide
