"""The simulated Bitcoin: wallets, a node's mempool, a chain, and the ground truth.

A world changes only by calls: from `life.Life` (random events), from tests and from faults. The same seed and the same
calls give the same world.
"""

from collections.abc import Collection, Iterable
from random import Random
from statistics import median

from whaled.model import SAT_PER_BTC
from whaled.simulator.chain import Block, Chain, Leaving
from whaled.simulator.market import Fees, Seen, project, recommend
from whaled.simulator.owners import Owners
from whaled.simulator.scripts import Network, Scripts, ScriptType
from whaled.simulator.serial import assemble, header, merkle_root, twice
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.transactions import FINAL, Ids, ImpossibleError, Payment, Tx, TxKind
from whaled.simulator.truth import Truth
from whaled.simulator.wallets import FEE_BUDGET, MAX_RATE, Wallets

# Initial blocks, which have only a coinbase. A backend shows the last 8.
FIRST_BLOCKS = 12
# A reorganisation leaves this many blocks below it unchanged, so that a backend can find the common ancestor.
UNTOUCHED_BLOCKS = 9
# Logarithm of the median fee rate: 4.5 sat/vB, and 20 with a backlog. A backlog consists of the cheapest transactions,
# so rates must be well above the minimum for the recommended fees to differ.
QUIET_RATE, BUSY_RATE = 1.5, 3.0
# The recommended fees depend on this many projected blocks.
PRICED_BLOCKS = 3
# Difficulty targets: the easiest possible on regtest, a typical one on mainnet.
BITS = {Network.REGTEST: 0x207FFFFF, Network.MAINNET: 0x1702905C}


