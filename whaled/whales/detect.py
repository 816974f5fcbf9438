"""Whale detection: the rules, the detector's memory of transactions, and the alert for a whale. Pure."""

import math
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime

from msgspec import Struct, field
from msgspec.structs import replace

from whaled.config.sections import Basis, DetectionSettings
from whaled.model import MAX_SAT, SAT_PER_BTC, Alert, Flow, Market, Price, Shape, Source, Status, Transaction, Whale
from whaled.whales import amounts, fees, prices, watch
from whaled.whales.amounts import btc_to_sat
from whaled.whales.labels import MIN_FLOW_SHARE, AddressBook, Involved
from whaled.whales.watch import Watch

# Upper limit for a USD threshold in satoshi: at a price near 0 the quotient may be infinite.
BEYOND_SAT = 2**62
# Names in `matched_rules`; a rule of the watch list has "watch:" followed by its name.
BY_BTC = "threshold_btc"
BY_USD = "threshold_usd"


class Rules(Struct, frozen=True):
    """The rules that make a transaction a whale: one match is enough. Thresholds are inclusive; None disables a rule.

    `threshold_sat` and `threshold_usd` are compared with the amount that `basis` selects, `watch` with the amount that
    a label pays or receives.
    """

    threshold_sat: int | None = None
    basis: Basis = Basis.TOTAL
    threshold_usd: float | None = None
    watch: tuple[Watch, ...] = ()
    price_max_age_s: float = 7200.0
    min_flow_share: float = MIN_FLOW_SHARE

    @classmethod
    def of(cls, detection: DetectionSettings) -> "Rules":
        """Return the rules of a configuration."""
        return cls(
            threshold_sat=btc_to_sat(detection.threshold_btc) if detection.threshold_btc is not None else None,
            basis=detection.basis,
            threshold_usd=detection.threshold_usd,
            watch=tuple(map(Watch.of, detection.watch)),
            price_max_age_s=detection.price_max_age,
            min_flow_share=detection.min_flow_share,
        )

    def usd_as_sat(self, price: Price | None) -> int | None:
        """Return the USD threshold in satoshi; None without that rule or a known price, when it matches nothing."""
        if self.threshold_usd is None or price is None:
            return None
        return math.ceil(min(self.threshold_usd * SAT_PER_BTC / price.usd, BEYOND_SAT))

    def minimum_sat(self, price: Price | None) -> int:
        """Return the least sum of outputs and fee at which a rule can match.

        No transaction pays, moves or receives more than its inputs, whose sum is that of its outputs and its fee.
        """
        least = (self.threshold_sat, self.usd_as_sat(price), *(watched.threshold_sat for watched in self.watch))
        return min((each for each in least if each is not None), default=MAX_SAT)


