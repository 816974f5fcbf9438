"""The notes (table `state`) that somebody computes with: a value that cannot be one is damage, whatever its checksum.

All of them are JSON: a number as Python writes it is. Notes of other keys may hold any text.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from whaled.eventlog import schema

# Seconds since 1970 that a datetime can hold (years 1 to 9999): beyond it, no frame can be written.
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
    """Raises ValueError for a value that the reader of this note could not use."""
    decoder = _DECODERS.get(key)
    if decoder is not None:
        decoder.decode(value)
