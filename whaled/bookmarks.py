"""The bookmarks that the daemon keeps in its event log from one run to the next: their keys and types. Pure.

Each is a short JSON text under a key. A text that does not have the type of its key is damage, whatever its checksum.
"""

from collections.abc import Callable
from typing import Annotated, Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from whaled.model import Block

T = TypeVar("T")

# The range of a datetime (years 1 to 9999) in Unix seconds: a time outside it cannot be written into a frame.
EARLIEST_S, LATEST_S = -62_135_596_800, 253_402_300_799
MAX_OFFSET = 2**53  # the largest integer that every JSON client represents exactly

Count = Annotated[int, Meta(ge=0, le=MAX_OFFSET)]
Time = Annotated[float, Meta(ge=EARLIEST_S, le=LATEST_S)]


class Bookmark(Generic[T]):
    """A key, and the conversion of its value. `decode` raises ValueError for a text without the value's type."""

    def __init__(self, key: str, decode: Callable[[str], T], encode: Callable[[T], str]) -> None:
        self.key = key
        self.decode = decode
        self.encode = encode


class Keeper(Protocol):
    """The event log, as far as bookmarks are concerned."""

    async def recall(self, bookmark: Bookmark[T]) -> T | None:
        """Return the value of a bookmark, None if none is stored or if it is damaged."""
        ...

    async def keep(self, bookmark: Bookmark[T], value: T) -> None:
        """Store the value of a bookmark."""
        ...


class StartRecord(Struct):
    """The starts since the log was created, by how the previous run ended. `is_running` until a clean end."""

    clean: Count = 0
    unclean: Count = 0
    is_running: bool = False


class _StoredBlock(Struct):
    height: Count
    hash: str
    timestamp: Annotated[int, Meta(ge=EARLIEST_S, le=LATEST_S)]
    previous_hash: str | None


_stored_blocks = msgspec.json.Decoder(list[_StoredBlock]).decode


def _blocks(text: str) -> list[Block]:
    return [
        Block(height=each.height, hash=each.hash, previous_hash=each.previous_hash, timestamp=each.timestamp)
        for each in _stored_blocks(text)
    ]


def _encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _json(key: str, type_: Any) -> Bookmark[Any]:
    return Bookmark(key, msgspec.json.Decoder(type_).decode, _encoded)


def text(key: str) -> Bookmark[str]:
    """Return a bookmark whose value is any text."""
    return Bookmark(key, str, str)


# Retention has removed all events up to this offset; any other missing event is lost.
PRUNED_OFFSET: Bookmark[int] = _json("pruned_offset", Count)
# The backfill has verified every confirmation up to this offset against the chain, so these events existed.
VERIFIED_OFFSET: Bookmark[int] = _json("verified_offset", Count)
# The time of the last canary: the daemon was alive then.
ALIVE_AT: Bookmark[float] = _json("canary", Time)
STARTS: Bookmark[StartRecord] = _json("starts", StartRecord)
# The time of the first start.
BEGAN_AT: Bookmark[float] = _json("began_at", Time)
# The lowest height that the backfill scans.
FIRST_BLOCK: Bookmark[int] = _json("first_block", Count)
# The newest blocks when the backend first reported any.
BLOCKS_AT_START: Bookmark[list[Block]] = Bookmark("told_blocks", _blocks, _encoded)
# The network of the whales in the log; `survey` of the source knows the fields.
NETWORK: Bookmark[dict[str, str | None]] = _json("network", dict[str, str | None])
# The log of a simulated world, which ended with the process that ran it.
SIMULATED_WORLD = text("simulated_world")
# The time at which a backup was made: this file is one.
COPIED_AT = text("copy")

BOOKMARKS: dict[str, Bookmark[Any]] = {
    each.key: each
    for each in (
        PRUNED_OFFSET, VERIFIED_OFFSET, ALIVE_AT, STARTS, BEGAN_AT, FIRST_BLOCK, BLOCKS_AT_START, NETWORK,
        SIMULATED_WORLD, COPIED_AT,
    )
}  # fmt: skip