class Detector:
    """The rules, and the memory of the transactions already examined.

    The memory is bounded: above `seen_limit` the oldest transaction is forgotten, and the caller calls `forget` for
    those that have left the mempool. The event log refuses a second alert for a transaction, so forgetting costs time
    but never duplicates an alert.

    `minimum_sat` is the least sum of outputs and fee (0 if unknown) at which a rule can match, at the price last passed
    to `priced`.
    """

    __slots__ = ("_canary_rules", "_price", "_seen", "book", "minimum_sat", "rules", "seen_limit")

    def __init__(
        self,
        rules: Rules,
        book: AddressBook | None = None,
        seen_limit: int = 200_000,
        *,
        price: Price | None = None,
    ) -> None:
        self.rules = rules
        self.book = book if book is not None else AddressBook()
        self.seen_limit = seen_limit
        # Not a dict: finding its oldest key scans the slots of all keys removed before it, which took up to 24 ms.
        self._seen: OrderedDict[str, None] = OrderedDict()
        # A canary pays no watched label and must match while the price is unknown, so it needs a threshold in BTC.
        self._canary_rules = rules if rules.threshold_sat is not None else replace(rules, threshold_sat=MAX_SAT)
        self.priced(price)

    def with_rules(self, rules: Rules, book: AddressBook) -> "Detector":
        """Return a detector with other rules and the same memory of transactions, for a reload.

        Transactions already in the mempool keep the result of the rules at their arrival; a lower threshold finds only
        new whales.
        """
        other = Detector(rules, book, self.seen_limit, price=self._price)
        other._seen = self._seen
        return other

    def priced(self, price: Price | None) -> None:
        """Set the price at which USD thresholds are compared from now on."""
        self._price = price
        self.minimum_sat = min(self.rules.minimum_sat(price), MAX_SAT)

    @property
    def seen_count(self) -> int:
        """The number of transactions remembered."""
        return len(self._seen)

    def is_new(self, txid: str) -> bool:
        """Return whether a transaction has not been seen before, and remember it."""
        if txid in self._seen:
            return False
        self._seen[txid] = None
        if len(self._seen) > self.seen_limit:
            self._seen.popitem(last=False)
        return True

    def forget(self, txid: str) -> None:
        """Forget a transaction, so that it counts as new again."""
        self._seen.pop(txid, None)

    def candidates(self, transactions: Iterable[Transaction]) -> list[Transaction]:
        """Return the transactions that may be whales and are new."""
        minimum = self.minimum_sat
        return [
            found
            for found in transactions
            if found.value_sat + (found.fee_sat or 0) >= minimum and self.is_new(found.txid)
        ]

    def matched(self, transaction: Transaction, market: Market, now: float) -> tuple[str, ...]:
        """Return the names of the rules that match the known parts of a transaction."""
        return _matched(transaction, self.rules, self.book, prices.usable(market, now, self.rules.price_max_age_s))

    def is_open(self, transaction: Transaction) -> bool:
        """Return whether a rule that does not match yet may match once the inputs of a transaction are known."""
        if not amounts.has_unknown_inputs(transaction):
            return False
        if transaction.fee_sat is None:
            return bool(self.rules.watch) or self.rules.basis is Basis.INPUTS
        most_sat = transaction.value_sat + transaction.fee_sat
        return any(watched.threshold_sat <= most_sat for watched in self.rules.watch)

    def assess(
        self, transaction: Transaction, *, market: Market, now: float, source: Source, replaces: str | None = None
    ) -> Whale | None:
        """Return the whale for a transaction, None if it is not a whale."""
        return assess(
            transaction, rules=self.rules, book=self.book, market=market, now=now, source=source, replaces=replaces
        )

    @property
    def canary_sat(self) -> int:
        """An amount that `rehearse` recognises as a whale."""
        return MAX_SAT if self.rules.threshold_sat is None else self.rules.threshold_sat

    def rehearse(self, canary: Transaction, *, market: Market, now: float) -> Whale | None:
        """Return the whale for a canary of `canary_sat`, whatever the rules."""
        return assess(canary, rules=self._canary_rules, book=self.book, market=market, now=now, source=Source.LIVE)


def needs_inputs(transaction: Transaction) -> bool:
    """Return whether the prevouts of a transaction must still be fetched."""
    return amounts.has_unknown_inputs(transaction)


def _matched(transaction: Transaction, rules: Rules, book: AddressBook, price: Price | None) -> tuple[str, ...]:
    amount_sat, _ = _amount(transaction, rules.basis)
    by_amount = ((BY_BTC, rules.threshold_sat), (BY_USD, rules.usd_as_sat(price)))
    names = tuple(name for name, least_sat in by_amount if least_sat is not None and amount_sat >= least_sat)
    return names + watch.matched(rules.watch, transaction, book)


def _amount(transaction: Transaction, basis: Basis) -> tuple[int, tuple[str, ...]]:
    """Return the amount to compare with the thresholds, and the reason if it is not the one that `basis` selects."""
    if basis is Basis.TOTAL:
        return transaction.value_sat, ()
    by_moved = basis is Basis.MOVED
    amount_sat = amounts.moved_sat(transaction) if by_moved else amounts.inputs_sat(transaction)
    if amount_sat is None:
        return transaction.value_sat, ("moved_unknown" if by_moved else "inputs_sum_unknown",)
    return amount_sat, ()


