"""Which transactions are whales, and everything that is said about one. Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime

from msgspec import Struct, field

from whaled.config.sections import Basis, Detection
from whaled.model import SAT_PER_BTC, Alert, Flow, Market, Shape, Source, Status, Transaction, Whale
from whaled.whales import amounts, fees
from whaled.whales.amounts import btc_to_sat
from whaled.whales.labels import AddressBook, Involved

__all__ = ["Detector", "Rules", "assess", "btc_to_sat", "needs_inputs"]


class Rules(Struct, frozen=True):
    """What a whale is: `threshold_sat` or more (inclusive), of which amount."""

    threshold_sat: int
    basis: Basis = Basis.TOTAL

    @classmethod
    def of(cls, detection: Detection) -> "Rules":
        """Taken from the configuration."""
        return cls(btc_to_sat(detection.threshold_btc), detection.basis)

    @property
    def minimum_sat(self) -> int:
        """No transaction whose outputs add up to less can be a whale: nothing moves more than its outputs."""
        return self.threshold_sat


class Detector:
    """Applies the rules, and remembers which transactions it has been asked about.

    The memory is bounded: beyond `seen_limit` the oldest is forgotten. The event log refuses a second alert anyway, so
    forgetting costs time and never doubles an alert.
    """

    __slots__ = ("_seen", "book", "rules", "seen_limit")

    def __init__(self, rules: Rules, book: AddressBook | None = None, seen_limit: int = 200_000) -> None:
        self.rules = rules
        self.book = book if book is not None else AddressBook()
        self.seen_limit = seen_limit
        self._seen: dict[str, None] = {}

    def with_rules(self, rules: Rules, book: AddressBook) -> "Detector":
        """A detector with other rules that remembers the same transactions (reload).

        What is in the mempool already is judged by the rules of when it came; a lower threshold finds new whales only.
        """
        other = Detector(rules, book, self.seen_limit)
        other._seen = self._seen
        return other

    @property
    def minimum_sat(self) -> int:
        """The least sum of outputs that is worth looking at."""
        return self.rules.minimum_sat

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
            del self._seen[next(iter(self._seen))]
        return True

    def forget(self, txid: str) -> None:
        """Let this transaction be new again."""
        self._seen.pop(txid, None)

    def candidates(self, transactions: Iterable[Transaction]) -> list[Transaction]:
        """Those that may be whales and are new."""
        minimum = self.minimum_sat
        return [found for found in transactions if found.value_sat >= minimum and self.is_new(found.txid)]

    def assess(
        self, transaction: Transaction, *, market: Market, now: float, source: Source, replaces: str | None = None
    ) -> Whale | None:
        """The whale that this transaction is, None if it is none."""
        return assess(
            transaction, rules=self.rules, book=self.book, market=market, now=now, source=source, replaces=replaces
        )


def needs_inputs(transaction: Transaction) -> bool:
    """Whether what this transaction spends is still to be asked for."""
    return amounts.has_unknown_inputs(transaction)


class _Facts(Struct, frozen=True):
    value_sat: int
    moved_sat: int | None
    shape: Shape
    reasons: tuple[str, ...]
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

    Where the basis is what moved and that is unknown because the inputs are, the sum of the outputs decides: who chose
    `moved` wants less noise, but one alert too many can be told by its `moved_sat` null and "moved_unknown" among its
    reasons, and one that is missing cannot be told at all.
    """
    value_sat = transaction.value_sat
    moved_sat = amounts.moved_sat(transaction)
    by_moved = rules.basis is Basis.MOVED
    if (moved_sat if by_moved and moved_sat is not None else value_sat) < rules.threshold_sat:
        return None
    shape, reasons = amounts.shape(transaction)
    if by_moved and moved_sat is None:
        reasons = (*reasons, "moved_unknown")
    involved = book.involved(transaction)
    if shape is Shape.COINJOIN:
        # Its inputs belong to many: who pays whom cannot be told.
        involved = Involved(
            from_labels=involved.from_labels, to_labels=involved.to_labels, addresses=involved.addresses
        )
    facts = _Facts(value_sat, moved_sat, shape, reasons, involved)
    alert = _alert(transaction, facts, market=market, now=now, source=source, replaces=replaces)
    return Whale(alert, _addresses(transaction), transaction.outpoints)


def _alert(
    transaction: Transaction, facts: _Facts, *, market: Market, now: float, source: Source, replaces: str | None
) -> Alert:
    pending = not (transaction.is_confirmed or source is Source.BLOCK)
    involved = facts.involved
    flow_known = involved.flow is not Flow.UNKNOWN
    return Alert(
        transaction_id=transaction.txid,
        btc_value=amounts.sat_to_btc(facts.value_sat),
        value_sat=facts.value_sat,
        moved_sat=facts.moved_sat,
        fee_sat=transaction.fee_sat,
        usd_value=round(facts.value_sat * market.btc_usd / SAT_PER_BTC, 2) if market.btc_usd is not None else None,
        btc_usd=market.btc_usd,
        fee_rate=transaction.fee_rate,
        vsize=transaction.vsize,
        urgency_score=fees.urgency(transaction.fee_rate, market.fees),
        flow_type=involved.flow,
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
        detection_timestamp=datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        status=Status.PENDING if pending else Status.CONFIRMED,
        source=source,
        replaces=replaces,
    )


def _addresses(transaction: Transaction) -> tuple[str, ...]:
    """Every address of the inputs and outputs, once."""
    spent = [entry.prevout for entry in transaction.inputs if entry.prevout is not None]
    return tuple(dict.fromkeys(output.address for output in (*spent, *transaction.outputs) if output.address))
