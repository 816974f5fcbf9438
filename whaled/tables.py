"""Sets and dicts that live as long as the process. Python enlarges their tables and leaves them large. Pure."""

from typing import Any

# Below this many entries a table is at most some tens of KiB.
LEAST = 1024
# A table that holds this part of what it held at most, or less, is built anew.
SPARSE = 0.25


class Tables:
    """Gives back what sets and dicts were grown for and need no more: removing an entry never does.

    They are built anew in place, so whoever holds one keeps it; not to be called while one is iterated over.
    """

    def __init__(self, *tables: set[Any] | dict[Any, Any]) -> None:
        self._most: list[tuple[set[Any] | dict[Any, Any], int]] = [(table, 0) for table in tables]

    def shrink(self) -> None:
        """Build those anew that became sparse. Cheap where none did: to be called after each change."""
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
