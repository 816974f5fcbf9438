"""The backend's REST answers, from what the node and the backend know. No I/O: `rest.py` is the shell."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from whaled.simulator import frames
from whaled.simulator.backend import Backend
from whaled.simulator.blockframes import summary
from whaled.simulator.chain import Block
from whaled.simulator.market import Seen, recommend
from whaled.simulator.messages import Messages, join
from whaled.simulator.transactions import Payment, Tx
from whaled.simulator.world import World

MAX_PREVOUTS = 100
BLOCKS_SHOWN = 15
RECENT_SHOWN = 10
TXS_PER_PAGE = 10
GENESIS = "0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206"


class Answer(Struct, frozen=True):
    """Status, body and whether the body is JSON (else plain text)."""

    body: bytes
    status: int = 200
    is_json: bool = True


class Outpoint(Struct, frozen=True):
    """One element of the body of `POST prevouts`."""

    txid: str
    vout: int


def json(value: object, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(frames.ENCODER.encode(value), status)


def text(value: object) -> Answer:
    """An answer in plain text."""
    return Answer(str(value).encode(), is_json=False)


def error(status: int, message: str) -> Answer:
    """An error as the backend words them."""
    return json({"error": message}, status)


class Answers:
    """Answers of one backend process."""

    def __init__(self, world: World, backend: Backend, messages: Messages) -> None:
        self._chain = world.chain
        self._world = world
        self._backend = backend
        self._messages = messages

    # --- transactions ---

    def tx(self, txid: str) -> Answer:
        """`tx/:txid`"""
        seen = self._find(txid)
        if seen is None:
            return error(404, "No such mempool or blockchain transaction")
        return json(frames.rest_tx(seen))

    def tx_status(self, txid: str) -> Answer:
        """`tx/:txid/status`: a transaction of a dead branch is unconfirmed, not unknown."""
        seen = self._find(txid)
        if seen is None:
            return error(404, "No such mempool or blockchain transaction")
        return json(frames.status(seen.block))

    def tx_rbf(self, txid: str) -> Answer:
        """`tx/:txid/rbf`"""
        rbf = self._backend.rbf
        return json({"replacements": rbf.tree(txid), "replaces": rbf.replaces(txid)})

    def tx_cached(self, txid: str) -> Answer:
        """`tx/:txid/cached`: 204 for what was not replaced."""
        seen = self._backend.rbf.cached(txid)
        return Answer(b"", 204) if seen is None else json(frames.rest_tx(seen))

    def replacements(self) -> Answer:
        """`replacements`"""
        return json(self._backend.rbf.latest())

    def transaction_times(self, txids: Sequence[str]) -> Answer:
        """`transaction-times`: 0 for what is not in the mempool."""
        known = (self._backend.mempool.get(txid) for txid in txids)
        return json([seen.first_seen or 0 if seen else 0 for seen in known])

    def prevouts(self, body: bytes) -> Answer:
        """`POST prevouts`: null for what was never there, and once the spender is mined."""
        try:
            outpoints = msgspec.json.decode(body, type=list[Outpoint])
        except msgspec.DecodeError:
            return error(400, "Invalid outpoints")
        if len(outpoints) > MAX_PREVOUTS:
            return error(400, "Too many outpoints requested")
        return json([self._prevout(outpoint) for outpoint in outpoints])

    def _prevout(self, outpoint: Outpoint) -> Any:
        parent = self._backend.mempool.get(outpoint.txid)
        if parent is not None:
            coin = parent.tx.coin(outpoint.vout)
        else:
            coin = self._chain.unspent((outpoint.txid, outpoint.vout))
        if coin is None:
            return None
        prevout = frames.output(Payment(coin.value, coin.script))
        return {"prevout": prevout, "unconfirmed": parent is not None}

    def _find(self, txid: str) -> Seen | None:
        """As a node with txindex finds it: in the mempool, the chain, or a dead branch."""
        tx = self._chain.find(txid)
        if tx is not None:
            return self._seen(tx)
        for block in self._chain.stale.values():
            for each in block.txs:
                if each.txid == txid and not each.is_coinbase:
                    return Seen(each, each.fee, None, None, each.rate)
        return None

    def _seen(self, tx: Tx) -> Seen:
        known = self._backend.mempool.get(tx.txid)
        entry = self._chain.mempool.get(tx.txid)
        rate = entry.score if entry else tx.rate
        block = self._chain.confirmed.get(tx.txid)
        return Seen(tx, tx.fee, None, known.first_seen if known else None, rate, block=block)

    # --- the mempool ---

    def mempool(self) -> Answer:
        """`mempool`"""
        txs = [entry.tx for entry in self._chain.mempool.values()]
        info = frames.mempool_info(txs, 0)
        fees = sum(tx.fee for tx in txs)
        return json({"count": info["size"], "vsize": info["bytes"], "total_fee": fees, "fee_histogram": []})

    def mempool_txids(self) -> Answer:
        """`mempool/txids`: the node's, so it may be ahead of the stream."""
        return json(list(self._chain.mempool))

    def mempool_recent(self) -> Answer:
        """`mempool/recent`"""
        latest = list(self._chain.mempool.values())[-RECENT_SHOWN:]
        return json([frames.strip(entry.tx, entry.tx.fee) for entry in reversed(latest)])

    # --- blocks ---

    def tip_height(self) -> Answer:
        """`blocks/tip/height`: the node's, right even after a reorganisation."""
        return text(self._chain.tip.height)

    def tip_hash(self) -> Answer:
        """`blocks/tip/hash`"""
        return text(self._chain.tip.hash)

    def block_height(self, height: str) -> Answer:
        """`block-height/:h`: an unknown height is a 500. Below the world lies the genesis block only."""
        if height == "0":
            return text(GENESIS)
        block = self._chain.block_at(int(height)) if height.isdecimal() else None
        return error(500, "Failed to get block at height") if block is None else text(block.hash)

    def blocks(self, height: str | None = None) -> Answer:
        """`blocks`, `blocks/:h`: what the backend remembers, a dead branch included if it has no database."""
        if height is not None and not height.isdecimal():
            return error(400, "Invalid height")
        highest = None if height is None else int(height)
        known = [block for block in self._backend.blocks if highest is None or block.height <= highest]
        shown = sorted(known, key=lambda block: -block.height)[:BLOCKS_SHOWN]
        return json([self._messages.block(block) for block in shown])

    def block(self, block_hash: str) -> Answer:
        """`block/:hash`, orphaned ones too."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block() if block is None else json(self._messages.block(block))

    def block_txids(self, block_hash: str) -> Answer:
        """`block/:hash/txids`"""
        block = self._chain.block_by_hash(block_hash)
        return _no_block() if block is None else json(block.txids)

    def block_summary(self, block_hash: str) -> Answer:
        """`block/:hash/summary`"""
        block = self._chain.block_by_hash(block_hash)
        return _no_block() if block is None else json(summary(block))

    def block_txs(self, block_hash: str, index: str = "0") -> Answer:
        """`block/:hash/txs/:index`: ten from any index, none past the end."""
        block = self._chain.block_by_hash(block_hash)
        if block is None or not index.isdecimal():
            return _no_block()
        start = int(index)
        return json([self._block_tx(tx, block) for tx in block.txs[start : start + TXS_PER_PAGE]])

    def _block_tx(self, tx: Tx, block: Block) -> frames.Json:
        return frames.rest_tx(Seen(tx, tx.fee, None, None, tx.rate, block=block), lazy=True)

    def chain_tips(self) -> Answer:
        """`chain-tips`"""
        tip = self._chain.tip
        tips = [{"height": tip.height, "hash": tip.hash, "branchlen": 0, "status": "active"}]
        parents = {block.previous for block in self._chain.stale.values()}
        for block in self._chain.stale.values():
            if block.hash not in parents:
                length = self._branch_length(block)
                tips.append({"height": block.height, "hash": block.hash, "branchlen": length, "status": "valid-fork"})
        return json(tips)

    def _branch_length(self, block: Block) -> int:
        length = 1
        while block.previous in self._chain.stale:
            block = self._chain.stale[block.previous]
            length += 1
        return length

    # --- the market ---

    def fees(self, *, whole: bool) -> Answer:
        """`fees/recommended` (whole) and `fees/precise`: 503 until the mempool is in sync."""
        if not self._backend.in_sync:
            return error(503, "Service Unavailable")
        return json(frames.fees(recommend(self._backend.projected, self._backend.limit, whole=whole)))

    def part(self, key: str) -> Answer:
        """What the stream says under this key (`prices`, `backend-info`, ...); 503 while there is nothing."""
        value = self._messages.part(key)
        return error(503, "Service Unavailable") if value is None else Answer(value)

    def init_data(self) -> Answer:
        """`init-data`"""
        return Answer(join(self._messages.init()))


def _no_block() -> Answer:
    return error(500, "Failed to get block")
