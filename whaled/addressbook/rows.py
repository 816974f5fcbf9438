"""The rows of importers, the report on an import, and the lines of the resulting CSV address book. Pure."""

from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from whaled.model import OwnerType
from whaled.whales import bookkeys
from whaled.whales.booklines import COLUMNS, MAX_LABEL, NOTES
from whaled.whales.books import CUT_SHORT

MAX_FAULTS = 20
MAX_SOURCE = 200
MAX_NOTE = 32
# Maximum number of distinct reasons counted: they may contain text from the file.
MAX_REASONS = 50
HEADING = ",".join((*COLUMNS, *NOTES))


class LabelFileError(Exception):
    """A file that cannot be imported."""


class Row(Struct, frozen=True, kw_only=True):
    """A label of an address, public key or script. `source`, `date` and `confidence` are "" if the file has none."""

    label: str
    key: str
    type: OwnerType
    source: str = ""
    date: str = ""
    confidence: str = ""


class Options(Struct, frozen=True):
    """The operator's additions: a `type` for entries without one, and a `label` and a `source` for all entries."""

    type: OwnerType | None = None
    label: str | None = None
    source: str | None = None


class Report:
    """The counts of one import. A fault is a line that should have been a row."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self.cut = 0
        self.faults: list[tuple[int, str]] = []
        self.fault_count = 0
        self._latest_fault = (0, "")
        self._left_out: Counter[str] = Counter()

    def leave_out(self, what: str) -> None:
        """Count an entry that is not a row and is not required to be one."""
        known = what in self._left_out or len(self._left_out) < MAX_REASONS
        self._left_out[what if known else "other things"] += 1

    def blame(self, line: int, problem: str) -> None:
        """Record a fault. All are counted, only the first MAX_FAULTS are kept."""
        self.fault_count += 1
        self._latest_fault = (line, problem)
        if len(self.faults) < MAX_FAULTS:
            self.faults.append((line, problem))

    def require_usable(self, line: int) -> None:
        """Refuse a file that ends without a line break if its last entry, which begins at `line`, has a fault.

        Raises LabelFileError.
        """
        at, problem = self._latest_fault
        if line and at == line:
            raise LabelFileError(f"line {line}: {problem}{CUT_SHORT}")

    @property
    def left_out(self) -> list[tuple[str, int]]:
        """The reasons for entries that were left out, each with its count, the most frequent first."""
        return self._left_out.most_common()

    def row(self, line: int, *, label: object, key: object, **fields: object) -> Row | None:
        """Return a row made of texts from a file; if that fails, None, and the entry is counted."""
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


def tidy(value: object, limit: int) -> tuple[str, bool]:
    """Return a text on one line without unprintable characters, and whether it was cut to the limit."""
    text = "" if value is None else str(value)
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text[:limit].rstrip(), len(text) > limit


def line_of(row: Row) -> str:
    """Return the row as a line of the address book."""
    cells = (row.label, row.key, row.type, row.source, row.date, row.confidence)
    return ",".join(map(_cell, cells)).rstrip(",") + "\n"


def _cell(text: str) -> str:
    # A line that begins with # would be read as a comment.
    if any(letter in text for letter in ',";\t') or text.startswith("#"):
        doubled = text.replace('"', '""')
        return f'"{doubled}"'
    return text
