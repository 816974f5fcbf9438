"""The groups that an event may concern, found without a look at each filter.

A filter with addresses, exchanges or rules passes only what has one of them. Groups with such a filter are found by the
names that the event has, so that thousands of them cost a publication nothing unless one of them wants it.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from whaled.whales.filters import Filter, Subject, UpdatesOf


class Grouped(Protocol):
    """A group of clients with one filter."""

    @property
    def filter(self) -> Filter:
        """What they want."""
        ...


G = TypeVar("G", bound=Grouped)
# Runs a job in slices until it returns False.
Later = Callable[[Callable[[], bool]], None]


class _Names(Generic[G]):
    """Groups by the names of one kind. Most names have one group, which is kept without a collection around it."""

    def __init__(self) -> None:
        self._found: dict[str, G | dict[G, None]] = {}

    def add(self, name: str, group: G) -> None:
        found = self._found.get(name)
        if found is None:
            self._found[name] = group
        elif isinstance(found, dict):
            found[group] = None
        else:
            self._found[name] = {found: None, group: None}

    def discard(self, name: str, group: G) -> None:
        found = self._found[name]
        if isinstance(found, dict):
            del found[group]
        if not found or found is group:
            del self._found[name]

    def __len__(self) -> int:
        return len(self._found)

    def find(self, names: Iterable[str], groups: dict[G, None]) -> None:
        """Add the groups of these names to `groups`."""
        found = self._found
        for name in names:
            if name in found:
                hit = found[name]
                if isinstance(hit, dict):
                    groups |= hit
                else:
                    groups[hit] = None


class Interest(Generic[G]):
    """Which groups to evaluate for which events. A name is indexed once for each group that has it."""

    def __init__(self, later: Later | None = None) -> None:
        """`later` removes the names of groups that are gone: a client that leaves has a thousand at most, and very many
        may leave in one publication. Without it they are removed at once.
        """
        self._later = later
        self._addresses = _Names[G]()
        self._exchanges = _Names[G]()
        self._rules = _Names[G]()
        self._others: dict[G, None] = {}
        # They want every update, too.
        self._updates: dict[G, None] = {}
        self._gone: list[tuple[_Names[G], frozenset[str], G]] = []

    def add(self, group: G) -> None:
        """Look at a group from now on."""
        index, names = self._index_of(group.filter)
        if index is None:
            self._others[group] = None
            return
        if group.filter.updates_of is UpdatesOf.ALL:
            self._updates[group] = None
        for name in names:
            index.add(name, group)

    def discard(self, group: G) -> None:
        """Look at a group no more, at least not for long."""
        index, names = self._index_of(group.filter)
        if index is None:
            del self._others[group]
            return
        self._updates.pop(group, None)
        self._gone.append((index, names, group))
        if self._later is None:
            while self._remove():
                pass
        elif len(self._gone) == 1:
            self._later(self._remove)

    def _remove(self) -> bool:
        """Remove the names of one group that is gone. Returns whether there are others."""
        index, names, group = self._gone.pop()
        for name in names:
            index.discard(name, group)
        return bool(self._gone)

    def __len__(self) -> int:
        """Names that are indexed, those of groups that are gone too."""
        return len(self._addresses) + len(self._exchanges) + len(self._rules)

    def groups(self, subjects: Iterable[Subject]) -> list[G]:
        """The groups that may want one of these. Some may be gone already: they have no members."""
        found = dict(self._others)
        for subject in subjects:
            if self._addresses:
                self._addresses.find(subject.whale.addresses, found)
            if self._exchanges:
                self._exchanges.find(subject.names, found)
            if self._rules:
                self._rules.find(subject.alert.matched_rules, found)
            if not subject.is_alert:
                found |= self._updates
        return list(found)

    def _index_of(self, chosen: Filter) -> tuple[_Names[G] | None, frozenset[str]]:
        if chosen.addresses is not None:
            return self._addresses, chosen.addresses
        if chosen.exchanges is not None:
            return self._exchanges, chosen.exchanges
        if chosen.rules is not None:
            return self._rules, chosen.rules
        return None, frozenset()
