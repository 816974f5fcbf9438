"""A block as a backend writes it: header, and the `extras` it computes."""

from hashlib import sha256

from whaled.simulator.chain import Block
from whaled.simulator.frames import Json, flags_of, number, strip
from whaled.simulator.market import fee_range, median_rate
from whaled.simulator.scripts import SPENDABLE, Network
from whaled.simulator.transactions import Tx

_SEGWIT = frozenset(kind for kind, size in SPENDABLE.items() if size.witness)
# bits and difficulty: easiest possible on regtest, an ordinary day's on mainnet.
_BITS = {Network.REGTEST: 545259519, Network.MAINNET: 386043996}
_DIFFICULTY = {Network.REGTEST: 4.656542373906925e-10, Network.MAINNET: 113757508810854.03}


def block_frame(
    block: Block,
    network: Network,
    limit: int,
    *,
    stale: bool = False,
    similarity: float | None = None,
    database: bool = False,
) -> Json:
    """One of `blocks`, or `block`. `similarity` (to the projected block) is there only for blocks seen live; the
    pool's id and the match rate only with a database.
    """
    weight = sum(tx.weight for tx in block.txs) + 320
    extras = _extras(block, weight, limit)
    if similarity is not None:
        extras["similarity"] = number(similarity)
    if database:
        extras["pool"]["id"] = 0
        extras["matchRate"] = 100
    return {
        "id": block.hash,
        "height": block.height,
        "version": 805306368,
        "timestamp": block.timestamp,
        "bits": _BITS[network],
        "nonce": int(block.hash[-6:], 16),
        "difficulty": _DIFFICULTY[network],
        "merkle_root": sha256(block.hash.encode()).hexdigest(),
        "tx_count": len(block.txs),
        "size": sum(tx.size for tx in block.txs) + 80,
        "weight": weight,
        "previousblockhash": block.previous,
        "mediantime": block.mediantime,
        "stale": stale,
        "extras": extras,
    }


def _extras(block: Block, weight: int, limit: int) -> Json:
    coinbase, paying = block.txs[0], block.txs[1:]
    fees = sum(tx.fee for tx in paying)
    inputs = sum(len(tx.inputs) for tx in paying)
    outputs = sum(len(tx.outputs) for tx in block.txs)
    segwit = [tx for tx in paying if any(coin.script.type in _SEGWIT for coin in tx.inputs)]
    best_first = sorted(((tx.rate, tx.weight) for tx in paying), reverse=True)
    count = len(paying)
    payee = coinbase.outputs[0].script
    return {
        "reward": coinbase.out_sat,
        "coinbaseRaw": f"03{block.height:06x}010101"[:16],
        "orphans": [],
        "medianFee": number(median_rate(best_first, limit)),
        "feeRange": [number(rate) for rate in fee_range([rate for rate, _ in reversed(best_first)])],
        "totalFees": fees,
        "avgFee": fees // count if count else 0,
        "avgFeeRate": fees * 4 // weight,
        "utxoSetChange": outputs - inputs,
        "avgTxSize": number(round(sum(tx.size for tx in paying) / count, 2)) if count else 0,
        "totalInputs": inputs,
        "totalOutputs": outputs,
        "totalOutputAmt": sum(tx.out_sat for tx in paying),
        "segwitTotalTxs": len(segwit),
        "segwitTotalSize": sum(tx.size for tx in segwit),
        "segwitTotalWeight": sum(tx.weight for tx in segwit),
        "virtualSize": number(weight / 4),
        "coinbaseAddress": payee.address,
        "coinbaseAddresses": [payee.address],
        "coinbaseSignature": payee.asm,
        "coinbaseSignatureAscii": "\u0003\u0001\u0001\u0001",
        "header": _header(block),
        "utxoSetSize": None,
        "totalInputAmt": None,
        "pool": {"name": "Unknown", "slug": "unknown", "minerNames": None},
        "matchRate": None,
        "expectedFees": None,
        "expectedWeight": None,
        "firstSeen": None,
    }


def _header(block: Block) -> str:
    previous = bytes.fromhex(block.previous)[::-1].hex()
    root = bytes.fromhex(sha256(block.hash.encode()).hexdigest())[::-1].hex()
    time = block.timestamp.to_bytes(4, "little").hex()
    return f"00000030{previous}{root}{time}{'ffff7f20'}{bytes.fromhex(block.hash[-6:])[::-1].hex()}00"


def summary(block: Block) -> list[Json]:
    """REST `block/:hash/summary`: every transaction in a line, coinbase first."""
    return [_line(tx, block) for tx in block.txs]


def _line(tx: Tx, block: Block) -> Json:
    return {**strip(tx, tx.fee), "flags": flags_of(tx), "time": block.timestamp}