class World:
    """A mempool and a chain. `now` is the time of the next event. Amounts are in satoshi."""

    def __init__(self, settings: SimulatorSettings, now: float) -> None:
        self.settings = settings
        self.now = now
        self.usd = settings.usd
        self.rng = Random(settings.seed)  # noqa: S311 -- a reproducible world, nothing secret
        self._ids = Ids(settings.seed)
        self._scripts = Scripts(settings.network, self.rng)
        self.chain = Chain(settings.keep_blocks, settings.mempool_limit, self._on_leave)
        self.truth = Truth(round(settings.whale_btc * SAT_PER_BTC), settings.truth_limit)
        owners = Owners(settings.network, self.rng, settings.owner_share)
        self.wallets = Wallets(self._scripts, self._ids, self.rng, self.chain.is_spendable, owners)
        pace = settings.block_interval or 600.0
        for place in range(FIRST_BLOCKS):
            self.now = now - pace * (FIRST_BLOCKS - place)
            self._connect(())
        self.now = now

    # --- sending ---

    def send(self, tx: Tx) -> Tx:
        """Send a transaction to the node's mempool. Raises ImpossibleError if the node refuses it."""
        if not self.chain.accept(tx):
            self.truth.note(tx)
            raise ImpossibleError(
                f"the mempool refuses {tx.txid}: its coins are spent, or it pays too little to replace"
            )
        self.truth.pending(tx, self.now)
        self.chain.trim()
        return tx

    def pay(self, sat: int, *, rate: float | None = None, relay: bool = True) -> Tx:
        """Make a payment whose outputs sum to exactly `sat`. With `relay` False it is only for a miner: see `mine`."""
        kind = TxKind.EXACT if relay else TxKind.UNRELAYED
        tx = self.wallets.exact(sat, rate or self.usual_rate(), self.now, kind)
        return self.send(tx) if relay else self._keep_back(tx)

    def transact(
        self, kind: TxKind, sat: int, *, at_most: int | None = None, rate: float | None = None, relay: bool = True
    ) -> Tx:
        """Make a transaction of a kind whose outputs sum to at least `sat` (and at most `at_most`)."""
        least = sat + FEE_BUDGET
        tx = self.wallets.make(kind, least, max(least, at_most or sat * 3), rate or self.usual_rate(), self.now)
        return self.send(tx) if relay else self._keep_back(tx)

    def gather(self, sat: int, inputs: int, *, rate: float | None = None, relay: bool = True) -> Tx:
        """Make a transaction of many inputs into one output of exactly `sat`."""
        kind = TxKind.CONSOLIDATION if relay else TxKind.UNRELAYED
        tx = self.wallets.gather(sat, inputs, rate or self.usual_rate(), self.now, kind)
        return self.send(tx) if relay else self._keep_back(tx)

    def replace(self, txid: str, *, rate: float | None = None) -> Tx:
        """Replace a transaction by the same payment with a higher fee. Its descendants leave with it."""
        old = self._pending(txid)
        return self.send(self.wallets.replacement(old, rate or old.rate * 1.5 + 1, self.now, self._fees_above(old)))

    def cancel(self, txid: str) -> Tx:
        """Replace a transaction by one that returns an input to its owner."""
        old = self._pending(txid)
        return self.send(self.wallets.takeback(old, self._fees_above(old), self.now))

    def spend(self, txid: str, *, rate: float | None = None) -> Tx:
        """Make a child that spends the largest output of a transaction: CPFP if its rate is high."""
        parent = self._pending(txid)
        coins = [coin for coin in parent.coins() if self.chain.spender(coin.outpoint) is None]
        if not coins:
            raise ImpossibleError(f"{txid} has no output left to spend")
        coin = max(coins, key=lambda each: each.value)
        return self.send(self.wallets.child(coin, rate or self.usual_rate(), self.now))

    def replace_by_package(self, txid: str) -> tuple[Tx, Tx]:
        """Replace a transaction by a parent that pays less, and a child that pays for both (package RBF).

        A backend pairs only with a higher fee, so it does not report this replacement.
        """
        old = self._pending(txid)
        # Parents in this world always pay a fee. Half the old rate suffices for the backend not to find the pair.
        parent = self.wallets.resent(old, max(0.1, old.rate / 2), self.now, TxKind.PACKAGE)
        vsize = self.wallets.child(parent.coins()[0], 1.0, self.now).vsize
        needed = self._fees_above(old) + (old.rate + 1) * (parent.vsize + vsize)
        child = self.wallets.child(parent.coins()[0], needed / vsize, self.now)
        if not self.chain.accept_package(parent, child):
            raise ImpossibleError(f"the mempool refuses a package in the place of {txid}")
        for tx in (parent, child):
            self.truth.pending(tx, self.now)
        return parent, child

    def displace(self, txid: str) -> Tx:
        """Replace a transaction by one that also spends another coin: the first step of replacement cycling."""
        old = self._pending(txid)
        return self.send(self.wallets.widened(old, self._fees_above(old), self.now))

    def release(self, txid: str) -> Tx:
        """Replace the result of `displace` by one that does not spend the first coin; then `send` the old one again."""
        return self.send(self.wallets.narrowed(self._pending(txid), self.now))

    def rival(self, txid: str, *, whole: bool = False) -> Tx:
        """Make a double spend for `mine`, without sending it. With `whole` it spends all inputs, to another owner."""
        old = self._pending(txid)
        if whole:
            return self._keep_back(self.wallets.resent(old, old.rate, self.now, TxKind.DOUBLE_SPEND))
        return self._keep_back(self.wallets.takeback(old, old.fee, self.now, TxKind.DOUBLE_SPEND))

    def burst(self, count: int) -> list[Tx]:
        """Make `count` small payments."""
        return [self.pay(self.rng.randint(100_000, 10_000_000)) for _ in range(count)]

    def usual_rate(self) -> float:
        """Return a random fee rate in sat/vB."""
        level = BUSY_RATE if self.settings.backlog else QUIET_RATE
        return min(MAX_RATE, max(1.0, self.rng.lognormvariate(level, 0.8)))

    def recommended(self) -> Fees:
        """Return the recommended fees for the current mempool, as a backend computes them."""
        entries = self.chain.mempool.values()
        waiting = [Seen(entry.tx, entry.tx.fee, None, None, entry.score) for entry in entries]
        limit = self.settings.weight_of_block
        return recommend(project(waiting, limit, PRICED_BLOCKS), limit, whole=False)

    def _pending(self, txid: str) -> Tx:
        entry = self.chain.mempool.get(txid)
        if entry is None:
            raise ImpossibleError(f"{txid} is not in the mempool")
        return entry.tx

    def _fees_above(self, old: Tx) -> int:
        family = (old.txid, *self.chain.descendants(old.txid))
        return sum(self.chain.mempool[each].tx.fee for each in family)

    def _keep_back(self, tx: Tx) -> Tx:
        self.truth.note(tx)
        return tx

    # --- blocks ---

    def mine(self, extra: Iterable[Tx] = (), *, only: Collection[str] | None = None) -> Block:
        """Mine a block: first `extra`, then the best-paying transactions of the mempool, or of the txids in `only`."""
        chosen = list(extra)
        gone = {coin.outpoint for tx in chosen for coin in tx.inputs}
        included: set[str] = set()
        room = self.settings.weight_of_block - sum(tx.weight for tx in chosen)
        most = len(self.chain.mempool) - max(self.settings.mempool_floor, self.settings.backlog)
        for tx in self.chain.template(room):
            if only is None and len(included) >= most:
                break
            unfit = (
                (only is not None and tx.txid not in only)
                or any(coin.outpoint in gone for coin in tx.inputs)
                or not self.chain.mempool[tx.txid].parents <= included
            )
            if not unfit:
                chosen.append(tx)
                included.add(tx.txid)
        return self._connect(chosen)

    def reorg(
        self, depth: int, *, double_spend: Collection[str] = (), keep: Collection[str] | None = None
    ) -> list[Block]:
        """Replace `depth` blocks by `depth` + 1 others, and return the new ones.

        Transactions of the stale branch go to random new blocks or back to the mempool. Those in `double_spend` lose to
        a double spend. With `keep`, exactly those in it are mined again.
        """
        most = len(self.chain.blocks) - UNTOUCHED_BLOCKS
        if not 1 <= depth <= most:
            raise ImpossibleError(f"a reorg of {depth} blocks is not possible here; use 1 to {most}")
        dead = [self.chain.disconnect() for _ in range(depth)][::-1]
        back: list[Tx] = []
        for block in dead:
            self.truth.unmined(block, self.now)
            for tx in block.txs[1:]:
                if self.chain.accept(tx):
                    self.truth.pending(tx, self.now)
                    back.append(tx)
        rivals = [self.rival(txid) for txid in double_spend]
        slots: list[set[str]] = [set() for _ in range(depth + 2)]  # one for each block, the last for the mempool
        for tx in back:
            place = self.rng.randrange(len(slots)) if keep is None else (0 if tx.txid in keep else depth + 1)
            slots[place].add(tx.txid)
        built = []
        for place in range(depth + 1):
            # A transaction whose parent is not mined yet can still go into a later block.
            allowed = set().union(*slots[: place + 1])
            built.append(self.mine(rivals if place == 0 else (), only=allowed))
        return built

    def _connect(self, txs: Collection[Tx]) -> Block:
        blocks = self.chain.blocks
        height = blocks[-1].height + 1 if blocks else self.settings.start_height - FIRST_BLOCKS + 1
        # A block's time must exceed the median of the last 11 (`mediantime` is that of the previous block).
        mediantime = int(median([block.timestamp for block in blocks[-11:]])) if blocks else int(self.now) - 1
        whole = (self._coinbase(height, sum(tx.fee for tx in txs)), *txs)
        previous = blocks[-1].hash if blocks else self._ids.next()
        root = merkle_root([tx.txid for tx in whole])
        timestamp = max(int(self.now), mediantime + 1)
        bits, nonce = BITS[self.settings.network], int(root[:8], 16)
        block = Block(
            hash=twice(header(previous, root, timestamp, bits, nonce)),
            height=height,
            previous=previous,
            merkle_root=root,
            timestamp=timestamp,
            mediantime=mediantime,
            bits=bits,
            nonce=nonce,
            found_at=self.now,
            txs=whole,
        )
        self.chain.connect(block)
        self.truth.mined(block, self.now)
        for tx in block.txs[1:]:
            self.wallets.put(tx.coins())
        return block

    def _coinbase(self, height: int, fees: int) -> Tx:
        halving = 210_000 if self.settings.network is Network.MAINNET else 150
        reward = (50 * SAT_PER_BTC >> height // halving) + fees
        payee, commitment = self._scripts.make(ScriptType.P2WPKH), self._scripts.make(ScriptType.OP_RETURN)
        # It starts with the height (BIP 34), so that coinbases of one chain differ.
        scriptsig = f"03{height.to_bytes(3, 'little').hex()}0101"
        outputs = (Payment(reward, payee), Payment(0, commitment))
        return assemble(TxKind.COINBASE, (), outputs, 0, sent_at=self.now, sequence=FINAL, coinbase=scriptsig)

    def _on_leave(self, tx: Tx, why: Leaving, by: Tx | None) -> None:
        if by is not None:
            self.truth.note(by)
        self.truth.left(tx, why, by, self.now)
