"""The JSON of a block as a backend writes it: the header, and the `extras` that it computes."""

from whaled.simulator.chain import Block
from whaled.simulator.frames import Json, number
from whaled.simulator.market import fee_range, median_rate
from whaled.simulator.scripts import SPENDABLE, Network
from whaled.simulator.serial import BLOCK_VERSION, block_size, header_of

_SEGWIT = frozenset(kind for kind, size in SPENDABLE.items() if size.witness)
DIFFICULTY = {Network.REGTEST: 4.656542373906925e-10, Network.MAINNET: 113757508810854.03}


def block_frame(
    block: Block,
    network: Network,
    limit: int,
    *,
    stale: bool = False,
    similarity: float | None = None,
    database: bool = False,
) -> Json:
    """Return an element of `blocks`, or `block`.

    `similarity` (to the projected block) exists only for blocks that the backend received live; the pool's id and the
    match rate exist only with a database.
    """
    size, weight = block_size(block)
    extras = _extras(block, weight, limit)
    if similarity is not None:
        extras["similarity"] = number(similarity)
    if database:
        extras["pool"]["id"] = 0
        extras["matchRate"] = 100
    return {
        "id": block.hash,
        "height": block.height,
        "version": BLOCK_VERSION,
        "timestamp": block.timestamp,
        "bits": block.bits,
        "nonce": block.nonce,
        "difficulty": DIFFICULTY[network],
        "merkle_root": block.merkle_root,
        "tx_count": len(block.txs),
        "size": size,
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
        "coinbaseRaw": coinbase.coinbase,
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
        "coinbaseSignatureAscii": bytes.fromhex(coinbase.coinbase).decode("latin-1"),
        "header": header_of(block).hex(),
        "utxoSetSize": None,
        "totalInputAmt": None,
        "pool": {"name": "Unknown", "slug": "unknown", "minerNames": None},
        "matchRate": None,
        "expectedFees": None,
        "expectedWeight": None,
        "firstSeen": None,
    }
