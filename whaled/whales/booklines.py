"""Parsing of the lines of an address book in CSV: its separator, its columns, and the entry in each line. Pure."""

import contextlib
import csv
import re
from collections.abc import Sequence
from typing import NamedTuple

from whaled.model import OwnerType
from whaled.whales import bookkeys
from whaled.whales.bookkeys import Network

COLUMNS = ("label", "address", "type")
# `whaled labels import` writes these after the three columns. They are for readers of the file and appear in no alert.
NOTES = ("source", "date", "confidence")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MAX_LABEL = 64
TYPES = tuple(OwnerType)
_NUMBERS = {str(kind): number for number, kind in enumerate(TYPES)}
# The first line that spreadsheets write to record the separator of a file.
_SEPARATOR_LINE = re.compile('"?sep=([,;\t])"?', re.IGNORECASE)
# Maximum length that a fault quotes of a line or cell.
QUOTED = 100
# Words used as types elsewhere, with the nearest type of whaled.
_MEANT = {
    "pool": OwnerType.MINER,
    "mining": OwnerType.MINER,
    "gambling": OwnerType.SERVICE,
    "gaming": OwnerType.SERVICE,
    "market": OwnerType.SERVICE,
    "mixer": OwnerType.SERVICE,
    "payment": OwnerType.SERVICE,
    "hot wallet": OwnerType.EXCHANGE,
    "cold wallet": OwnerType.EXCHANGE,
    "etf": OwnerType.FUND,
    "treasury": OwnerType.FUND,
    "custody": OwnerType.CUSTODIAN,
}


class Entry(NamedTuple):
    """A key of the book in its canonical form (`bookkeys.canonical`), and its owner; `type` is an index into TYPES."""

    label: str
    key: str
    type: int
    network: Network


class LineFaultError(ValueError):
    """An unusable line; the text is the reason."""


class Layout(NamedTuple):
    """The separator, the positions of the columns, and the least and greatest number of columns in a line."""

    separator: str
    label: int = 0
    address: int = 1
    type: int = 2
    least: int = len(COLUMNS)
    most: int = len(COLUMNS)
    source: int | None = None

    @property
    def wanted(self) -> str:
        """The expected columns of a line, as text for a fault."""
        if self.separator == ",":
            return ",".join(COLUMNS)
        shown = "<tab>" if self.separator == "\t" else self.separator
        return f"{shown.join(COLUMNS)} (separated by {SEPARATORS[self.separator]})"


