"""Which transactions are whales, and everything that is said about one. Pure."""

import math
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime

from msgspec import Struct, field
from msgspec.structs import replace

from whaled.config.sections import Basis, Detection
from whaled.model import SAT_PER_BTC, Alert, Flow, Market, Price, Shape, Source, Status, Transaction, Whale
from whaled.whales import amounts, fees, prices, watch
from whaled.whales.amounts import btc_to_sat
from whaled.whales.labels import MIN_FLOW_SHARE, AddressBook, Involved
from whaled.whales.watch import Watch

__all__ = ["Detector", "Rules", "assess", "btc_to_sat", "needs_inputs"]


# No transaction has more; the least amount while no rule can match.
MAX_SAT = amounts.MAX_BTC * SAT_PER_BTC
# A price near 0 makes infinity of any amount of dollars.
BEYOND_SAT = 2**62
# As `matched_rules` names them; rules of the watch list are "watch:" and their name.
BY_BTC = "threshold_btc"
BY_USD = "threshold_usd"


class Rules(Struct, frozen=True):
    """What a whale is: one rule is enough. Thresholds are inclusive; None is no such rule.

    `threshold_sat` and `threshold_usd` are compared with the amount that `basis` names, `watch` with what a label pays
    or receives.
    """

    threshold_sat: int | None = None
    basis: Basis = Basis.TOTAL
    threshold_usd: float | None = None
    watch: tuple[Watch, ...] = ()
    price_max_age_s: float = 7200.0
    min_flow_share: float = MIN_FLOW_SHARE

    @classmethod
    def of(cls, detection: Detection) -> "Rules":
        """Taken from the configuration."""
        return cls(
            threshold_sat=btc_to_sat(detection.threshold_btc) if detection.threshold_btc is not None else None,
            basis=detection.basis,
            threshold_usd=detection.threshold_usd,
            watch=tuple(map(Watch.of, detection.watch)),
            price_max_age_s=detection.price_max_age,
            min_flow_share=detection.min_flow_share,
        )

    def usd_as_sat(self, price: Price | None) -> int | None:
        """The USD threshold in satoshi. None without that rule, and while the price is unknown: it matches nothing."""
        if self.threshold_usd is None or price is None:
            return None
        return math.ceil(min(self.threshold_usd * SAT_PER_BTC / price.usd, BEYOND_SAT))

    def minimum_sat(self, price: Price | None) -> int:
        """The least sum of outputs and fee that is worth looking at: no rule matches a transaction with less.

        Nothing pays, moves or receives more than its inputs, which are its outputs and its fee.
        """
        least = (self.threshold_sat, self.usd_as_sat(price), *(watched.threshold_sat for watched in self.watch))
        return min((each for each in least if each is not None), default=MAX_SAT)


