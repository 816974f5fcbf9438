"""Shrinking of sets and dicts that live as long as the process: Python enlarges their tables but keeps them. Pure."""

from typing import Any

# Tables with at most this number of entries are ignored: they have a few tens of KiB.
LEAST = 1024
# A table is rebuilt when its number of entries falls to this fraction of its maximum.
SPARSE = 0.25


class Tables:
    """Releases the unused memory of sets and dicts, which removing entries does not.

    The tables are rebuilt in place, so references to them stay valid. They must not be iterated during `shrink`.
    """

    def __init__(self, *tables: set[Any] | dict[Any, Any]) -> None:
        self._most: list[tuple[set[Any] | dict[Any, Any], int]] = [(table, 0) for table in tables]

    def shrink(self) -> None:
        """Rebuild the tables that have become sparse. The check is cheap, so call it after each change."""
        for index, (table, before) in enumerate(self._most):
            held = len(table)
            if held > before:
                self._most[index] = (table, held)
            elif before > LEAST and held <= SPARSE * before:
                _rebuild(table)
                self._most[index] = (table, held)


def _rebuild(table: set[Any] | dict[Any, Any]) -> None:
    held: Any = table.copy()
    table.clear()
    table.update(held)