class Lines:
    """A parser for the lines of one book, in order: the first lines determine the separator and the columns."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._separators: Sequence[str] = tuple(SEPARATORS)
        # Whether the first line with content names the columns.
        self.has_names = False

    def entry(self, line: str) -> Entry | None:
        """Parse a line. Return its entry, None if it is empty, a comment or the names of the columns.

        Raises LineFaultError.
        """
        line = line.strip(" \r\n\f\v")
        if self._layout is None:
            line = line.removeprefix("\ufeff")
        if not line or line[0] == "#" or line.isspace():
            return None
        if not line.isascii():
            _require_utf8(line)
        if self._layout is None:
            match = _SEPARATOR_LINE.fullmatch(line)
            if match is not None:
                self._separators = (match[1],)
                return None
            self._layout, self.has_names = _layout(line, self._separators)
            if self.has_names:
                return None
        layout = self._layout
        cells = split(line, layout.separator)
        while len(cells) > layout.most and not cells[-1]:
            cells.pop()
        if not layout.least <= len(cells) <= layout.most:
            raise LineFaultError(_wrong_number(cells, layout))
        label, address, kind = cells[layout.label], cells[layout.address], cells[layout.type]
        problem = _fault_in(label, address, kind) if address else None
        if not address or problem is not None:
            raise LineFaultError(_misplaced(cells, layout) or problem or "the address is missing")
        key, network = bookkeys.canonical(address)
        return Entry(label, key, _NUMBERS[kind.lower()], network)

    def source(self, line: str) -> str:
        """Return the source that a line names for its entry; "" if it names none."""
        place = self._layout.source if self._layout is not None else None
        if self._layout is None or place is None:
            return ""
        cells = split(line.strip(), self._layout.separator)
        return cells[place] if place < len(cells) else ""


def split(line: str, separator: str) -> list[str]:
    """Return the cells of a line. Raises LineFaultError."""
    if '"' not in line:  # csv would give the same result more slowly
        return [cell.strip() for cell in line.split(separator)]
    try:
        found = next(csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise LineFaultError(
                "a quote opens and does not close in this line: quotes in a label are doubled, and a label has no line "
                "break"
            ) from error
        raise LineFaultError(f"not CSV: {error}") from error
    return [cell.strip() for cell in found]


def _layout(line: str, separators: Sequence[str]) -> tuple[Layout, bool]:
    """Return the layout of the first line with content, and whether that line names the columns.

    Raises LineFaultError.
    """
    found: dict[str, list[str]] = {}
    for separator in separators:
        with contextlib.suppress(LineFaultError):
            found[separator] = split(line, separator)
    for separator, cells in found.items():
        named = _named(separator, [cell.lower() for cell in cells])
        if named is not None:
            return named, True
    rows = [(separator, cells) for separator, cells in found.items() if len(cells) >= len(COLUMNS)]
    for separator, cells in rows:
        if bookkeys.fault_in(cells[1]) is None:
            width = max(index for index, cell in enumerate(cells, start=1) if cell)
            most = max(width, len(COLUMNS))
            return Layout(separator, most=most, source=len(COLUMNS) if most > len(COLUMNS) else None), False
    return Layout(rows[0][0] if rows else separators[0]), False


def _named(separator: str, names: list[str]) -> Layout | None:
    """Return the layout of a line that names the columns, None for any other line. Raises LineFaultError."""
    missing = [name for name in COLUMNS if name not in names]
    if not missing:
        label, address, kind = (names.index(name) for name in COLUMNS)
        least = max(label, address, kind) + 1
        source = names.index("source") if "source" in names else None
        return Layout(separator, label, address, kind, least, len(names), source)
    if "address" in names:
        raise LineFaultError(
            f"this line names the columns, and `{'` and `'.join(missing)}` {'are' if missing[1:] else 'is'} missing: "
            f"found {', '.join(names)[:QUOTED]!r}, expected label, address and type, in any order"
        )
    return None


def _wrong_number(cells: list[str], layout: Layout) -> str:
    count = str(layout.least) if layout.least == layout.most else f"{layout.least} to {layout.most}"
    hint = f"put a label with a {'tab' if layout.separator == chr(9) else layout.separator} in quotes"
    if len(cells) == 1:
        hint = "separate them by commas, semicolons or tabs"
    elif layout.separator == ",":
        hint = "put a label with a comma in quotes"
    return f"expected {count} columns, {layout.wanted}, found {len(cells)}; {hint}"


def _misplaced(cells: list[str], layout: Layout) -> str | None:
    """Return a fault that names the column of the address, if the address is in another column than expected."""
    if bookkeys.fault_in(cells[layout.address]) is None:
        return None
    for index, cell in enumerate(cells):
        if bookkeys.fault_in(cell) is None:
            return (
                f"the address is in column {index + 1}, expected {layout.wanted}; for another order begin the file "
                "with a line of the columns' names, like address,label,type"
            )
    return None


def _fault_in(label: str, address: str, kind: str) -> str | None:
    """Return the fault in an entry, None if it is valid."""
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        return f"label must be 1 to {MAX_LABEL} printable characters, found {label[: MAX_LABEL + 1]!r}"
    problem = bookkeys.fault_in(address)
    if problem is not None:
        return problem
    if kind.lower() in _NUMBERS:
        return None
    found = f"type must be one of {', '.join(OwnerType)}; found {kind[:MAX_LABEL]!r}"
    if label.lower() in _NUMBERS:
        return f"{found}; label and type are swapped"
    if "#" in kind:
        return f"{found}; a comment has a line of its own"
    meant = next((each for word, each in _MEANT.items() if word in kind.lower()), None)
    return f"{found}; the nearest is {meant}" if meant is not None else found


def _require_utf8(line: str) -> None:
    """Raise LineFaultError if a line was not UTF-8: its invalid bytes were decoded as lone surrogates (PEP 383)."""
    first = next((ord(letter) for letter in line if "\udc80" <= letter <= "\udcff"), None)
    if first is None:
        return
    shown = line.encode("utf-8", "surrogateescape").decode("cp1252", "replace").strip()[:QUOTED]
    raise LineFaultError(
        f"not UTF-8: byte 0x{first - 0xDC00:02x}. As Windows-1252, the plain CSV of spreadsheets, it is {shown!r}. "
        "Save the file as CSV UTF-8, or, if that reads right: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    )
