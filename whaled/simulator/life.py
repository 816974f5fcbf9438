"""The random events of a world: arrivals, replacements, children, blocks, and unexpected transactions in blocks.

Events are in a heap ordered by time, and random numbers are drawn when an event happens. So the course of a world does
not depend on how often `advance` is called.
"""

from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count

from whaled.model import SAT_PER_BTC
from whaled.simulator.market import Fees
from whaled.simulator.transactions import ImpossibleError, Tx, TxKind
from whaled.simulator.world import World

_KINDS = {
    TxKind.PAYMENT: 62,
    TxKind.CHANGE_TO_SELF: 8,
    TxKind.TINY_PAYMENT: 5,
    TxKind.SELF_TRANSFER: 4,
    TxKind.CONSOLIDATION: 6,
    TxKind.BATCH: 7,
    TxKind.COINJOIN: 2,
    TxKind.OP_RETURN: 4,
    TxKind.ALL_SCRIPTS: 2,
}
# Probability that something happens to a transaction later, with `events` at 1. It is higher for whales, since tests
# watch them.
TROUBLE_OF_WHALES = 0.15
TROUBLE_OF_OTHERS = 0.05
# Probability that a block contains a surprise (see `_surprise`), and that the chain reorganises instead.
SURPRISE = 0.3
REORG = 0.01
# Log-normal amounts of the other transactions: median in BTC, and sigma of the logarithm.
USUAL_BTC = 0.03
USUAL_SPREAD = 1.8
# Maximum time between blocks, in block intervals. The exponential distribution has none.
LONGEST_WAIT = 5.0
# Recommended fees are reused for this long: computing them takes a millisecond per thousand transactions.
FEES_LAST_S = 5.0
# Relative numbers of whales that pay the minimum, economy, hour, half-hour and fastest fee, and twice the fastest.
HURRY = (1, 1, 2, 3, 3, 2)


