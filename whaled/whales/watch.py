"""The watch list: rules for owners of the address book, each with its own threshold. Pure."""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from msgspec import Struct

from whaled.config.sections import WatchRule
from whaled.errors import Fault
from whaled.model import Output, OwnerType, Transaction
from whaled.whales.amounts import btc_to_sat
from whaled.whales.labels import AddressBook
from whaled.whales.owners import Owner

# Maximum number of labels compared with an unknown one to find a similar label: more would take seconds.
HINTS_LIMIT = 1_000
# Prefix of a rule's name in `matched_rules`, followed by a colon.
WATCH = "watch"


class Watch(Struct, frozen=True):
    """A rule that matches if an owner with one of the labels or types pays or receives at least `threshold_sat`.

    The amount is that of one label: the sum of its inputs, or of its outputs if that is greater. Change counts.
    """

    name: str
    labels: frozenset[str]
    types: frozenset[OwnerType]
    threshold_sat: int = 0

    @classmethod
    def of(cls, rule: WatchRule) -> "Watch":
        """Return the rule of a configuration."""
        return cls(rule.name, frozenset(rule.labels), frozenset(rule.types), btc_to_sat(rule.threshold_btc))

    def concerns(self, owner: Owner) -> bool:
        """Return whether an owner is watched."""
        return owner.label in self.labels or owner.type in self.types

    def matches(self, *sides: Sequence[tuple[Owner, int]]) -> bool:
        """Return whether one label reaches the threshold on one side, inputs or outputs."""
        for side in sides:
            amounts: Counter[str] = Counter()
            for owner, value_sat in side:
                if self.concerns(owner):
                    amounts[owner.label] += value_sat
            if any(amount_sat >= self.threshold_sat for amount_sat in amounts.values()):
                return True
        return False


def matched(watches: Sequence[Watch], transaction: Transaction, book: AddressBook) -> tuple[str, ...]:
    """Return the rules that match the known parts of a transaction, by their names in `matched_rules`."""
    if not watches:
        return ()
    received = _owned(transaction.outputs, book)
    paid = _owned((spent.prevout for spent in transaction.inputs), book)
    if not (received or paid):
        return ()
    return tuple(f"{WATCH}:{watch.name}" for watch in watches if watch.matches(paid, received))


def faults(rules: Sequence[WatchRule], book: AddressBook, source: str) -> Iterator[Fault]:
    """Yield a fault for each watched label that the address book lacks. `source` is the name of its file."""
    hints: list[str] | None = None
    for index, rule in enumerate(rules):
        for place, label in enumerate(rule.labels):
            if not book.owners.has_label(label):
                if hints is None:
                    hints = list(islice(book.owners.each_label(), HINTS_LIMIT))
                near = difflib.get_close_matches(label, hints, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                yield Fault(f"detection.watch[{index}].labels[{place}]", f"no label {label!r} in {source}{hint}")


def idle(rules: Sequence[WatchRule], book: AddressBook, source: str) -> Iterator[Fault]:
    """Yield a fault for each rule with types that no address has: they match nothing, until another book has them."""
    for index, rule in enumerate(rules):
        missing = [str(kind) for kind in rule.types if not book.owners.has_type(kind)]
        if missing:
            problem = (
                f"no address in {source} has the type {' or '.join(missing)}: that part of the rule matches nothing"
            )
            yield Fault(f"detection.watch[{index}].types", problem)


def _owned(outputs: Iterable[Output | None], book: AddressBook) -> list[tuple[Owner, int]]:
    return [(owner, output.value) for output in outputs if output is not None for owner in book.owners_of(output)]
