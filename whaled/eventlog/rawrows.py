"""The rows of a log as every schema version stored them, and the tables and indexes that pages belong to."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import islice
from typing import Any

from whaled.eventlog.rawfile import Record
from whaled.model import Scan

# The numbers of stored columns of a row; rows of older versions have no checksum and so one column less. An event of a
# version before 5 has no repeat number either, but the end "#2" of its ref.
WHALE_COLUMNS = {4, 5}
EVENT_COLUMNS = {7, 8, 9}
SCAN_COLUMNS = {len(Scan.__struct_fields__), len(Scan.__struct_fields__) + 1}
REALS = frozenset({"mined_at", "scanned_at", "lead_s"})
NUMBERED = re.compile(rb"(.*)#([1-9][0-9]{0,17})", re.DOTALL)
SAMPLE = 5  # number of rows from which the shape of a page is determined

# The values of a damaged record may have any type; `Codec` verifies them.
Values = tuple[Any, ...]


class Shape(IntEnum):
    """The tables and indexes to which a page may belong, judged by its rows.

    Stored per page, so that each pass decodes only the pages that concern it.
    """

    NONE = 0
    UNKNOWN = 1
    WHALES = 2  # and `log`
    EVENTS = 3  # and `blocks` and `state`
    SPENDS = 4
    INDEXES = 5


def event_columns(values: Values) -> Values:
    """Return whale, kind, ref, repeat number, at, high_at, body and checksum of a stored row of `events`."""
    if len(values) == max(EVENT_COLUMNS):
        return values[1:]
    _, whale, kind, ref, at, high_at, body, *rest = values
    repeat = 1
    if isinstance(ref, bytes) and (match := NUMBERED.fullmatch(ref)):
        ref, repeat = match[1], int(match[2])
    return whale, kind, ref, repeat, at, high_at, body, rest[0] if rest else None


def is_spend(outpoint: bytes, rest: Sequence[object]) -> bool:
    """Return whether (outpoint, number, *rest) is a row of `spends`.

    An entry of the index on txids also consists of a text and a number, but its text has no colon.
    """
    return len(rest) == 1 or (not rest and b":" in outpoint)


def shape_of(records: Iterable[Record]) -> Shape:
    """Return the most common shape among the first rows of a page, of which some may be damaged."""
    shapes = Counter(_shape(record) for record in islice(records, SAMPLE))
    return shapes.most_common(1)[0][0] if shapes else Shape.UNKNOWN


def _shape(record: Record) -> Shape:
    number, values = record
    if number is not None:
        if len(values) in WHALE_COLUMNS:
            return Shape.WHALES
        return Shape.EVENTS if len(values) in EVENT_COLUMNS | SCAN_COLUMNS else Shape.UNKNOWN
    match values:
        case (bytes(), bytes(), *_):
            return Shape.EVENTS
        case (bytes() as outpoint, int(), *rest) if is_spend(outpoint, rest):
            return Shape.SPENDS
        case (bytes() | int(), bytes() | int(), *_):
            return Shape.INDEXES
    return Shape.UNKNOWN


def real(value: Any) -> Any:
    """Convert an integer to float: SQLite stores a real number without a fraction as an integer."""
    return float(value) if isinstance(value, int) else value
