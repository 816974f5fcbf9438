"""The responses of the backend's REST API, from the state of the node and the backend. No I/O: see `rest.py`."""

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
# Not the genesis blocks of real networks, so that an event log never mixes a real network with a simulated one.
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


class Response(Struct, frozen=True):
    """A body, its status and its content type."""

    body: bytes
    status: int = 200
    kind: str = JSON


class Outpoint(Struct, frozen=True):
    """One element of the body of `POST prevouts`."""

    txid: str
    vout: int


def json(value: object, status: int = 200) -> Response:
    """Return a JSON response."""
    return Response(frames.ENCODER.encode(value), status)


def text(value: object, status: int = 200, kind: str = TEXT) -> Response:
    """Return a text response. Express's default type for a string is HTML, so some routes pass `kind` HTML."""
    return Response(str(value).encode(), status, kind)


def nowhere(method: str, path: str) -> Response:
    """Return the response of Express for an unknown route."""
    return text(_PAGE.format(text=f"Cannot {method} {html.escape(path)}"), 404, HTML)


def error(status: int, message: str) -> Response:
    """Return an error in the backend's JSON form."""
    return json({"error": message}, status)


class Responses:
    """The REST responses of one backend process. `push` sends an update to every client of the stream."""

    def __init__(
        self, world: World, backend: Backend, messages: Messages, push: Callable[[Update], None] = lambda _: None
    ) -> None:
        self._chain = world.chain
        self._world = world
        self._push = push
        self._backend = backend
        self._messages = messages

    # --- transactions ---

    def tx(self, txid: str) -> Response:
        """Respond to `tx/:txid`: from the mempool, filling the prevouts for good, else from the node."""
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

    def tx_status(self, txid: str) -> Response:
        """Respond to `tx/:txid/status`. A transaction of a stale branch is unconfirmed, not unknown."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else json(self._status(tx))

    def tx_hex(self, txid: str) -> Response:
        """Respond to `tx/:txid/hex`."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else text(parts_of(tx).whole.hex())

    def tx_outspends(self, txid: str) -> Response:
        """Respond to `tx/:txid/outspends`, which does not contain the spending transaction."""
        tx = self._find(txid)
        if tx is None:
            return error(500, "Failed to get transaction outspends") if ID.fullmatch(txid) else _no_tx(txid)
        return json([{"spent": not self._is_unspent(txid, place)} for place in range(len(tx.outputs))])

    def _is_unspent(self, txid: str, place: int) -> bool:
        """Return whether `gettxout` with the mempool finds the output; it finds no OP_RETURN outputs."""
        coin = self._chain.find(txid)
        is_data = coin is None or coin.outputs[place].script.type is ScriptType.OP_RETURN
        outpoint = (txid, place)
        return not is_data and self._chain.spender(outpoint) is None and self._chain.spent_by(outpoint) is None

    def tx_rbf(self, txid: str) -> Response:
        """Respond to `tx/:txid/rbf`."""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        rbf = self._backend.rbf
        return json({"replacements": rbf.tree(txid), "replaces": rbf.replaces(txid)})

    def tx_cached(self, txid: str) -> Response:
        """Respond to `tx/:txid/cached`: the transaction as it was in the mempool, 204 if it is in no replacement."""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        seen = self._backend.rbf.cached(txid)
        if seen is None:
            return Response(b"", 204)
        return json(txframes.mempool_tx(seen, electrs=self._backend.reads_electrs))

    def replacements(self) -> Response:
        """Respond to `replacements`."""
        return json(self._backend.rbf.latest())

    def transaction_times(self, txids: Sequence[str]) -> Response:
        """Respond to `transaction-times`: 0 for a transaction that is not in the mempool."""
        if not txids:
            return error(400, "invalid txId format")
        known = (self._backend.mempool.get(txid) for txid in txids)
        return json([seen.first_seen or 0 if seen else 0 for seen in known])

    def prevouts(self, body: bytes) -> Response:
        """Respond to `POST prevouts`: null for an unknown output, and for one whose spender is mined."""
        try:
            outpoints = msgspec.json.decode(body, type=list[Outpoint])
        except msgspec.ValidationError:
            return error(400, "Invalid outpoints format")
        except msgspec.DecodeError:
            # Express responds before the request reaches the route.
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
        """Find a transaction as a node with txindex does: in the mempool, the chain, or a stale branch."""
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

    def mempool(self) -> Response:
        """Respond to `mempool`."""
        info = frames.mempool_info((entry.tx for entry in self._chain.mempool.values()), 0)
        fees = frames.number(info["total_fee"] * SAT_PER_BTC)  # BTC times 1e8 in doubles, so not an integer
        return json({"count": info["size"], "vsize": info["bytes"], "total_fee": fees, "fee_histogram": []})

    def mempool_txids(self) -> Response:
        """Respond to `mempool/txids`: the node's mempool, which may be ahead of the stream."""
        return json(list(self._chain.mempool))

    def mempool_recent(self) -> Response:
        """Respond to `mempool/recent`: from the backend's mempool, newest first."""
        latest = sorted(self._backend.mempool.values(), key=lambda seen: -(seen.first_seen or 0))[:RECENT_SHOWN]
        return json([txframes.stripped(seen) for seen in latest])

    # --- blocks ---

    def tip_height(self) -> Response:
        """Respond to `blocks/tip/height`: the last block that the backend read."""
        if not self._backend.height:
            return error(503, "Service Temporarily Unavailable")
        return text(self._backend.height)

    def tip_hash(self) -> Response:
        """Respond to `blocks/tip/hash`: the node's tip."""
        return text(self._chain.tip.hash)

    def block_height(self, height: str) -> Response:
        """Respond to `block-height/:h`: 500 for an unknown height. Of older blocks only the genesis block exists."""
        if height == "0":
            return text(GENESIS[self._world.settings.network])
        block = self._chain.block_at(int(height)) if height.isdecimal() else None
        return error(500, "Failed to get block at height") if block is None else text(block.hash, kind=HTML)

    def blocks(self, height: str | None = None) -> Response:
        """Respond to `blocks` and `blocks/:h`: the backend's blocks, including stale ones if it has no database."""
        if height is not None and (not height.isdecimal() or int(height) > self._backend.height):
            return json([])
        highest = None if height is None else int(height)
        known = [block for block in self._backend.blocks if highest is None or block.height <= highest]
        shown = sorted(known, key=lambda block: -block.height)[:BLOCKS_SHOWN]
        return json([self._messages.block(block) for block in shown])

    def block(self, block_hash: str) -> Response:
        """Respond to `block/:hash`, also for a stale block."""
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            # The backend passes on electrs's 404, but not the node's error.
            return _no_block(block_hash, "block", 404 if self._backend.reads_electrs else 500)
        return json(self._messages.block(block))

    def block_header(self, block_hash: str) -> Response:
        """Respond to `block/:hash/header`."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "block header") if block is None else text(header_of(block).hex())

    def block_raw(self, block_hash: str) -> Response:
        """Respond to `block/:hash/raw`: the serialised block."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "raw block") if block is None else Response(block_bytes(block), kind=BYTES)

    def block_txids(self, block_hash: str) -> Response:
        """Respond to `block/:hash/txids`."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash, "txids for block") if block is None else json(block.txids)

    def block_summary(self, block_hash: str) -> Response:
        """Respond to `block/:hash/summary`.

        A summary kept from when the backend read the block has times, and fees that are not integers. One that is
        computed on request has neither.
        """
        kept = self._backend.summaries.get(block_hash)
        if kept is not None:
            return Response(kept)
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            return _no_block(block_hash, "block summary")
        found = (Seen(tx, tx.fee, None, None, tx.rate) for tx in block.txs)
        return json([txframes.classified(seen, seen.rate, prevouts=True) for seen in found])

    def block_txs(self, block_hash: str, index: str = "0") -> Response:
        """Respond to `block/:hash/txs/:index`: ten from any index, none past the end. Pushes progress to the stream."""
        block = self._chain.block_by_hash(block_hash)
        if block is None or not index.isdecimal():
            return _no_block(block_hash, "block transactions")
        page = block.txs[int(index) :][:TXS_PER_PAGE]
        key, indicators = f"blocktxs-{block.hash}", self._backend.indicators
        for done in range(len(page) + 1):
            indicators[key] = round(done * 100 / len(page)) if page else 0
            if page and done == len(page):
                del indicators[key]  # for an index past the end the real backend never deletes it
            self._push(Indicators(dict(indicators)))
        return json([self._block_tx(tx) for tx in page])

    def _block_tx(self, tx: Tx) -> frames.Json:
        status = self._status(tx)
        if status["confirmed"]:
            return txframes.page_tx(tx, status)
        return txframes.stale_page_tx(tx, status, int(self._world.now))

    def chain_tips(self) -> Response:
        """Respond to `chain-tips`."""
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

    def fees(self, *, whole: bool) -> Response:
        """Respond to `fees/recommended` (`whole`) and `fees/precise`: 503 until the mempool is in sync."""
        if not self._backend.in_sync:
            return text("Service Unavailable", 503, HTML)
        return json(frames.fees(recommend(self._backend.projected, self._backend.limit, whole=whole)))

    def part(self, key: str) -> Response:
        """Respond with a part of the stream (`prices`, `backend-info`, ...), 503 while there is none."""
        value = self._messages.part(key)
        return error(503, "Service Unavailable") if value is None else Response(value)

    def init_data(self) -> Response:
        """Respond to `init-data`."""
        return Response(join(self._messages.init()))


def _no_tx(txid: str) -> Response:
    if not ID.fullmatch(txid):
        return error(400, "Invalid transaction ID")
    return error(404, "No such mempool or blockchain transaction")


def _no_block(block_hash: str, what: str, status: int = 500) -> Response:
    if not ID.fullmatch(block_hash):
        return error(400, "Invalid block hash")
    return error(status, f"Failed to get {what}")
