"""The result of a repair: how many rows of each table were saved, and how many are lost."""

from msgspec import Struct

from whaled.eventlog.damage import Table


class Outcome(Struct, frozen=True):
    """The numbers of saved and lost rows of a table.

    `unverified` counts the saved rows that come from an index, which has no checksums. If `is_known` is False, more
    rows may be lost than are counted.
    """

    table: Table
    saved: int
    lost: int
    unverified: int
    is_known: bool


class Salvaged(Struct, frozen=True):
    """The new log: its epoch and newest offset, and the rows of each table."""

    epoch: str
    head: int
    is_renewed: bool
    outcomes: list[Outcome]

    @property
    def saved(self) -> int:
        """Return the number of saved rows in all tables."""
        return sum(each.saved for each in self.outcomes)

    @property
    def lost(self) -> int:
        """Return the number of lost rows in all tables."""
        return sum(each.lost for each in self.outcomes)
