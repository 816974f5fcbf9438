"""The types of the notes (table `state`). A value that does not have its type is damage, whatever its checksum.

These notes are JSON; a number as Python prints it is valid JSON. Notes under other keys may hold any text.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from whaled.eventlog import schema

# The range of a datetime (years 1 to 9999) in Unix seconds: a time outside it cannot be written into a frame.
EARLIEST_S, LATEST_S = -62_135_596_800, 253_402_300_799

Count = Annotated[int, Meta(ge=0, le=schema.MAX_OFFSET)]
Time = Annotated[float, Meta(ge=EARLIEST_S, le=LATEST_S)]


class _Block(Struct):
    height: Count
    hash: str
    timestamp: Annotated[int, Meta(ge=EARLIEST_S, le=LATEST_S)]
    previous_hash: str | None


_DECODERS: Mapping[str, msgspec.json.Decoder[Any]] = {
    schema.PRUNED_MARK: msgspec.json.Decoder(Count),
    schema.VERIFIED_MARK: msgspec.json.Decoder(Count),
    schema.CANARY_MARK: msgspec.json.Decoder(Time),
    schema.STARTS_MARK: msgspec.json.Decoder(dict[str, Count | bool]),
    "began_at": msgspec.json.Decoder(Time),
    "first_block": msgspec.json.Decoder(Count),
    "told_blocks": msgspec.json.Decoder(list[_Block]),
    "network": msgspec.json.Decoder(dict[str, str | None]),
}


def require_readable(key: str, value: str) -> None:
    """Raise ValueError if the value does not have the type of the note under this key."""
    decoder = _DECODERS.get(key)
    if decoder is not None:
        decoder.decode(value)
