"""Rows that importers find, the report of what they left out, and lines of the address book's CSV. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator

from msgspec import Struct

from whaled.model import OwnerType
from whaled.whales import bookkeys
from whaled.whales.booklines import COLUMNS, MAX_LABEL, NOTES
from whaled.whales.books import CUT_SHORT

MAX_FAULTS = 20
MAX_SOURCE = 200
MAX_NOTE = 32
# Kinds of what was left out come from the file too.
MAX_REASONS = 50
HEADING = ",".join((*COLUMNS, *NOTES))


class LabelFileError(Exception):
    """A file that is not what it should be, from some line on."""


class Row(Struct, frozen=True, kw_only=True):
    """A label of an address, public key or script. `source`, `date` and `confidence` are "" where the file has none."""

    label: str
    key: str
    type: OwnerType
    source: str = ""
    date: str = ""
    confidence: str = ""


class Options(Struct, frozen=True):
    """What the operator adds to a file: `type` of what the file gives none, and a label and source for all of it."""

    type: OwnerType | None = None
    label: str | None = None
    source: str | None = None


class Report:
    """Counts of one import. Faults are lines that should have been a row."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self.cut = 0
        self.faults: list[tuple[int, str]] = []
        self.fault_count = 0
        self._latest_fault = (0, "")
        self._left_out: Counter[str] = Counter()

    def leave_out(self, what: str) -> None:
        """Count something that is no row and need not be one."""
        known = what in self._left_out or len(self._left_out) < MAX_REASONS
        self._left_out[what if known else "other things"] += 1

    def blame(self, line: int, problem: str) -> None:
        """Note a fault; the first are kept."""
        self.fault_count += 1
        self._latest_fault = (line, problem)
        if len(self.faults) < MAX_FAULTS:
            self.faults.append((line, problem))

    def require_usable(self, line: int) -> None:
        """Refuse a file that ends without a line break if its last thing, which begins at this line, has a fault.

        Raises LabelFileError.
        """
        at, problem = self._latest_fault
        if line and at == line:
            raise LabelFileError(f"line {line}: {problem}{CUT_SHORT}")

    @property
    def left_out(self) -> list[tuple[str, int]]:
        """What was left out, the most frequent first."""
        return self._left_out.most_common()

    def row(self, line: int, *, label: object, key: object, **fields: object) -> Row | None:
        """A row of texts of a file, None with a fault or a count if they make none."""
        text, is_cut = tidy(label, MAX_LABEL)
        if not text:
            self.leave_out("without a label")
            return None
        found = str(key).strip() if key is not None else ""
        problem = bookkeys.fault_in(found) if found else "the address is missing"
        if problem is not None:
            self.blame(line, problem)
            return None
        self.cut += is_cut
        kind = fields.pop("type")
        assert isinstance(kind, OwnerType)
        notes = {name: tidy(value, MAX_SOURCE if name == "source" else MAX_NOTE)[0] for name, value in fields.items()}
        return Row(label=text, key=found, type=kind, **notes)


Lines = Iterator[tuple[int, str]]
Importer = Callable[[Lines, Options, Report], Iterator[Row]]


def tidy(value: object, limit: int) -> tuple[str, bool]:
    """A text on one line without odd characters, and whether it had to be cut to the limit."""
    text = "" if value is None else str(value)
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text[:limit].rstrip(), len(text) > limit


def line_of(row: Row) -> str:
    """The line of the address book."""
    cells = (row.label, row.key, row.type, row.source, row.date, row.confidence)
    return ",".join(map(_cell, cells)).rstrip(",") + "\n"


def _cell(text: str) -> str:
    # A line that begins with # is a comment.
    if any(letter in text for letter in ',";\t') or text.startswith("#"):
        doubled = text.replace('"', '""')
        return f'"{doubled}"'
    return text
