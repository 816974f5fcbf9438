"""Field types of the backend's JSON that are shared by its stream and its REST calls, and their decoding. Pure.

A backend computes with doubles and sends the results unrounded: a fee of 13,230 sat that it multiplied from BTC is
13229.999999999998, and a fee of -1 (unknown) yields a rate of -0.00098. So every number that may be the result of a
computation is decoded as a float and rounded here. A field that cannot be read is unknown and costs nothing else.
"""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from whaled.model import MAX_SAT

Txid = Annotated[str, Meta(min_length=64, max_length=64)]
# Sums of valid values stay far below 64 bits.
Satoshi = Annotated[int, Meta(ge=0, le=MAX_SAT)]
# The limit is a rate of all coins per vB, or as many vB. A higher number is not a measurement, and computing with it
# would overflow.
Rate = Annotated[float, Meta(ge=0, le=MAX_SAT)]
# As Rate, but the backend may have computed it from an unknown value: negative means unknown.
Signed = Annotated[float, Meta(ge=-MAX_SAT, le=MAX_SAT)]
# Heights, times, positions and nSequence: 32 bits in a block or a transaction.
Number = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
# A time in seconds, possibly fractional.
Seconds = Annotated[float, Meta(ge=0, le=0xFFFFFFFF)]
# `TransactionFlags.replacement` (mempool.interfaces.ts).
REPLACEMENT_FLAG = 1 << 18
# Every error that a decoder raises.
UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError)


_decode_value = msgspec.json.Decoder(Rate).decode


def read(raw: Raw, decoder: Callable[[Raw], Any], otherwise: Any) -> Any:
    """Return the decoded value of one field, `otherwise` if it cannot be read."""
    try:
        return decoder(raw)
    except UNREADABLE:
        return otherwise


def amount(raw: Raw) -> int:
    """Decode an amount in satoshi from a number that may be the result of a computation. Raises one of UNREADABLE."""
    return round(_decode_value(raw))


def gross_sat(value_sat: int, fee: float | None) -> int:
    """Return the sum of all outputs, plus the fee if it is known, in satoshi."""
    return value_sat + round(fee) if fee is not None and fee > 0 else value_sat


def is_replacement(flags: int | None) -> bool | None:
    """Return whether the backend's flags state that a transaction replaced another one; None without flags."""
    return None if not flags else bool(flags & REPLACEMENT_FLAG)