class Life:
    """The random events of a world, according to its settings."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._settings = world.settings
        self._rng = world.rng
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._threshold = round(self._settings.whale_btc * SAT_PER_BTC)
        self._fees: Fees | None = None
        self._fees_until = 0.0
        for _ in range(self._settings.backlog):
            with suppress(ImpossibleError):
                self._other()
        if self._settings.rate > 0:
            self._later(self._rng.expovariate(self._settings.rate), self._arrive)
        if self._settings.block_interval > 0:
            self._later(self._wait_for_block(), self._find_block)
        if world.usd is not None:
            self._later(self._settings.price_interval, self._drift)

    def advance(self, now: float) -> None:
        """Process all events that are due by `now`."""
        while self._events and self._events[0][0] <= now:
            at, _, happen = heappop(self._events)
            self._world.now = max(self._world.now, at)
            try:
                happen()
            except ImpossibleError:
                # The event has become impossible, such as a replacement of a transaction that has been mined.
                continue
        self._world.now = max(self._world.now, now)

    def _later(self, seconds: float, happen: Callable[[], None]) -> None:
        heappush(self._events, (self._world.now + seconds, next(self._order), happen))

    def _drift(self) -> None:
        self._later(self._settings.price_interval, self._drift)
        if self._world.usd is not None:
            self._world.usd = max(1, round(self._world.usd * self._rng.lognormvariate(0, 0.004)))

    # --- transactions ---

    def _arrive(self) -> None:
        self._later(self._rng.expovariate(self._settings.rate), self._arrive)
        is_whale = self._rng.random() < self._settings.whale_share
        tx = self._whale() if is_whale else self._other()
        trouble = TROUBLE_OF_WHALES if is_whale else TROUBLE_OF_OTHERS
        if self._rng.random() < trouble * self._settings.events:
            self._trouble(tx)

    def _whale(self) -> Tx:
        if self._rng.random() < 0.02:
            return self._world.pay(self._threshold)
        least = int(self._threshold * (1 + min(200.0, self._rng.lognormvariate(-0.7, 1.3))))
        return self._world.transact(self._any_kind(), least, at_most=least * 5 // 4, rate=self._rate_in_a_hurry())

    def _rate_in_a_hurry(self) -> float | None:
        """Return a recommended rate for a random urgency, None (any rate) without a fee market."""
        if not self._settings.backlog:
            return None
        if self._fees is None or self._world.now >= self._fees_until:
            self._fees, self._fees_until = self._world.recommended(), self._world.now + FEES_LAST_S
        fees = self._fees
        aims = (fees.minimum, fees.economy, fees.hour, fees.half_hour, fees.fastest, fees.fastest * 2)
        return self._rng.choices(aims, HURRY)[0] * self._rng.uniform(1.0, 1.15)

    def _other(self) -> Tx:
        if self._rng.random() < 0.002:
            return self._world.pay(self._threshold - 1)
        # Well below the threshold: a coin may be half as large again, and its change must not make this a whale.
        most = self._threshold * 9 // 10
        usual = int(self._rng.lognormvariate(0, USUAL_SPREAD) * USUAL_BTC * SAT_PER_BTC)
        least = min(max(usual, 100_000), most // 2)
        return self._world.transact(self._any_kind(), least, at_most=min(most, least * 3 // 2))

    def _any_kind(self) -> TxKind:
        return self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]

    def _trouble(self, tx: Tx) -> None:
        soon, poll = self._rng.uniform(0, 0.02), self._settings.poll_interval
        later = self._rng.uniform(0.5, 4) * poll
        match self._rng.randrange(8):
            case 0:  # replaced within one poll: the stream usually never contains the first one
                self._later(soon, lambda: self._replace(tx.txid, 0))
            case 1:
                self._later(later, lambda: self._replace(tx.txid, 0))
            case 2:  # replaced again and again
                self._later(later, lambda: self._replace(tx.txid, self._rng.randint(1, 3)))
            case 3:
                self._later(later, lambda: self._act(self._world.cancel, tx.txid))
            case 4:  # a child pays for its parent
                rate = tx.rate * 3 + 5
                self._later(later, lambda: self._act(lambda txid: self._world.spend(txid, rate=rate), tx.txid))
            case 5:
                self._later(later, lambda: self._replace_by_package(tx.txid))
            case 6:  # replaced, and sent again once its coin is free
                self._later(later, lambda: self._displace(tx))
            case _:  # a child is evicted with its parent
                self._later(soon, lambda: self._act(self._world.spend, tx.txid))
                self._later(later, lambda: self._replace(tx.txid, 0))

    def _replace(self, txid: str, more: int) -> None:
        newer = self._world.replace(txid)
        if more:
            wait = self._rng.uniform(0.5, 4) * self._settings.poll_interval
            self._later(wait, lambda: self._replace(newer.txid, more - 1))

    def _replace_by_package(self, txid: str) -> None:
        self._world.replace_by_package(txid)

    def _displace(self, tx: Tx) -> None:
        wide = self._world.displace(tx.txid)
        wait = self._rng.uniform(0.5, 3) * self._settings.poll_interval
        self._later(wait, lambda: self._act(self._world.release, wide.txid))
        self._later(wait * self._rng.uniform(1, 2), lambda: self._come_back(tx))

    def _come_back(self, tx: Tx) -> None:
        self._world.send(tx)

    def _act(self, act: Callable[[str], Tx], txid: str) -> None:
        act(txid)

    # --- blocks ---

    def _wait_for_block(self) -> float:
        mean = self._settings.block_interval
        return min(self._rng.expovariate(1 / mean), mean * LONGEST_WAIT)

    def _find_block(self) -> None:
        self._later(self._wait_for_block(), self._find_block)
        if self._rng.random() < REORG * self._settings.events:
            self._world.reorg(self._rng.randint(1, 3))
            return
        extra = self._surprise() if self._rng.random() < SURPRISE * self._settings.events else []
        self._world.mine(extra)

    def _surprise(self) -> list[Tx]:
        """Return transactions for a block that the stream reports late or not at all."""
        amount = int(self._threshold * self._rng.uniform(1, 3))
        match self._rng.randrange(6):
            case 0:  # sent immediately before the block
                self._world.pay(amount, rate=250.0)
                return []
            case 1:
                return [self._world.pay(amount, relay=False)]
            case 2:  # from 13 inputs on, a page of the block lacks the fee; from 14 on, also some prevouts
                return [self._world.gather(amount, self._rng.randint(12, 16), relay=False)]
            case 3:  # a client does not request more than 100 prevouts one by one
                return [self._world.gather(amount, self._rng.randint(99, 130), relay=False)]
            case 4:  # outputs of every script type, including anchor, bare multisig and OP_RETURN
                return [self._world.transact(TxKind.ALL_SCRIPTS, amount, relay=False)]
            case _:
                waiting = [record.txid for record in self._world.truth.whales()[-20:] if record.fate == "pending"]
                whole = self._rng.random() < 0.5
                return [self._world.rival(self._rng.choice(waiting), whole=whole)] if waiting else []