class Detector:
    """Applies the rules, and remembers which transactions it has been asked about.

    The memory is bounded: beyond `seen_limit` the oldest is forgotten, and `forget` is for those that have left the
    mempool. The event log refuses a second alert anyway, so forgetting costs time and never doubles an alert.

    `minimum_sat` is the least sum of outputs and fee (0 where it is unknown) that is worth looking at, at the price
    that `priced` was given last.
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
        # Not a dict: finding its oldest key takes a walk over all that were removed before, 24 ms at worst.
        self._seen: OrderedDict[str, None] = OrderedDict()
        # A canary pays nobody who is watched, and is found while the price is unknown.
        self._canary_rules = rules if rules.threshold_sat is not None else replace(rules, threshold_sat=MAX_SAT)
        self.priced(price)

    def with_rules(self, rules: Rules, book: AddressBook) -> "Detector":
        """A detector with other rules that remembers the same transactions (reload).

        What is in the mempool already is judged by the rules of when it came; a lower threshold finds new whales only.
        """
        other = Detector(rules, book, self.seen_limit, price=self._price)
        other._seen = self._seen
        return other

    def priced(self, price: Price | None) -> None:
        """Compare USD thresholds at this price from now on."""
        self._price = price
        self.minimum_sat = min(self.rules.minimum_sat(price), MAX_SAT)

    @property
    def seen_count(self) -> int:
        """Transactions remembered."""
        return len(self._seen)

    def is_new(self, txid: str) -> bool:
        """Whether this is the first time this transaction is asked about."""
        if txid in self._seen:
            return False
        self._seen[txid] = None
        if len(self._seen) > self.seen_limit:
            self._seen.popitem(last=False)
        return True

    def forget(self, txid: str) -> None:
        """Let this transaction be new again."""
        self._seen.pop(txid, None)

    def candidates(self, transactions: Iterable[Transaction]) -> list[Transaction]:
        """Those that may be whales and are new."""
        minimum = self.minimum_sat
        return [
            found
            for found in transactions
            if found.value_sat + (found.fee_sat or 0) >= minimum and self.is_new(found.txid)
        ]

    def matched(self, transaction: Transaction, market: Market, now: float) -> tuple[str, ...]:
        """The rules that match what is known of a transaction."""
        return _matched(transaction, self.rules, self.book, prices.usable(market, now, self.rules.price_max_age_s))

    def is_open(self, transaction: Transaction) -> bool:
        """Whether a rule that does not match what is known of a transaction may match once its inputs are known."""
        if not amounts.has_unknown_inputs(transaction):
            return False
        if transaction.fee_sat is None:
            return bool(self.rules.watch) or self.rules.basis is Basis.INPUTS
        most_sat = transaction.value_sat + transaction.fee_sat
        return any(watched.threshold_sat <= most_sat for watched in self.rules.watch)

    def assess(
        self, transaction: Transaction, *, market: Market, now: float, source: Source, replaces: str | None = None
    ) -> Whale | None:
        """The whale that this transaction is, None if it is none."""
        return assess(
            transaction, rules=self.rules, book=self.book, market=market, now=now, source=source, replaces=replaces
        )

    @property
    def canary_sat(self) -> int:
        """An amount that `rehearse` finds to be a whale."""
        return MAX_SAT if self.rules.threshold_sat is None else self.rules.threshold_sat

    def rehearse(self, canary: Transaction, *, market: Market, now: float) -> Whale | None:
        """The whale that a canary of `canary_sat` is, whichever rules there are."""
        return assess(canary, rules=self._canary_rules, book=self.book, market=market, now=now, source=Source.LIVE)


def needs_inputs(transaction: Transaction) -> bool:
    """Whether what this transaction spends is still to be asked for."""
    return amounts.has_unknown_inputs(transaction)


def _matched(transaction: Transaction, rules: Rules, book: AddressBook, price: Price | None) -> tuple[str, ...]:
    amount_sat, _ = _amount(transaction, rules.basis)
    by_amount = ((BY_BTC, rules.threshold_sat), (BY_USD, rules.usd_as_sat(price)))
    names = tuple(name for name, least_sat in by_amount if least_sat is not None and amount_sat >= least_sat)
    return names + watch.matched(rules.watch, transaction, book)


def _amount(transaction: Transaction, basis: Basis) -> tuple[int, tuple[str, ...]]:
    """The amount that is compared with the thresholds, and the reason where it is not the one that `basis` names."""
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
    """Everything that is said about a transaction that is a whale, None if it is none.

    Where the amount that the basis names is unknown, the sum of the outputs is compared, and a reason says so. For
    `moved` ("moved_unknown") that is one alert too many rather than one that is missing: who wants less noise can tell
    it. For `inputs` ("inputs_sum_unknown") it is the most that is known: the inputs are never less.
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
        # Its inputs belong to many: who pays whom cannot be told.
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
    """Every address of the inputs and outputs, once."""
    spent = [entry.prevout for entry in transaction.inputs if entry.prevout is not None]
    return tuple(dict.fromkeys(output.address for output in (*spent, *transaction.outputs) if output.address))
