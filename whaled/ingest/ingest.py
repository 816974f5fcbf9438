"""Detection: changes of the mempool in, drafts of events out.

Pure: it takes `now`, and what the event log holds, as arguments. The draft of an alert needs no history, because the
event log takes the alert of a whale once.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from whaled.model import Draft, Market, Source, Transaction, Whale
from whaled.source import MempoolChange
from whaled.whales import lifecycle, prices
from whaled.whales.detect import Detector
from whaled.whales.lifecycle import History, Origin


class Ingest:
    """The rules, and the market that they need. `detector` may be replaced between two messages."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.market = Market()

    def observe(self, change: MempoolChange) -> None:
        """Update the market from a change."""
        self.market = _updated(self.market, change)
        if change.price is not None:
            self.detector.priced(self.market.price)

    @property
    def minimum_sat(self) -> int:
        """The least sum of outputs and fee, in satoshi, that a rule can match."""
        return self.detector.minimum_sat

    def is_usd_rule_blind(self, now: float) -> bool:
        """Return whether `detection.threshold_usd` matches nothing because the price is unknown or too old."""
        rules = self.detector.rules
        return rules.threshold_usd is not None and prices.usable(self.market, now, rules.price_max_age_s) is None

    def assess(
        self, transaction: Transaction, *, source: Source, now: float, market: Market, replaces: str | None = None
    ) -> Whale | None:
        """Return the whale that the rules in force make of this transaction, None if no rule matches."""
        return self.detector.assess(transaction, market=market, now=now, source=source, replaces=replaces)

    def candidates(self, change: MempoolChange, now: float) -> tuple[list[Transaction], list[Transaction]]:
        """Return the new transactions that a rule matches now, and those that a rule may match by their inputs."""
        matching: list[Transaction] = []
        undecided: list[Transaction] = []
        for transaction in self.detector.candidates(change.entered.at_least(self.detector.minimum_sat)):
            if self.detector.matched(transaction, self.market, now):
                matching.append(transaction)
            elif self.detector.is_open(transaction):
                undecided.append(transaction)
        return matching, undecided

    def whales(self, transactions: Iterable[Transaction], change: MempoolChange, now: float) -> list[Whale]:
        """Return the whales among transactions of a change, whose inputs are known as far as they can be."""
        found = (
            self.assess(each, source=Source.LIVE, now=now, market=self.market, replaces=change.predecessor(each.txid))
            for each in transactions
        )
        return [whale for whale in found if whale is not None]

    def rehearsed(self, change: MempoolChange, now: float) -> list[Draft]:
        """Return the alerts of a canary's change. Nothing of it is remembered."""
        drafts: list[Draft] = []
        for transaction in self.detector.candidates(change.entered.at_least(self.detector.minimum_sat)):
            self.detector.forget(transaction.txid)
            whale = self.detector.rehearse(transaction, market=self.market, now=now)
            if whale is not None:
                drafts.append(lifecycle.alerted(whale, now))
        return drafts

    def forget(self, txid: str) -> None:
        """Forget a transaction that the stream does not send again."""
        self.detector.forget(txid)


def touched(change: MempoolChange) -> list[str]:
    """Return the transactions whose outcome a change may report; the log knows the whales among them."""
    found = [*change.mined, *(replacement.replaced for replacement in change.replaced)]
    return found + list(change.removed) if change.entered.added else found


def left_without_reason(change: MempoolChange, known: Mapping[str, Whale]) -> list[str]:
    """Return the whales that left together with arrivals, and whose replacement the change does not report."""
    if not change.entered.added:
        return []
    reported = {replacement.replaced for replacement in change.replaced}
    return [txid for txid in change.removed if txid in known and txid not in reported]


def outcomes(known: Mapping[str, Whale], change: MempoolChange, now: float) -> list[Draft]:
    """Return the outcomes that a change reports for these whales."""
    drafts = [
        lifecycle.replaced(known[replacement.replaced], replacement.by, now)
        for replacement in change.replaced
        if replacement.replaced in known
    ]
    block = change.block
    if block is not None:
        drafts += [lifecycle.confirmed(known[txid], block, now) for txid in change.mined if txid in known]
    return drafts


def unreported_replacements(
    known: Mapping[str, Whale], outpoints: Mapping[str, Sequence[str]], change: MempoolChange, now: float
) -> list[Draft]:
    """Return the replacements within a change that the backend does not report as such.

    The backend expects the new transaction to pay a higher fee by itself, which the parent of a package does not.
    `outpoints` are those that the whales spend which `left_without_reason`.
    """
    spent = {outpoint: txid for txid, found in outpoints.items() for outpoint in found}
    if not spent:
        return []
    by = {spent[outpoint]: spender for outpoint, spender in change.entered.spending(spent).items()}
    return [lifecycle.replaced(known[txid], spender, now) for txid, spender in by.items() if spender != txid]


def valid(reported: Sequence[Draft], inferred: Sequence[Draft], histories: Mapping[str, History]) -> list[Draft]:
    """Return the outcomes that may follow the events in the log: those inferred from conflicts, and those reported.

    Reports of what the log has already are among them: whether a whale is there decides about its conflicts, also if
    its outcome is not new.
    """
    return [
        *lifecycle.valid(inferred, histories, Origin.POLLED),
        *lifecycle.valid(reported, histories, Origin.STREAM, with_repeated=True),
    ]


def _updated(market: Market, change: MempoolChange) -> Market:
    """Return the market after a change; values that it does not contain stay as they are."""
    fields: dict[str, object] = {}
    if change.fees is not None:
        fields["fees"] = change.fees
    if change.projected is not None:
        fields["projected"] = change.projected
    if change.price is not None:
        fields["price"] = prices.received(market.price, change.price.usd, change.price.stated_at, change.received_at)
    heights = [block.height for block in (*(change.blocks or ()), *((change.block,) if change.block else ()))]
    if heights:
        fields["tip_height"] = max(heights)
    return replace(market, **fields) if fields else market
