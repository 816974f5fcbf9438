"""Damaged rows, which readers skip and count instead of failing."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from operator import itemgetter

from msgspec import Struct


class Table(StrEnum):
    """The table of a damaged row; FILE if SQLite's own check found the damage."""

    FILE = "file"
    LOG = "log"
    EVENTS = "events"
    WHALES = "whales"
    SPENDS = "spends"
    BLOCKS = "blocks"
    STATE = "state"
    GAPS = "gaps"


MISSING = "it is missing"
UNREADABLE = "its page of the file is damaged"
MISMATCH = "its checksum does not match"
NO_WHALE = "its whale is missing"
NO_GAP = "no repair can have made this gap"
COUNTER = "the row with epoch and newest offset"
PLURAL = {
    UNREADABLE: "their pages of the file are damaged",
    MISMATCH: "their checksums do not match",
    NO_WHALE: "their whales are missing",
}

Gaps = Sequence[tuple[int, int]]
"""First and last offsets of the ranges that `whaled repair` removed, ascending."""


class Damage(Struct, frozen=True, kw_only=True):
    """One or more unusable rows, identified by `row`; `problem` is the reason.

    `first` and `through` are the offsets of damaged events, both included; 0 for other tables.
    """

    table: Table
    row: str
    problem: str
    first: int = 0
    through: int = 0

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.through - self.first + 1 if self.first else 1

    @property
    def text(self) -> str:
        """Return the rows and their problem as a sentence."""
        if self.problem.startswith(MISSING):
            return f"{self.row} {'is' if self.rows == 1 else 'are'} missing{self.problem.removeprefix(MISSING)}"
        return f"{self.row}: {self.problem if self.rows == 1 else PLURAL.get(self.problem, self.problem)}"


Report = Callable[[Damage], None]
"""A callback that readers call for each damaged row they find."""


class DamagedRowError(Exception):
    """A row differs from what was written. The message completes the sentence "offset 17: ..."."""


class KnownDamage:
    """The damage found so far, so that each row is counted and logged once however often it is read.

    Damaged events are kept as ranges of offsets, rows of other tables one by one. Each kind has a limit; damage beyond
    it is neither kept nor counted. `gaps` are known from the start and do not count, because a repair removed them.
    """

    LIMIT = 10_000

    def __init__(self, gaps: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []  # ascending, apart from each other
        self._gaps = list(gaps)
        for gap in self._gaps:
            self._add_range(*gap)
        self._rows: set[tuple[Table, str]] = set()

    def add(self, damage: Damage) -> int:
        """Add damage; return the number of its rows that were not known."""
        if damage.first:
            return self._add_range(damage.first, damage.through)
        key = (damage.table, damage.row)
        if key in self._rows or len(self._rows) >= self.LIMIT:
            return 0
        self._rows.add(key)
        return 1

    @property
    def rows(self) -> int:
        """Return the number of known damaged rows."""
        return len(self._rows) + _length(self._ranges) - _length(self._gaps)

    def forget_before(self, offset: int) -> None:
        """Forget the damage of events before an offset, which retention has removed."""
        self._ranges, self._gaps = (
            [(max(first, offset), through) for first, through in ranges if through >= offset]
            for ranges in (self._ranges, self._gaps)
        )

    def _add_range(self, first: int, through: int) -> int:
        # Ranges that overlap or adjoin the new one are merged with it.
        low = bisect_left(self._ranges, first - 1, key=itemgetter(1))
        high = bisect_right(self._ranges, through + 1, key=itemgetter(0))
        touched = self._ranges[low:high]
        if not touched and len(self._ranges) >= self.LIMIT:
            return 0
        whole = (min([first, *(low for low, _ in touched)]), max([through, *(high for _, high in touched)]))
        self._ranges[low:high] = [whole]
        return whole[1] - whole[0] + 1 - sum(high - low + 1 for low, high in touched)


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(through - first + 1 for first, through in ranges)


def of_events(first: int, through: int, problem: str) -> Damage:
    """Return the damage of the events from offset `first` to `through`, both included."""
    row = f"offset {first}" if first == through else f"offsets {first} to {through}"
    return Damage(table=Table.EVENTS, row=row, problem=problem, first=first, through=through)


def merged(damages: Iterable[Damage]) -> list[Damage]:
    """Merge adjacent events with the same problem into ranges."""
    found: list[Damage] = []
    for each in damages:
        last = found[-1] if found else None
        is_next = last is not None and each.first and last.through + 1 == each.first and last.problem == each.problem
        if last is not None and is_next:
            found[-1] = of_events(last.first, each.through, each.problem)
        else:
            found.append(each)
    return found


def outside(damage: Damage, gaps: Gaps) -> list[Damage]:
    """Return the parts of a range of events that lie outside all gaps."""
    parts: list[Damage] = []
    first = damage.first
    for low, high in gaps:
        if high < first:
            continue
        if low > damage.through:
            break
        if low > first:
            parts.append(of_events(first, low - 1, damage.problem))
        first = high + 1
    if first <= damage.through:
        parts.append(of_events(first, damage.through, damage.problem))
    return parts


def of_gap(first: int, through: int) -> Damage:
    """Return the damage for a row of `gaps`."""
    return Damage(table=Table.GAPS, row=f"offsets {first} to {through}", problem=NO_GAP)


def lost_before(oldest: int, pruned: int | None, gaps: Gaps) -> list[Damage]:
    """Return the events that are missing before the oldest one although retention did not remove them."""
    if pruned is None or oldest <= pruned + 1:
        return []
    return outside(of_events(pruned + 1, oldest - 1, MISSING), gaps)


def counter_problem(problem: str, newest: int, head: int) -> str:
    """Describe why epoch and newest offset are unknown, and which events may therefore be lost.

    `newest` is the newest event held; `head` is the greatest offset that the log proves to have existed.
    """
    proven = f" (at least up to {head})" if head > newest else ""
    return f"{problem}; events after {newest} may have been lost{proven}"
