"""The REST responses of electrs, which a backend in esplora mode reads and nginx serves next to it. No I/O.

Statuses, error texts and the order of keys are those of mempool/electrs (`rest.rs`).
"""

from collections.abc import Iterable, Sequence
from statistics import median_low
from urllib.parse import quote

from whaled.simulator import frames
from whaled.simulator.blockframes import DIFFICULTY
from whaled.simulator.chain import Block, Chain
from whaled.simulator.responses import GENESIS, ID, Response
from whaled.simulator.scripts import ScriptType
from whaled.simulator.serial import BLOCK_VERSION, block_bytes, block_size, header_of, parts_of
from whaled.simulator.transactions import Tx
from whaled.simulator.txframes import electrs_tx, status_of
from whaled.simulator.world import World

JSON, TEXT, BYTES = "application/json", "text/plain", "application/octet-stream"
BLOCKS_SHOWN = 10
TXS_PER_PAGE = 25
RECENT_SHOWN = 10
MOST_TXIDS = 50


def json(value: object) -> Response:
    """Return a JSON response."""
    return Response(frames.ENCODER.encode(value), kind=JSON)


def text(value: object, status: int = 200) -> Response:
    """Return a plain-text response, also used for errors."""
    return Response(str(value).encode(), status, TEXT)


def nowhere(path: str) -> Response:
    """Return the response to an unknown route."""
    return text(f'endpoint does not exist "{quote(path)}"', 404)


