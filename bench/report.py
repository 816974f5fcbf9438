"""Results as Markdown tables that are also readable on a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aim:
    """A target for a measured number: at most `bound`, or at least `bound` if `more_is_better`."""

    what: str
    value: float
    bound: float
    unit: str = ""
    more_is_better: bool = False

    @property
    def is_met(self) -> bool:
        """Return whether the aim is met."""
        return self.value >= self.bound if self.more_is_better else self.value <= self.bound

    def row(self) -> Row:
        """Return the row in the table of aims."""
        sign = ">=" if self.more_is_better else "<="
        return (
            self.what,
            f"{self.value:.3g}{self.unit}",
            f"{sign} {self.bound:g}{self.unit}",
            "met" if self.is_met else "MISSED",
        )


@dataclass(frozen=True, slots=True)
class Section:
    """The result of one measurement."""

    title: str
    header: Row
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    aims: Sequence[Aim] = ()

    def text(self) -> str:
        """Return title, table and notes."""
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"### {self.title}\n\n{table(self.header, self.rows)}\n{notes}\n"


def table(header: Row, rows: Sequence[Row]) -> str:
    """Return a Markdown table with aligned columns: the first one left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    rule = [f"{'-' * width}" if column == 0 else f"{'-' * (width - 1)}:" for column, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in (header, rule, *rows))


def aims_table(aims: Sequence[Aim]) -> str:
    """Return the table of all aims, with whether each is met."""
    return table(("aim", "measured", "bound", ""), [aim.row() for aim in aims])


def percentile(values: Sequence[float], part: float) -> float:
    """Return the percentile for a part from 0 to 1 (nearest rank)."""
    ordered = sorted(values)
    return ordered[round(part * (len(ordered) - 1))]
