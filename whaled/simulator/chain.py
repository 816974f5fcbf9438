"""The node behind the backend: a mempool with conflicts and descendants, and a chain with reorganisations."""

from collections.abc import Callable, Iterable
from enum import StrEnum

from msgspec import Struct, field

from whaled.simulator.transactions import Coin, Tx

# Reserved in each block for the coinbase and the header.
RESERVED_WEIGHT = 4_000
# Txids kept of transactions that left unmined, so that their outputs are not spent. Wallets offer a coin long before
# that many others have left.
REMEMBERED_DEAD = 20_000
# The node's limit on unconfirmed ancestors.
MAX_ANCESTORS = 25


class Leaving(StrEnum):
    """The reason for which a transaction left the mempool without being mined."""

    REPLACED = "replaced"
    EVICTED = "evicted"


class Entry(Struct, eq=False):
    """A transaction in the mempool with its unconfirmed relatives and its effective fee rate, sat/vB."""

    tx: Tx
    score: float
    parents: set[str] = field(default_factory=set)
    children: set[str] = field(default_factory=set)


class Block(Struct, frozen=True, kw_only=True, eq=False):
    """A block with its transactions, coinbase first. `found_at` is the time at which the node received it."""

    hash: str
    height: int
    previous: str
    merkle_root: str
    timestamp: int
    mediantime: int
    bits: int
    nonce: int
    found_at: float
    txs: tuple[Tx, ...]

    @property
    def txids(self) -> list[str]:
        """Return all txids, coinbase first."""
        return [tx.txid for tx in self.txs]


