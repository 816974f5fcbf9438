"""An index of groups by the names in their filters, to find the groups that may match an event.

A filter with addresses, exchanges or rules passes only events that contain one of them. Groups with such a filter are
found by the names in the event, so thousands of filters that do not match cost a publication nothing.

Pure.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from whaled.whales.filters import Filter, Subject, UpdatesOf


class Grouped(Protocol):
    """A group of clients with one filter."""

    @property
    def filter(self) -> Filter:
        """The filter of the group."""
        ...


G = TypeVar("G", bound=Grouped)
# A function that runs a job repeatedly, in slices, until the job returns False.
Later = Callable[[Callable[[], bool]], None]


def at_once(job: Callable[[], bool]) -> None:
    """Run a job to its end."""
    while job():
        pass


class _Names(Generic[G]):
    """An index of groups by names of one kind. A name with one group, the usual case, has no collection around it."""

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
    """The index of all groups, by the kind of names in their filters. A name is indexed once per group."""

    def __init__(self, later: Later = at_once) -> None:
        """Create an empty index.

        `later` removes the names of discarded groups in slices: a filter has at most a thousand names, but very many
        groups may be discarded during one publication.
        """
        self._later = later
        self._addresses = _Names[G]()
        self._exchanges = _Names[G]()
        self._rules = _Names[G]()
        self._others: dict[G, None] = {}
        # Groups in the index whose filters also pass every update.
        self._updates: dict[G, None] = {}
        self._gone: list[tuple[_Names[G], frozenset[str], G]] = []

    def add(self, group: G) -> None:
        """Add a group to the index."""
        index, names, takes_updates = self._index_of(group.filter)
        if index is None:
            self._others[group] = None
            return
        if takes_updates:
            self._updates[group] = None
        for name in names:
            index.add(name, group)

    def discard(self, group: G) -> None:
        """Remove a group from the index. Its names may be removed later."""
        index, names, _ = self._index_of(group.filter)
        if index is None:
            del self._others[group]
            return
        self._updates.pop(group, None)
        self._gone.append((index, names, group))
        if len(self._gone) == 1:
            self._later(self._remove)

    def _remove(self) -> bool:
        """Remove the names of one discarded group. Return whether others remain."""
        index, names, group = self._gone.pop()
        for name in names:
            index.discard(name, group)
        return bool(self._gone)

    def __len__(self) -> int:
        """Return the number of indexed names, including those of discarded groups."""
        return len(self._addresses) + len(self._exchanges) + len(self._rules)

    def groups(self, subjects: Iterable[Subject]) -> list[G]:
        """Return the groups that may match one of these subjects. Discarded groups may be included, without members."""
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

    def _index_of(self, chosen: Filter) -> tuple[_Names[G] | None, frozenset[str], bool]:
        """Return the index for a filter, the names to find it by, and whether it may pass updates without them."""
        takes_updates = chosen.updates_of is UpdatesOf.ALL
        if chosen.addresses is not None:
            return self._addresses, chosen.addresses, takes_updates
        if chosen.exchanges is not None:
            return self._exchanges, chosen.exchanges, takes_updates
        if chosen.rules is not None:
            return self._rules, chosen.rules, takes_updates
        if chosen.within is not None:
            return self._index_of(chosen.within)  # an event must pass it too
        return None, frozenset(), takes_updates
