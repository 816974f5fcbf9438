"""The operator's address book, and the flow of a transaction's money according to it. Pure."""

from collections.abc import Iterable, Sequence
from itertools import islice

from msgspec import Struct, field

from whaled.model import Flow, Output, OwnerType, Transaction
from whaled.whales import bookkeys, books
from whaled.whales.amounts import has_unknown_inputs, input_scripts, is_spendable
from whaled.whales.owners import Owner, Owners

# Confidence factor for a side that has unlabelled addresses: these may still belong to an owner in the book.
UNLABELLED_WEIGHT = 0.8
# Minimum share of a flow in the amount that leaves its payers (`detection.min_flow_share`). It must also be at least
# WHOLE_SHARE times this share of all outputs, so that a tiny amount is not a flow even if all the rest is known change.
MIN_FLOW_SHARE = 0.1
WHOLE_SHARE = 0.1


# Limit on further labels in an alert: a batch may pay thousands of addresses, each with `owners.MAX_LABELS` labels.
MAX_OTHER_LABELS = 32
# Owners at which arriving coins can be sold at once: coins that arrive are inflow, coins that leave are outflow.
EXCHANGE_LIKE = frozenset({OwnerType.EXCHANGE, OwnerType.CUSTODIAN})


class Involved(Struct, frozen=True, kw_only=True):
    """The flow and labels of a transaction according to the address book.

    `flow_sat` (the amount that flows) and `confidence` are None if `flow` is unknown.
    """

    flow: Flow = Flow.UNKNOWN
    flow_sat: int | None = None
    confidence: float | None = None
    from_labels: tuple[str, ...] = ()
    to_labels: tuple[str, ...] = ()
    from_other_labels: tuple[str, ...] = ()
    to_other_labels: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


class _Found(Struct, frozen=True):
    """A flow, its amount and its confidence."""

    flow: Flow = Flow.UNKNOWN
    flow_sat: int | None = None
    confidence: float | None = None

    @property
    def sat(self) -> int:
        return self.flow_sat or 0