class Chain:
    """The mempool and the best chain. Keeps the last `keep` blocks, and at most `limit` transactions after `trim`.

    `on_leave(tx, why, by)` is called for each transaction that leaves the mempool unmined. `by` is the transaction that
    replaced it (for a descendant, the one that replaced its parent), or None.
    """

    def __init__(self, keep: int, limit: int, on_leave: Callable[[Tx, Leaving, Tx | None], None]) -> None:
        self._keep = keep
        self._limit = limit
        self._on_leave = on_leave
        self.mempool: dict[str, Entry] = {}
        self.blocks: list[Block] = []
        self.stale: dict[str, Block] = {}
        self.confirmed: dict[str, Block] = {}
        self._mined_txs: dict[str, Tx] = {}
        self._spenders: dict[tuple[str, int], str] = {}
        self._spent: dict[tuple[str, int], str] = {}
        self._dead: dict[str, None] = {}

    # --- queries ---

    @property
    def tip(self) -> Block:
        """Return the newest block of the best chain."""
        return self.blocks[-1]

    def block_at(self, height: int) -> Block | None:
        """Return the block of the best chain at a height, if it is kept."""
        index = height - self.blocks[0].height
        return self.blocks[index] if 0 <= index < len(self.blocks) else None

    def block_by_hash(self, block_hash: str) -> Block | None:
        """Return a kept block of the best chain or of a stale branch."""
        for block in reversed(self.blocks):
            if block.hash == block_hash:
                return block
        return self.stale.get(block_hash)

    def find(self, txid: str) -> Tx | None:
        """Return a transaction in the mempool or in a kept block of the best chain."""
        entry = self.mempool.get(txid)
        return entry.tx if entry else self._mined_txs.get(txid)

    def spender(self, outpoint: tuple[str, int]) -> str | None:
        """Return the txid of the transaction in the mempool that spends an output."""
        return self._spenders.get(outpoint)

    def is_spendable(self, coin: Coin) -> bool:
        """Return whether a coin is confirmed and unspent, and its transaction has not left the chain."""
        if coin.outpoint in self._spenders or coin.outpoint in self._spent:
            return False
        # A transaction in none of these is older than the kept blocks.
        return coin.txid in self._mined_txs or (coin.txid not in self.mempool and coin.txid not in self._dead)

    def spent_by(self, outpoint: tuple[str, int]) -> str | None:
        """Return the txid of the transaction in a kept block of the best chain that spends an output."""
        return self._spent.get(outpoint)

    def unspent(self, outpoint: tuple[str, int]) -> Coin | None:
        """Return a confirmed output that no block has spent, as gettxout does: also if the mempool spends it."""
        if outpoint in self._spent or outpoint[0] in self.mempool:
            return None
        txid, vout = outpoint
        tx = self._mined_txs.get(txid)
        if tx is not None:
            return tx.coin(vout)
        # The output is older than the kept blocks: only the transaction that spends it has its value and script.
        spender = self._spenders.get(outpoint)
        inputs = self.mempool[spender].tx.inputs if spender else ()
        return next((coin for coin in inputs if coin.outpoint == outpoint), None)

    def ancestors(self, txid: str) -> set[str]:
        """Return the unconfirmed ancestors of a transaction in the mempool."""
        return self._walk(txid, lambda entry: entry.parents)

    def descendants(self, txid: str) -> set[str]:
        """Return the unconfirmed descendants of a transaction in the mempool."""
        return self._walk(txid, lambda entry: entry.children)

    def _walk(self, txid: str, relatives: Callable[[Entry], set[str]]) -> set[str]:
        found: set[str] = set()
        todo = list(relatives(self.mempool[txid]))
        while todo:
            each = todo.pop()
            if each not in found:
                found.add(each)
                todo.extend(relatives(self.mempool[each]))
        return found

    # --- the mempool ---

    def accept(self, tx: Tx) -> bool:
        """Add a transaction to the mempool, replacing conflicts (full RBF). Return False if a node would refuse it."""
        if any(coin.outpoint in self._spent for coin in tx.inputs) or tx.txid in self.mempool:
            return False
        parents = {coin.txid for coin in tx.inputs if coin.txid in self.mempool}
        if len(parents.union(*(self.ancestors(parent) for parent in parents))) >= MAX_ANCESTORS:
            return False
        rivals = {self._spenders[coin.outpoint] for coin in tx.inputs if coin.outpoint in self._spenders}
        losers = rivals.union(*(self.descendants(rival) for rival in rivals))
        if losers:
            fees = sum(self.mempool[loser].tx.fee for loser in losers)
            best = max(self.mempool[rival].tx.rate for rival in rivals)
            if tx.fee <= fees or tx.rate <= best or any(coin.txid in losers for coin in tx.inputs):
                return False
            self._throw_out(rivals, losers, tx)
        self._enter(tx, parents)
        return True

    def accept_package(self, parent: Tx, child: Tx) -> bool:
        """Add a package that pays together for what `parent` replaces. Return False if a node would refuse it."""
        parents = {coin.txid for coin in parent.inputs if coin.txid in self.mempool}
        spends_parent = any(coin.txid == parent.txid for coin in child.inputs)
        is_known = parent.txid in self.mempool or any(coin.outpoint in self._spent for coin in parent.inputs)
        # A package that replaces others must have no other ancestors (BIP 431).
        if is_known or parents or not spends_parent:
            return False
        rivals = {self._spenders[coin.outpoint] for coin in parent.inputs if coin.outpoint in self._spenders}
        losers = rivals.union(*(self.descendants(rival) for rival in rivals))
        fee = parent.fee + child.fee
        best = max((self.mempool[rival].tx.rate for rival in rivals), default=0.0)
        if fee <= sum(self.mempool[loser].tx.fee for loser in losers) or fee / (parent.vsize + child.vsize) <= best:
            return False
        self._throw_out(rivals, losers, parent)
        self._enter(parent, set())
        self._enter(child, {parent.txid})
        return True

    def _enter(self, tx: Tx, parents: set[str]) -> None:
        entry = Entry(tx, tx.rate, parents)
        self.mempool[tx.txid] = entry
        for coin in tx.inputs:
            self._spenders[coin.outpoint] = tx.txid
        # After a reorganisation a parent may return when its children are already in the mempool.
        for index in range(len(tx.outputs)):
            child = self._spenders.get((tx.txid, index))
            if child is not None:
                entry.children.add(child)
                self.mempool[child].parents.add(tx.txid)
        for parent in parents:
            self.mempool[parent].children.add(tx.txid)
        if parents or entry.children:
            self._rescore({tx.txid, *self.ancestors(tx.txid), *self.descendants(tx.txid)})

    def _rescore(self, txids: set[str]) -> None:
        """Update effective rates: the package rate with all ancestors if that is lower, or a descendant's if higher."""
        for txid in txids:
            family = (txid, *self.descendants(txid))
            self.mempool[txid].score = max(self._package_rate(each) for each in family)

    def _package_rate(self, txid: str) -> float:
        tx = self.mempool[txid].tx
        package = [tx, *(self.mempool[each].tx for each in self.ancestors(txid))]
        return min(tx.rate, sum(each.fee for each in package) / sum(each.vsize for each in package))

    def _throw_out(self, rivals: set[str], losers: set[str], by: Tx | None) -> None:
        for loser in sorted(losers):  # sets are unordered, and a seed must always give the same world
            tx = self._forget(loser)
            self._dead[loser] = None
            if len(self._dead) > REMEMBERED_DEAD:
                del self._dead[next(iter(self._dead))]
            self._on_leave(tx, Leaving.REPLACED if loser in rivals and by else Leaving.EVICTED, by)

    def _forget(self, txid: str) -> Tx:
        entry = self.mempool[txid]
        relatives = self.ancestors(txid) | self.descendants(txid) if entry.parents or entry.children else set()
        del self.mempool[txid]
        for coin in entry.tx.inputs:
            self._spenders.pop(coin.outpoint, None)
        for parent in entry.parents:
            self.mempool[parent].children.discard(txid)
        for child in entry.children:
            self.mempool[child].parents.discard(txid)
        self._rescore(relatives)
        return entry.tx

    def trim(self) -> None:
        """Evict the cheapest transactions, with their descendants, if there are more than the limit."""
        if len(self.mempool) <= self._limit:
            return
        cheapest = sorted(self.mempool.values(), key=lambda entry: entry.score)
        # Evicts a tenth at once, so that a full mempool is not sorted for every new transaction.
        for entry in cheapest[: len(self.mempool) - self._limit * 9 // 10]:
            self.evict(entry.tx.txid)

    def evict(self, txid: str) -> None:
        """Remove a transaction and its descendants from the mempool, as a full or restarted node does."""
        if txid in self.mempool:
            self._throw_out({txid}, {txid, *self.descendants(txid)}, None)

    # --- the chain ---

    def template(self, weight: int) -> list[Tx]:
        """Return the transactions a miner would select: greedily by effective rate, ancestors before descendants."""
        chosen: dict[str, Tx] = {}
        room = weight - RESERVED_WEIGHT
        for entry in sorted(self.mempool.values(), key=lambda each: -each.score):
            if entry.tx.txid in chosen:
                continue
            package = self._package(entry, chosen) if entry.parents else [entry.tx]
            needed = sum(tx.weight for tx in package)
            if needed <= room:
                room -= needed
                chosen.update((tx.txid, tx) for tx in package)
            elif room < 500:
                break
        return list(chosen.values())

    def _package(self, entry: Entry, chosen: dict[str, Tx]) -> list[Tx]:
        missing = [self.mempool[each] for each in self.ancestors(entry.tx.txid) if each not in chosen]
        # An ancestor always has fewer ancestors than its descendant.
        missing.sort(key=lambda each: (len(self.ancestors(each.tx.txid)), each.tx.txid))
        return [*(each.tx for each in missing), entry.tx]

    def connect(self, block: Block) -> None:
        """Connect a block to the tip. Its transactions leave the mempool, and so do those that conflict with them."""
        for tx in block.txs:
            if tx.txid in self.mempool:
                self._forget(tx.txid)
            else:
                rivals = {self._spenders[coin.outpoint] for coin in tx.inputs if coin.outpoint in self._spenders}
                losers = rivals.union(*(self.descendants(rival) for rival in rivals))
                self._throw_out(rivals, losers, tx)
            for coin in tx.inputs:
                self._spent[coin.outpoint] = tx.txid
            self.confirmed[tx.txid] = block
            self._mined_txs[tx.txid] = tx
        self.blocks.append(block)
        if len(self.blocks) > self._keep:
            self._unindex(self.blocks.pop(0).txs)
        while len(self.stale) > self._keep:
            del self.stale[next(iter(self.stale))]

    def disconnect(self) -> Block:
        """Disconnect the tip. Its transactions exist nowhere until they are accepted or mined again."""
        block = self.blocks.pop()
        self._unindex(block.txs)
        self.stale[block.hash] = block
        return block

    def _unindex(self, txs: Iterable[Tx]) -> None:
        for tx in txs:
            for coin in tx.inputs:
                self._spent.pop(coin.outpoint, None)
            self.confirmed.pop(tx.txid, None)
            self._mined_txs.pop(tx.txid, None)