class _Facts(Struct, frozen=True):
    value_sat: int
    moved_sat: int | None
    shape: Shape
    reasons: tuple[str, ...]
    matched_rules: tuple[str, ...]
    price: Price | None
    involved: Involved = field(default_factory=Involved)


def assess(
    transaction: Transaction,
    *,
    rules: Rules,
    book: AddressBook,
    market: Market,
    now: float,
    source: Source,
    replaces: str | None = None,
) -> Whale | None:
    """Return the whale, with its complete alert, for a transaction; None if it is not a whale.

    If the amount that the basis selects is unknown, the sum of the outputs is compared instead, and a reason states so.
    For `moved` ("moved_unknown") this prefers a superfluous alert, which the reason marks, to a missing one. For
    `inputs` ("inputs_sum_unknown") it is a lower bound: the inputs are never less than the outputs.
    """
    transaction = amounts.with_known_fee(transaction)
    price = prices.usable(market, now, rules.price_max_age_s)
    matched = _matched(transaction, rules, book, price)
    if not matched:
        return None
    shape, reasons = amounts.shape(transaction, one_payer=book.is_one_payer(transaction))
    reasons += _amount(transaction, rules.basis)[1]
    involved = book.involved(transaction, min_share=rules.min_flow_share)
    if shape is Shape.COINJOIN:
        # The inputs of a coinjoin have several owners, so the flow between them is unknown.
        involved = Involved(
            from_labels=involved.from_labels,
            to_labels=involved.to_labels,
            from_other_labels=involved.from_other_labels,
            to_other_labels=involved.to_other_labels,
            addresses=involved.addresses,
        )
    moved_sat = amounts.moved_sat(transaction)
    facts = _Facts(transaction.value_sat, moved_sat, shape, reasons, matched, price, involved)
    alert = _alert(transaction, facts, market=market, now=now, source=source, replaces=replaces)
    return Whale(alert, _addresses(transaction), transaction.outpoints)


def _alert(
    transaction: Transaction, facts: _Facts, *, market: Market, now: float, source: Source, replaces: str | None
) -> Alert:
    pending = not (transaction.is_confirmed or source is Source.BLOCK)
    involved, price = facts.involved, facts.price
    flow_known = involved.flow is not Flow.UNKNOWN
    return Alert(
        transaction_id=transaction.txid,
        btc_value=amounts.sat_to_btc(facts.value_sat),
        value_sat=facts.value_sat,
        moved_sat=facts.moved_sat,
        fee_sat=transaction.fee_sat,
        usd_value=prices.usd_of(facts.value_sat, price) if price is not None else None,
        btc_usd=price.usd if price is not None else None,
        fee_rate=transaction.fee_rate,
        vsize=transaction.vsize,
        urgency_score=fees.urgency(transaction.fee_rate, market.fees),
        flow_type=involved.flow,
        flow_sat=involved.flow_sat,
        exchange_addresses=involved.addresses,
        confidence_score=involved.confidence if flow_known else None,
        from_labels=involved.from_labels,
        to_labels=involved.to_labels,
        shape=facts.shape,
        reasons=facts.reasons,
        input_count=len(transaction.inputs),
        output_count=len(transaction.outputs),
        rbf_enabled=amounts.signals_rbf(transaction),
        predicted_confirmation_block=fees.predicted_block(transaction.fee_rate, market.projected, market.tip_height)
        if pending
        else None,
        detection_timestamp=_iso(now),
        status=Status.PENDING if pending else Status.CONFIRMED,
        source=source,
        replaces=replaces,
        price_timestamp=_iso(price.at) if price is not None else None,
        matched_rules=facts.matched_rules,
        from_other_labels=involved.from_other_labels,
        to_other_labels=involved.to_other_labels,
    )


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _addresses(transaction: Transaction) -> tuple[str, ...]:
    """Return every address of the inputs and outputs, each once."""
    spent = [entry.prevout for entry in transaction.inputs if entry.prevout is not None]
    return tuple(dict.fromkeys(output.address for output in (*spent, *transaction.outputs) if output.address))
