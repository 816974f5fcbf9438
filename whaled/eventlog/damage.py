"""Damaged rows: what is skipped and counted instead of ending the daemon."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from operator import itemgetter

from msgspec import Struct


class Table(StrEnum):
    """The table of a damaged row; FILE where SQLite found it in its own check."""

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
NO_GAP = "it cannot be what a repair took out"
COUNTER = "the row with epoch and newest offset"
PLURAL = {
    UNREADABLE: "their pages of the file are damaged",
    MISMATCH: "their checksums do not match",
    NO_WHALE: "their whales are missing",
}

Gaps = Sequence[tuple[int, int]]
"""First and last offsets of what `whaled repair` has taken out, ascending."""


class Damage(Struct, frozen=True, kw_only=True):
    """Rows that cannot be used. `row` names them, `problem` says why.

    For events, `first` and `through` are their offsets; 0 in other tables.
    """

    table: Table
    row: str
    problem: str
    first: int = 0
    through: int = 0

    @property
    def rows(self) -> int:
        """How many rows these are."""
        return self.through - self.first + 1 if self.first else 1

    @property
    def text(self) -> str:
        """The rows and what is wrong with them, as a sentence."""
        if self.problem.startswith(MISSING):
            return f"{self.row} {'is' if self.rows == 1 else 'are'} missing{self.problem.removeprefix(MISSING)}"
        return f"{self.row}: {self.problem if self.rows == 1 else PLURAL.get(self.problem, self.problem)}"


Report = Callable[[Damage], None]
"""Called by readers for each damaged row that they meet."""


class DamagedRowError(Exception):
    """A row that is not what was written. The message completes the sentence "offset 17: ..."."""


class KnownDamage:
    """Remembers damage, so that each row is counted and logged once however often it is read.

    Of events, ranges of offsets; of the other tables, rows. Both up to a limit: what is found beyond it is not
    remembered, nor counted. `gaps` are known from the start and count as no rows: a repair has taken them out.
    """

    LIMIT = 10_000

    def __init__(self, gaps: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []  # ascending, apart from each other
        self._gaps = list(gaps)
        for gap in self._gaps:
            self._add_range(*gap)
        self._rows: set[tuple[Table, str]] = set()

    def add(self, damage: Damage) -> int:
        """Returns how many rows of it are new."""
        if damage.first:
            return self._add_range(damage.first, damage.through)
        key = (damage.table, damage.row)
        if key in self._rows or len(self._rows) >= self.LIMIT:
            return 0
        self._rows.add(key)
        return 1

    @property
    def rows(self) -> int:
        """How many rows are known."""
        return len(self._rows) + _length(self._ranges) - _length(self._gaps)

    def forget_before(self, offset: int) -> None:
        """Retention has removed the events before an offset."""
        self._ranges, self._gaps = (
            [(max(first, offset), through) for first, through in ranges if through >= offset]
            for ranges in (self._ranges, self._gaps)
        )

    def _add_range(self, first: int, through: int) -> int:
        # Those that overlap it or touch it become one with it.
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
    """The damage of events with these offsets, both included."""
    row = f"offset {first}" if first == through else f"offsets {first} to {through}"
    return Damage(table=Table.EVENTS, row=row, problem=problem, first=first, through=through)


def merged(damages: Iterable[Damage]) -> list[Damage]:
    """Neighbouring events with one and the same problem as one range."""
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
    """The parts of a range of events that are in no gap."""
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
    """The damage of a row of `gaps`."""
    return Damage(table=Table.GAPS, row=f"offsets {first} to {through}", problem=NO_GAP)


def lost_before(oldest: int, pruned: int | None, gaps: Gaps) -> list[Damage]:
    """The events that retention did not remove and that are missing before the oldest one held."""
    if pruned is None or oldest <= pruned + 1:
        return []
    return outside(of_events(pruned + 1, oldest - 1, MISSING), gaps)


def counter_problem(problem: str, newest: int, head: int) -> str:
    """Why epoch and newest offset are not known, and what that says of events after the newest one held."""
    proven = f" (at least up to {head})" if head > newest else ""
    return f"{problem}; events after {newest} may have been lost{proven}"
