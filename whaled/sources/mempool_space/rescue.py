"""Decoding of a frame's part item by item, so that an unreadable item costs only itself. Pure."""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct, field

from whaled.sources.mempool_space.fields import UNREADABLE, Number, Rate, Seconds, Signed, Txid, amount, read
from whaled.sources.mempool_space.shapes import (
    BlockShape,
    DeltaShape,
    FeesShape,
    Integer,
    ProjectedShape,
    ReplacedShape,
    SnapshotShape,
    Stripped,
)
from whaled.sources.mempool_space.transactions import glance


class _Pair(Struct):
    replaced: Txid
    by: Raw


class _DeltaParts(Struct):
    sequence: Raw = Raw(b"0")
    added: Raw = Raw(b"[]")
    removed: Raw = Raw(b"[]")
    mined: Raw = Raw(b"[]")
    replaced: Raw = Raw(b"[]")


class _SnapshotParts(Struct):
    index: Number
    sequence: Integer
    transactions: Raw = field(name="blockTransactions")


class _FeesParts(Struct, rename="camel"):
    fastest_fee: Raw = Raw(b"null")
    half_hour_fee: Raw = Raw(b"null")
    hour_fee: Raw = Raw(b"null")
    economy_fee: Raw = Raw(b"null")
    minimum_fee: Raw = Raw(b"null")


class _ProjectedParts(Struct):
    vsize: Rate = field(name="blockVSize")
    rates: Raw = field(name="feeRange", default=Raw(b"[]"))


_decode_delta_parts = msgspec.json.Decoder(_DeltaParts).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_sequence = msgspec.json.Decoder(Integer).decode
_decode_txid = msgspec.json.Decoder(Txid).decode
_decode_snapshot_parts = msgspec.json.Decoder(_SnapshotParts).decode
_decode_stripped = msgspec.json.Decoder(Stripped).decode
_decode_pair = msgspec.json.Decoder(_Pair).decode
_decode_block = msgspec.json.Decoder(BlockShape).decode
_decode_projected_parts = msgspec.json.Decoder(_ProjectedParts).decode
_decode_fees_parts = msgspec.json.Decoder(_FeesParts).decode
_decode_rate = msgspec.json.Decoder(Rate).decode
_decode_signed = msgspec.json.Decoder(Signed).decode
_STRIPPED_LEAST = 4
_STRIPPED_REST = (_decode_signed, _decode_sequence, msgspec.json.Decoder(Seconds).decode)


def rescued(part: str, raw: Raw) -> tuple[Any, int] | None:
    """Decode a part of a frame (a field of `Parts`) without its unreadable items.

    Returns its shape and the number of these items; None if the part cannot be decoded item by item.
    """
    rescue = _RESCUES.get(part)
    return None if rescue is None else rescue(raw)


def _snapshot_apart(raw: Raw) -> tuple[SnapshotShape, int] | None:
    """Return a snapshot without its unreadable transactions, and their number. None if it is not a snapshot."""
    try:
        parts = _decode_snapshot_parts(raw)
    except UNREADABLE:
        return None
    good, bad = _each(parts.transactions, _stripped)
    return SnapshotShape(parts.index, parts.sequence, good), bad


def _delta_apart(raw: Raw) -> tuple[DeltaShape, int] | None:
    """Return a delta without its unreadable items, and their number. None if it is not an object.

    An unreadable sequence number becomes 0, which makes no claim: it means "not in sync".
    """
    try:
        parts = _decode_delta_parts(raw)
    except UNREADABLE:
        return None
    malformed = 0
    try:
        sequence = _decode_sequence(parts.sequence)
    except UNREADABLE:
        sequence = 0
        malformed += 1
    lists = []
    for value, decoder in (
        (parts.added, glance),
        (parts.removed, _decode_txid),
        (parts.mined, _decode_txid),
        (parts.replaced, _replaced),
    ):
        good, bad = _each(value, decoder)
        lists.append(good)
        malformed += bad
    return DeltaShape(sequence, *lists), malformed


def _fees_apart(raw: Raw) -> tuple[FeesShape, int] | None:
    """Return the recommended rates without the unreadable ones, and their number. None if no rate is readable."""
    try:
        parts = msgspec.structs.astuple(_decode_fees_parts(raw))
    except UNREADABLE:
        return None
    rates = [read(part, _decode_rate, None) for part in parts]
    return (FeesShape(*rates), rates.count(None)) if any(rate is not None for rate in rates) else None


def _blocks_apart(raw: Raw) -> tuple[list[BlockShape], int] | None:
    """Return the blocks without the unreadable ones, and their number. None if no block is readable."""
    good, bad = _each(raw, _decode_block)
    return (good, bad) if good else None


def _projected_apart(raw: Raw) -> tuple[list[ProjectedShape], int] | None:
    """Return the projected blocks without the unreadable rates, and the number of these rates.

    None if the size of a block cannot be read: leaving the block out would make the later ones look earlier.
    """
    try:
        parts = [_decode_projected_parts(each) for each in _decode_items(raw)]
    except UNREADABLE:
        return None
    blocks, malformed = [], 0
    for part in parts:
        rates, bad = _each(part.rates, _decode_rate)
        blocks.append(ProjectedShape(part.vsize, rates))
        malformed += bad
    return blocks, malformed


def _stripped(raw: Raw) -> Stripped:
    """Decode a transaction of a snapshot. Its id and value are required; other unreadable fields are unknown.

    Raises one of UNREADABLE.
    """
    try:
        return _decode_stripped(raw)
    except UNREADABLE:
        items = _decode_items(raw)
    if len(items) < _STRIPPED_LEAST:
        raise msgspec.ValidationError("too short")
    rest = [read(item, decoder, None) for item, decoder in zip(items[4:], _STRIPPED_REST, strict=False)]
    fee, vsize = (read(item, _decode_signed, None) for item in items[1:3])
    return Stripped(_decode_txid(items[0]), fee, vsize, amount(items[3]), *rest)


def _replaced(raw: Raw) -> ReplacedShape:
    pair = _decode_pair(raw)
    return ReplacedShape(pair.replaced, glance(pair.by))


def _each(raw: Raw, decoder: Any) -> tuple[list[Any], int]:
    try:
        items = _decode_items(raw)
    except UNREADABLE:
        return [], 1
    good = []
    for item in items:
        try:
            good.append(decoder(item))
        except UNREADABLE:
            continue
    return good, len(items) - len(good)


_RESCUES: dict[str, Callable[[Raw], tuple[Any, int] | None]] = {
    "delta": _delta_apart,
    "snapshot": _snapshot_apart,
    "fees": _fees_apart,
    "blocks": _blocks_apart,
    "projected": _projected_apart,
}