class Electrs:
    """The responses of electrs, from the node's state. Of a stale block it only serves the transactions."""

    def __init__(self, world: World) -> None:
        self._chain: Chain = world.chain
        self._network = world.settings.network

    # --- transactions ---

    def tx(self, txid: str) -> Response:
        """Respond to `tx/:txid`."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else json(self._frame(tx))

    def tx_hex(self, txid: str) -> Response:
        """Respond to `tx/:txid/hex`."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else text(parts_of(tx).whole.hex())

    def tx_raw(self, txid: str) -> Response:
        """Respond to `tx/:txid/raw`."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else Response(parts_of(tx).whole, kind=BYTES)

    def tx_status(self, txid: str) -> Response:
        """Respond to `tx/:txid/status`: an unknown transaction is reported as unconfirmed."""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        return json(status_of(self._chain.confirmed.get(txid)))

    def tx_outspend(self, txid: str, place: str) -> Response:
        """Respond to `tx/:txid/outspend/:vout`: an unknown output is reported as unspent."""
        if not ID.fullmatch(txid):
            return _no_tx(txid)
        return json(self._spend(txid, int(place))) if place.isdecimal() else text("Invalid number", 400)

    def tx_outspends(self, txid: str) -> Response:
        """Respond to `tx/:txid/outspends`."""
        tx = self._find(txid)
        return _no_tx(txid) if tx is None else json(self._spends(tx))

    def txs_outspends(self, txids: str | None) -> Response:
        """Respond to `txs/outspends?txids=`: an empty list for each unknown transaction."""
        if txids is None:
            return text("No txids specified", 400)
        wanted = txids.split(",")
        if len(wanted) > MOST_TXIDS:
            return text("Too many txids requested", 400)
        found = map(self._find, wanted)
        return json([[] if tx is None else self._spends(tx) for tx in found])

    def _find(self, txid: str) -> Tx | None:
        tx = self._chain.find(txid)
        if tx is not None:
            return tx
        dead = (each for block in self._chain.stale.values() for each in block.txs)
        return next((each for each in dead if each.txid == txid), None)

    def _frame(self, tx: Tx) -> frames.Json:
        return electrs_tx(tx, status_of(self._chain.confirmed.get(tx.txid)))

    def _spends(self, tx: Tx) -> list[frames.Json]:
        return [
            {"spent": False} if payment.script.type is ScriptType.OP_RETURN else self._spend(tx.txid, place)
            for place, payment in enumerate(tx.outputs)
        ]

    def _spend(self, txid: str, place: int) -> frames.Json:
        spender = self._chain.spent_by((txid, place)) or self._chain.spender((txid, place))
        tx = self._chain.find(spender) if spender is not None else None
        if tx is None:
            return {"spent": False}
        vin = next(at for at, coin in enumerate(tx.inputs) if coin.outpoint == (txid, place))
        return {"spent": True, "txid": tx.txid, "vin": vin, "status": status_of(self._chain.confirmed.get(tx.txid))}

    # --- the mempool ---

    def mempool(self) -> Response:
        """Respond to `mempool`."""
        txs = [entry.tx for entry in self._chain.mempool.values()]
        sizes = sum(tx.weight // 4 for tx in txs)
        histogram = [[min(tx.rate for tx in txs), sizes]] if txs else []
        fees = sum(tx.fee for tx in txs)
        return json({"count": len(txs), "vsize": sizes, "total_fee": fees, "fee_histogram": histogram})

    def mempool_txids(self) -> Response:
        """Respond to `mempool/txids`: sorted by the reversed txid."""
        return json(sorted(self._chain.mempool, key=lambda txid: bytes.fromhex(txid)[::-1]))

    def mempool_recent(self) -> Response:
        """Respond to `mempool/recent`: `value` is the sum of the inputs, not of the outputs."""
        latest = [entry.tx for entry in self._chain.mempool.values()][-RECENT_SHOWN:]
        return json(
            [{"txid": tx.txid, "fee": tx.fee, "vsize": tx.weight // 4, "value": tx.in_sat} for tx in reversed(latest)]
        )

    # --- blocks ---

    def tip_height(self) -> Response:
        """Respond to `blocks/tip/height`."""
        return text(self._chain.tip.height)

    def tip_hash(self) -> Response:
        """Respond to `blocks/tip/hash`."""
        return text(self._chain.tip.hash)

    def block_height(self, height: str) -> Response:
        """Respond to `block-height/:h`."""
        if not height.isdecimal():
            return text("Invalid number", 400)
        if height == "0":
            return text(GENESIS[self._network])
        block = self._chain.block_at(int(height))
        return _no_block(None) if block is None else text(block.hash)

    def blocks(self, height: str | None = None) -> Response:
        """Respond to `blocks` and `blocks/:h`."""
        highest = int(height) if height is not None and height.isdecimal() else self._chain.tip.height
        if highest > self._chain.tip.height:
            return _no_block(None)
        shown = [block for block in self._chain.blocks if block.height <= highest][-BLOCKS_SHOWN:]
        return json([self._block(block) for block in reversed(shown)])

    def block(self, block_hash: str) -> Response:
        """Respond to `block/:hash`, for the best chain only."""
        block = self._best(block_hash)
        return _no_block(block_hash) if block is None else json(self._block(block))

    def block_status(self, block_hash: str) -> Response:
        """Respond to `block/:hash/status`."""
        if not ID.fullmatch(block_hash):
            return _no_block(block_hash)
        block = self._best(block_hash)
        if block is None:
            return json({"in_best_chain": False, "height": None, "next_best": None})
        after = self._chain.block_at(block.height + 1)
        return json({"in_best_chain": True, "height": block.height, "next_best": after.hash if after else None})

    def block_header(self, block_hash: str) -> Response:
        """Respond to `block/:hash/header`, for the best chain only."""
        block = self._best(block_hash)
        return _no_block(block_hash) if block is None else text(header_of(block).hex())

    def block_raw(self, block_hash: str) -> Response:
        """Respond to `block/:hash/raw`, for the best chain only."""
        block = self._best(block_hash)
        return _no_block(block_hash) if block is None else Response(block_bytes(block), kind=BYTES)

    def block_txids(self, block_hash: str) -> Response:
        """Respond to `block/:hash/txids`, also for a stale block."""
        block = self._chain.block_by_hash(block_hash)
        return _no_block(block_hash) if block is None else json(block.txids)

    def block_txid(self, block_hash: str, index: str) -> Response:
        """Respond to `block/:hash/txid/:index`, also for a stale block."""
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            return _no_block(block_hash)
        if not index.isdecimal():
            return text("Invalid number", 400)
        place = int(index)
        return text(block.txids[place]) if place < len(block.txs) else text("tx index out of range", 404)

    def block_txs(self, block_hash: str, index: str = "0") -> Response:
        """Respond to `block/:hash/txs/:index`: 25 from a multiple of 25, also for a stale block."""
        block = self._chain.block_by_hash(block_hash)
        if block is None:
            return _no_block(block_hash)
        start = int(index) if index.isdecimal() else 0
        if start >= len(block.txs):
            return text("start index out of range", 404)
        if start % TXS_PER_PAGE:
            return text(f"start index must be a multipication of {TXS_PER_PAGE}", 400)
        return json(self._frames(block.txs[start : start + TXS_PER_PAGE]))

    def _frames(self, txs: Iterable[Tx]) -> list[frames.Json]:
        return [self._frame(tx) for tx in txs]

    def _best(self, block_hash: str) -> Block | None:
        return None if block_hash in self._chain.stale else self._chain.block_by_hash(block_hash)

    def _block(self, block: Block) -> frames.Json:
        size, weight = block_size(block)
        return {
            "id": block.hash,
            "height": block.height,
            "version": BLOCK_VERSION,
            "timestamp": block.timestamp,
            "tx_count": len(block.txs),
            "size": size,
            "weight": weight,
            "merkle_root": block.merkle_root,
            "previousblockhash": block.previous,
            "mediantime": median_low(self._times(block)),
            "nonce": block.nonce,
            "bits": block.bits,
            "difficulty": DIFFICULTY[self._network],
        }

    def _times(self, block: Block) -> Sequence[int]:
        known = (self._chain.block_at(height) for height in range(block.height - 10, block.height + 1))
        return [each.timestamp for each in known if each is not None]


def _no_tx(txid: str) -> Response:
    return text("Transaction not found", 404) if ID.fullmatch(txid) else text("Invalid hex string", 400)


def _no_block(block_hash: str | None) -> Response:
    if block_hash is not None and not ID.fullmatch(block_hash):
        return text("Invalid hex string", 400)
    return text("Block not found", 404)