class AddressBook(Struct, frozen=True):
    """The owners of addresses. An empty book makes every flow unknown."""

    owners: Owners = field(default_factory=Owners)

    @classmethod
    def parse(cls, text: str, source: str) -> "AddressBook":
        """Parse a book from CSV text with three columns, `label,address,type` (`books.parse`). Raises BookError."""
        return cls(books.parse(text.splitlines(keepends=True), source))

    def owner(self, output: Output | None) -> Owner | None:
        """Return the first owner of an output, None if it is not in the book."""
        if output is None:
            return None
        if output.address is not None:
            owner = self.owners.get(output.address)
            if owner is not None:
                return owner
        return self.owners.get(bookkeys.of_script(output.script)) if self.owners.has_scripts else None

    def owners_of(self, output: Output | None) -> tuple[Owner, ...]:
        """Return all owners of an output in the order of their lines."""
        owner = self.owner(output)
        if owner is None or output is None or not self.owners.several:
            return () if owner is None else (owner,)
        found = self.owners.all(output.address) if output.address is not None else ()
        return found or self.owners.all(bookkeys.of_script(output.script))

    def _other_labels(self, outputs: Sequence[Output | None]) -> tuple[str, ...]:
        """Return labels other than the first ones, at most MAX_OTHER_LABELS."""
        if not self.owners.several:
            return ()
        first = {owner.label for owner in self._owners_of(outputs)}
        labels = (owner.label for output in outputs for owner in self.owners_of(output) if owner.label not in first)
        return tuple(islice(dict.fromkeys(labels), MAX_OTHER_LABELS))

    def is_one_payer(self, transaction: Transaction) -> bool:
        """Return whether all inputs are known to belong to one label."""
        labels = {
            owner.label if (owner := self.owner(spent.prevout)) is not None else None for spent in transaction.inputs
        }
        return len(labels) == 1 and None not in labels

    def involved(self, transaction: Transaction, *, min_share: float = MIN_FLOW_SHARE) -> Involved:
        """Return the flow of a transaction, its amount, and the labels of both sides.

        Exchange-like owners are exchanges and custodians. Change, that is, an output to the script of an input or to a
        label that also pays, is ignored unless there is no other output.

        - inflow: no exchange-like owner pays, and at least one is paid. `flow_sat` is the amount that these receive.
        - outflow: an exchange-like owner pays, and at least half of what leaves goes to other owners. `flow_sat` is the
          amount that those receive, but at most the amount that the exchange-like payers give.
        - internal: all but a negligible amount stays with the labels that pay, or most of what leaves an exchange-like
          owner goes to another one. `flow_sat` is the amount that the other receives, or that the payers receive at
          scripts that did not pay.
        - unknown: anything else. Always if the inputs are unknown, because an output to an exchange may as well be the
          change of a withdrawal. Also if the flow is less than `min_share` of what leaves, or less than a tenth of
          `min_share` of all outputs: a negligible amount to an exchange does not characterise a whale.

        `confidence` is the share of the inputs' value times the share of the outputs' value for which the flow holds,
        times 0.8 for an inflow whose payers are not all labelled and for an outflow whose receivers all lack a label.
        """
        payers = [spent.prevout for spent in transaction.inputs]
        own = input_scripts(transaction)
        paid = [output for output in transaction.outputs if output.script not in own] or list(transaction.outputs)
        from_owners = self._owners_of(payers)
        found = _Found()
        if self.owners and not has_unknown_inputs(transaction):
            spent = [payer for payer in payers if payer is not None]
            found = self._flow(spent, [output for output in transaction.outputs if is_spendable(output)], min_share)
        everything = (*payers, *transaction.outputs)
        labelled = (output.address for output in everything if output is not None and self.owner(output) is not None)
        return Involved(
            flow=found.flow,
            flow_sat=found.flow_sat,
            confidence=round(found.confidence, 4) if found.confidence is not None else None,
            from_labels=_labels(from_owners),
            to_labels=_labels(self._owners_of(paid)),
            from_other_labels=self._other_labels(payers),
            to_other_labels=self._other_labels(paid),
            addresses=tuple(dict.fromkeys(address for address in labelled if address is not None)),
        )

    def _flow(self, payers: list[Output], outputs: list[Output], min_share: float) -> "_Found":
        """Return the flow from known inputs to outputs that are payments."""
        paying = {owner.label for owner in self._owners_of(payers)}
        scripts = {payer.script for payer in payers}
        total_in = sum(payer.value for payer in payers)
        total = sum(output.value for output in outputs)
        if not total_in or not total:
            return _Found()
        moved = [output for output in outputs if output.script not in scripts]
        leaving = [output for output in moved if (owner := self.owner(output)) is None or owner.label not in paying]
        left = sum(output.value for output in leaving)
        least_sat = max(1, int(min_share * WHOLE_SHARE * total))
        labelled_share = sum(payer.value for payer in payers if self.owner(payer) is not None) / total_in
        if left < least_sat:
            if not paying or labelled_share < min_share:
                return _Found()
            return _Found(Flow.INTERNAL, sum(output.value for output in moved) - left, labelled_share)
        exchange_in = self._exchange_like_sat(payers)
        exchange_out = self._exchange_like_sat(leaving)
        to_share = exchange_out / left
        if not exchange_in:
            weight = 1.0 if labelled_share == 1 else UNLABELLED_WEIGHT
            found = _Found(Flow.INFLOW, exchange_out, to_share * weight)
        else:
            from_share = exchange_in / total_in
            # What the exchange-like payers give, without what they receive back.
            given = exchange_in - self._exchange_like_sat(
                output for output in outputs if (owner := self.owner(output)) is not None and owner.label in paying
            )
            if to_share > 0.5:
                found = _Found(Flow.INTERNAL, min(given, exchange_out), from_share * to_share)
            else:
                is_labelled = any(self.owner(output) is not None for output in leaving)
                weight = 1.0 if is_labelled else UNLABELLED_WEIGHT
                confidence = from_share * (1.0 - to_share) * weight
                found = _Found(Flow.OUTFLOW, min(given, left - exchange_out), confidence)
        return found if found.sat >= max(least_sat, int(min_share * left)) else _Found()

    def _exchange_like_sat(self, outputs: Iterable[Output]) -> int:
        return sum(
            output.value
            for output in outputs
            if (owner := self.owner(output)) is not None and owner.type in EXCHANGE_LIKE
        )

    def _owners_of(self, outputs: Iterable[Output | None]) -> list[Owner]:
        return [owner for output in outputs if (owner := self.owner(output)) is not None]


def _labels(owners: Iterable[Owner]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(owner.label for owner in owners))
