"""The backend's REST answers, from what the node and the backend know. No I/O: `rest.py` is the shell."""

import html
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from whaled.model import SAT_PER_BTC
from whaled.simulator import frames, txframes
from whaled.simulator.backend import Backend, Indicators, Update
from whaled.simulator.chain import Block
from whaled.simulator.market import Seen, recommend
from whaled.simulator.messages import Messages, join
from whaled.simulator.scripts import Network, ScriptType
from whaled.simulator.serial import block_bytes, header_of, parts_of
from whaled.simulator.transactions import Tx
from whaled.simulator.world import World

MAX_PREVOUTS = 100
BLOCKS_SHOWN = 15
RECENT_SHOWN = 10
TXS_PER_PAGE = 10
# Of no real network: an event log of one must never take in what is simulated.
GENESIS = {
    Network.MAINNET: "ce862c50e818f74b7f996fd9e8f0cda7638feb1f9bf49bb8702cb48c69bb8dae",
    Network.REGTEST: "3ff0a93a9b1f064168ef0e093cc6172563d08d49b9894cff3982fa4b2ec2f1c8",
}


JSON, TEXT, HTML = (f"{kind}; charset=utf-8" for kind in ("application/json", "text/plain", "text/html"))
BYTES = "application/octet-stream"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Error</title>
</head>
<body>
<pre>{text}</pre>
</body>
</html>
"""
ID = re.compile(r"[0-9a-fA-F]{64}")


class Answer(Struct, frozen=True):
    """Status, body and its content type."""

    body: bytes
    status: int = 200
    kind: str = JSON


class Outpoint(Struct, frozen=True):
    """One element of the body of `POST prevouts`."""

    txid: str
    vout: int


def json(value: object, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(frames.ENCODER.encode(value), status)


def text(value: object, status: int = 200, kind: str = TEXT) -> Answer:
    """An answer in plain text, or in what Express takes a string for if nobody says otherwise: HTML."""
    return Answer(str(value).encode(), status, kind)


def nowhere(method: str, path: str) -> Answer:
    """The answer to a route that there is not, as Express words it."""
    return text(_PAGE.format(text=f"Cannot {method} {html.escape(path)}"), 404, HTML)


def error(status: int, message: str) -> Answer:
    """An error as the backend words them."""
    return json({"error": message}, status)


class Answers:
    """Answers of one backend process. `push` sends an update to every client of the stream."""

    def __init__(
        self, world: World, backend: Backend, messages: Messages, push: Callable[[Update], None] = lambda _: None
    ) -> None:
        self._chain = world.chain
        self._world = world
        self._push = push
        self._backend = backend
        self._messages = messages

    # --- transactions ---

    def tx(self, txid: str) -> Answer:
        """`tx/:txid`: what the mempool has, prevouts filled in, and they stay so; else as the node has it."""
        seen = self._backend.mempool.get(txid)
        if seen is not None:
            seen.has_prevouts, seen.frame = True, b""
            return json(txframes.mempool_tx(seen, electrs=False))
        tx = self._find(txid)
        if tx is None:
            return _no_tx(txid)
        frame = txframes.found_tx(tx, self._status(tx))
        if not frame["status"]["confirmed"]:
            frame["firstSeen"] = int(self._world.now)
        return json(frame)

    def tx_status(self, txid: str) -> Answer:
        """`tx/:txid/status`: a transaction of a dead branch is unconfirmed, not unknown."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else json(self._status(tx))

    def tx_hex(self, txid: str) -> Answer:
        """`tx/:txid/hex`"""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else text(parts_of(tx).whole.hex())

    def tx_outspends(self, txid: str) -> Answer:
        """`tx/:txid/outspends`: whether, not by whom."""
        tx = self._find(txid)
        if tx is None:
            return error(500, "Failed to get transaction outspends") if ID.fullmatch(txid) else _no_tx(txid)
        return json([{"spent": not self._is_unspent(txid, place)} for place in range(len(tx.outputs))])

    def _is_unspent(self, txid: str, place: int) -> bool:
        """As `gettxout` says it with the mempool: an output without a value to spend is none."""
        coin = self._chain.find(txid)
        is_data = coin is None or coin.outputs[place].script.type is ScriptType.OP_RETURN
        outpoint = (txid, place)
        return not is_data and self._chain.spender(outpoint) is None and self._chain.spent_by(outpoint) is None

    def tx_rbf(self, txid: str) -> Answer:
        """`tx/:txid/rbf`"""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        rbf = self._backend.rbf
        return json({"replacements": rbf.tree(txid), "replaces": rbf.replaces(txid)})

    def tx_cached(self, txid: str) -> Answer:
        """`tx/:txid/cached`: 204 for what has no part in a replacement. As it was in the mempool."""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        seen = self._backend.rbf.cached(txid)
        if seen is None:
            return Answer(b"", 204)
        return json(txframes.mempool_tx(seen, electrs=self._backend.reads_electrs))

    def replacements(self) -> Answer:
        """`replacements`"""
        return json(self._backend.rbf.latest())

    def transaction_times(self, txids: Sequence[str]) -> Answer:
        """`transaction-times`: 0 for what is not in the mempool."""
        if not txids:
            return error(400, "invalid txId format")
        known = (self._backend.mempool.get(txid) for txid in txids)
        return json([seen.first_seen or 0 if seen else 0 for seen in known])

    def prevouts(self, body: bytes) -> Answer:
        """`POST prevouts`: null for what was never there, and once the spender is mined."""
        try:
            outpoints = msgspec.json.decode(body, type=list[Outpoint])
        except msgspec.ValidationError:
            return error(400, "Invalid outpoints format")
        except msgspec.DecodeError:
            # Express refuses it before the route is reached.
            return text(_PAGE.format(text="SyntaxError: Unexpected token in JSON"), 400, HTML)
        if len(outpoints) > MAX_PREVOUTS:
            return error(400, "Too many outpoints requested")
        if not all(ID.fullmatch(outpoint.txid) for outpoint in outpoints):
            return error(400, "Invalid outpoints format")
        return json([self._prevout(outpoint) for outpoint in outpoints])

    def _prevout(self, outpoint: Outpoint) -> Any:
        parent = self._backend.mempool.get(outpoint.txid)
        if parent is not None:
            coin = parent.tx.coin(outpoint.vout)
        else:
            coin = self._chain.unspent((outpoint.txid, outpoint.vout))
        if coin is None:
            return None
        is_electrs = parent is not None and self._backend.reads_electrs
        prevout = (txframes.electrs_output if is_electrs else txframes.core_output)(coin.value, coin.script)
        return {"prevout": prevout, "unconfirmed": parent is not None}

    def _find(self, txid: str) -> Tx | None:
        """As a node with txindex finds it: in the mempool, the chain, or a dead branch."""
        tx = self._chain.find(txid)
        if tx is not None:
            return tx
        for block in self._chain.stale.values():
            for each in block.txs:
                if each.txid == txid and not each.is_coinbase:
                    return each
        return None

    def _status(self, tx: Tx) -> frames.Json:
        return txframes.status_of(self._chain.confirmed.get(tx.txid), self._backend.behind)

    # --- the mempool ---

    def mempool(self) -> Answer:
        """`mempool`"""
        info = frames.mempool_info((entry.tx for entry in self._chain.mempool.values()), 0)
        fees = frames.number(info["total_fee"] * SAT_PER_BTC)  # BTC times 1e8: not whole, as other such fees
        return json({"count": info["size"], "vsize": info["bytes"], "total_fee": fees, "fee_histogram": []})

    def mempool_txids(self) -> Answer:
        """`mempool/txids`: the node's, so it may be ahead of the stream."""
        return json(list(self._chain.mempool))

    def mempool_recent(self) -> Answer:
        """`mempool/recent`: the backend's, newest first."""
        latest = sorted(self._backend.mempool.values(), key=lambda seen: -(seen.first_seen or 0))[:RECENT_SHOWN]
        return json([txframes.stripped(seen) for seen in latest])

    # --- blocks ---

    def tip_height(self) -> Answer:
        """`blocks/tip/height`: of the last block the backend read."""
        if not self._backend.height:
            return error(503, "Service Temporarily Unavailable")
        return text(self._backend.height)

    def tip_hash(self) -> Answer:
        """`blocks/tip/hash`: the node's."""
        return text(self._chain.tip.hash)

    def block_height(self, height: str) -> Answer:
        """`block-height/:h`: an unknown height is a 500. Below the world lies the genesis block only."""
        if height == "0":
            return text(GENESIS[self._world.settings.network])
        block = self._chain.block_at(int(height)) if height.isdecimal() else None
        return error(500, "Failed to get block at height") if block is None else text(block.hash, kind=HTML)

    def blocks(self, height: str | None = None) -> Answer:
        """`blocks`, `blocks/:h`: what the backend remembers, a dead branch included if it has no database."""
        if height is not None and (not height.isdecimal() or int(height) > self._backend.height):
            return json([])
        highest = None if height is None else int(height)
        known = [block for block in self._backend.blocks if highest is None or block.height <= highest]
        shown = sorted(known, key=lambda block: -block.height)[:BLOCKS_SHOWN]
        return json([self._messages.block(block) for block in shown])

    def block(self, block_hash: str) -> Answer:
        """`block/:hash`, orphaned ones too."""
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            # Electrs' 404 comes through, the node's error does not.
            return _no_block(block_hash, "block", 404 if self._backend.reads_electrs else 500)
        return json(self._messages.block(block))

    def block_header(self, block_hash: str) -> Answer:
        """`block/:hash/header`"""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "block header") if block is None else text(header_of(block).hex())

    def block_raw(self, block_hash: str) -> Answer:
        """`block/:hash/raw`: the block itself."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "raw block") if block is None else Answer(block_bytes(block), kind=BYTES)

    def block_txids(self, block_hash: str) -> Answer:
        """`block/:hash/txids`"""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "txids for block") if block is None else json(block.txids)

    def block_summary(self, block_hash: str) -> Answer:
        """`block/:hash/summary`: kept from when the block came, with times and fees that are not whole; else read
        anew, with neither.
        """
        kept = self._backend.summaries.get(block_hash)
        if kept is not None:
            return Answer(kept)
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            return _no_block(block_hash, "block summary")
        found = (Seen(tx, tx.fee, None, None, tx.rate) for tx in block.txs)
        return json([txframes.classified(seen, seen.rate, prevouts=True) for seen in found])

    def block_txs(self, block_hash: str, index: str = "0") -> Answer:
        """`block/:hash/txs/:index`: ten from any index, none past the end. The stream reports the progress."""
        block = self._chain.block_by_hash(block_hash)
        if block is None or not index.isdecimal():
            return _no_block(block_hash, "block transactions")
        page = block.txs[int(index) :][:TXS_PER_PAGE]
        key, indicators = f"blocktxs-{block.hash}", self._backend.indicators
        for done in range(len(page) + 1):
            indicators[key] = round(done * 100 / len(page)) if page else 0
            if page and done == len(page):
                del indicators[key]  # past the end it stays for ever
            self._push(Indicators(dict(indicators)))
        return json([self._block_tx(tx) for tx in page])

    def _block_tx(self, tx: Tx) -> frames.Json:
        status = self._status(tx)
        if status["confirmed"]:
            return txframes.page_tx(tx, status)
        return txframes.stale_page_tx(tx, status, int(self._world.now))

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
            return text("Service Unavailable", 503, HTML)
        return json(frames.fees(recommend(self._backend.projected, self._backend.limit, whole=whole)))

    def part(self, key: str) -> Answer:
        """What the stream says under this key (`prices`, `backend-info`, ...); 503 while there is nothing."""
        value = self._messages.part(key)
        return error(503, "Service Unavailable") if value is None else Answer(value)

    def init_data(self) -> Answer:
        """`init-data`"""
        return Answer(join(self._messages.init()))


def _no_tx(txid: str) -> Answer:
    if not ID.fullmatch(txid):
        return error(400, "Invalid transaction ID")
    return error(404, "No such mempool or blockchain transaction")


def _no_block(block_hash: str, what: str, status: int = 500) -> Answer:
    if not ID.fullmatch(block_hash):
        return error(400, "Invalid block hash")
    return error(status, f"Failed to get {what}")
