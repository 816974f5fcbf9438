"""The JSON a backend writes. Every shape here is held against a recording of a real one by a test.

JavaScript knows one kind of number: 8.0 is written 8. `number` does that; amounts, counts and heights are integers.
"""

from collections.abc import Iterable, Sequence
from hashlib import shake_128
from math import ceil
from typing import Any

import msgspec

from whaled.model import SAT_PER_BTC
from whaled.simulator.chain import Block
from whaled.simulator.market import Adjustment, Fees, Projected, Seen
from whaled.simulator.scripts import Script, ScriptType, spend
from whaled.simulator.transactions import REPLACEABLE, Coin, Payment, Tx, TxKind

Json = dict[str, Any]  # a frame about to be encoded; nothing reads it

# `bitcoin-api.ts`: a page of a block's transactions carries no more prevouts per transaction.
EAGER_INPUTS = 13

ENCODER = msgspec.json.Encoder()

# Bits of `flags` (`mempool.interfaces.ts`).
_FLAG_OF_TYPE = {
    ScriptType.P2PK: 1 << 8,
    ScriptType.MULTISIG: 1 << 9,
    ScriptType.P2PKH: 1 << 10,
    ScriptType.P2SH: 1 << 11,
    ScriptType.P2WPKH: 1 << 12,
    ScriptType.P2WSH: 1 << 13,
    ScriptType.P2TR: 1 << 14,
    ScriptType.OP_RETURN: 1 << 24,
    ScriptType.NONSTANDARD: 1 << 5,
}
_FLAG_OF_KIND = {TxKind.COINJOIN: 1 << 32, TxKind.CONSOLIDATION: 1 << 33, TxKind.BATCH: 1 << 34}
_FLAG_OF_VERSION = {1: 1 << 2, 2: 1 << 3, 3: 1 << 4}
_RBF, _NO_RBF, _CPFP_PARENT, _CPFP_CHILD, _REPLACEMENT = 1, 2, 1 << 16, 1 << 17, 1 << 18
_SIGHASH_ALL = 1 << 40
_SIGNED_FIELD_TYPES = frozenset({ScriptType.P2WPKH, ScriptType.P2WSH, ScriptType.P2SH})


def number(value: float) -> float:
    """As JavaScript writes it: whole numbers without a point."""
    return int(value) if value == int(value) else value


# --- transactions ---


def full_tx(seen: Seen, *, prevouts: bool) -> msgspec.Raw:
    """A transaction as in `added` and `replaced[].by`, encoded once."""
    if not seen.frame:
        seen.frame = ENCODER.encode(_mempool_tx(seen, prevouts=prevouts))
    return msgspec.Raw(seen.frame)


def _mempool_tx(seen: Seen, *, prevouts: bool) -> Json:
    tx = seen.tx
    own = seen.fee / tx.vsize
    frame = bare_tx(tx, seen.fee, prevouts=prevouts)
    frame["status"] = status(seen.block)
    frame |= {
        "order": int.from_bytes(bytes.fromhex(tx.txid[-8:])[::-1], "big"),
        "vsize": ceil(tx.vsize),
        "adjustedVsize": number(tx.vsize),
        "sigops": 0,
        "feePerVsize": number(own),
        "adjustedFeePerVsize": number(own),
        "effectiveFeePerVsize": number(seen.rate if seen.uid is not None else seen.fee / ceil(tx.vsize)),
    }
    if seen.first_seen is not None:
        frame["firstSeen"] = seen.first_seen
    if seen.uid is not None:
        frame |= {
            "uid": seen.uid,
            "cpfpDirty": bool(seen.ancestors or seen.descendants),
            "ancestors": [_relative(each) for each in seen.ancestors],
            "descendants": [_relative(each) for each in seen.descendants],
            "bestDescendant": None,
            "position": {"block": seen.in_block, "vsize": number(seen.at_vsize)},
        }
        if seen.ancestors or seen.descendants:
            frame["cpfpChecked"] = True
    frame["flags"] = flags(seen)
    if seen.is_replacement:
        frame["replacement"] = True
    return frame


def bare_tx(tx: Tx, fee: int, *, prevouts: bool) -> Json:
    """What a transaction is, without what the mempool adds. A coinbase has the one input that spends nothing."""
    if tx.is_coinbase:
        vin = [_coinbase_input(tx)]
    else:
        vin = [_input(coin, tx, place, prevouts=prevouts) for place, coin in enumerate(tx.inputs)]
    return {
        "txid": tx.txid,
        "version": tx.version,
        "locktime": tx.locktime,
        "size": tx.size,
        "weight": tx.weight,
        "fee": fee,
        "vin": vin,
        "vout": [output(payment) for payment in tx.outputs],
    }


def _input(coin: Coin, tx: Tx, place: int, *, prevouts: bool) -> Json:
    data = spend(coin.script.type, f"{tx.txid}/{place}")
    return {
        "is_coinbase": False,
        "prevout": output(Payment(coin.value, coin.script)) if prevouts else None,
        "scriptsig": data.scriptsig,
        "scriptsig_asm": data.scriptsig_asm,
        "sequence": tx.sequence,
        "txid": coin.txid,
        "vout": coin.vout,
        "witness": data.witness,
        "inner_redeemscript_asm": "",
        "inner_witnessscript_asm": "",
    }


def _coinbase_input(tx: Tx) -> Json:
    return {
        "is_coinbase": True,
        "prevout": None,
        "scriptsig": "03" + tx.txid[:6] + "0101",
        "scriptsig_asm": f"OP_PUSHBYTES_3 {tx.txid[:6]} OP_PUSHBYTES_1 01",
        "sequence": tx.sequence,
        "txid": "0" * 64,
        "vout": 0xFFFFFFFF,
        "witness": ["0" * 64],
        "inner_redeemscript_asm": "",
        "inner_witnessscript_asm": "",
    }


def output(payment: Payment) -> Json:
    """An output, or what an input spends."""
    script: Script = payment.script
    return {
        "value": payment.value,
        "scriptpubkey": script.hex,
        "scriptpubkey_address": script.address,
        "scriptpubkey_asm": script.asm,
        "scriptpubkey_type": script.type,
    }


def status(block: Block | None) -> Json:
    """`status` of a transaction: `block` is the one it is in, or None."""
    if block is None:
        return {"confirmed": False}
    return {
        "confirmed": True,
        "block_height": block.height,
        "block_hash": block.hash,
        "block_time": block.timestamp,
    }


def rest_tx(seen: Seen, *, lazy: bool = False) -> Json:
    """A transaction as REST gives it, with prevouts. `lazy`: those past the 13th input are left out, and the fee."""
    tx = seen.tx
    frame = bare_tx(tx, seen.fee, prevouts=True)
    if lazy and len(tx.inputs) > EAGER_INPUTS:
        frame["fee"] = -1
        for each in frame["vin"][EAGER_INPUTS:]:
            each |= {"prevout": None, "lazy": True}
    frame["status"] = status(seen.block)
    if seen.block is None:
        frame |= {"vsize": ceil(tx.vsize), "effectiveFeePerVsize": number(seen.rate)}
        if seen.first_seen is not None:
            frame["firstSeen"] = seen.first_seen
    return frame


def stripped(seen: Seen) -> Json:
    """One of the latest `transactions`; `time` only if the backend knows it."""
    frame = strip(seen.tx, seen.fee)
    if seen.first_seen is not None:
        frame["time"] = seen.first_seen
    return frame


def strip(tx: Tx, fee: int) -> Json:
    """A transaction in a line: `value` is the sum of the outputs, satoshi."""
    return {
        "txid": tx.txid,
        "fee": fee,
        "vsize": number(tx.vsize),
        "value": tx.out_sat,
        "rate": number(fee / tx.vsize),
    }


def compressed(seen: Seen) -> list[Any]:
    """A transaction as `projected-block-transactions` has it."""
    tx = seen.tx
    return [
        tx.txid,
        seen.fee,
        number(tx.vsize),
        tx.out_sat,
        number(seen.rate),
        flags(seen),
        seen.first_seen or 0,
    ]


def flags(seen: Seen) -> int:
    """The bits a backend sets: signalling, version, script types, relatives."""
    bits = flags_of(seen.tx)
    bits |= _CPFP_PARENT if seen.descendants else 0
    bits |= _CPFP_CHILD if seen.ancestors else 0
    return bits | (_REPLACEMENT if seen.is_replacement else 0)


def flags_of(tx: Tx) -> int:
    """The bits that a transaction has by itself."""
    bits = (_RBF if tx.sequence <= REPLACEABLE else _NO_RBF) | _FLAG_OF_VERSION[tx.version]
    bits |= _FLAG_OF_KIND.get(tx.kind, 0)
    for payment in tx.outputs:
        bits |= _FLAG_OF_TYPE.get(payment.script.type, 0)
    if any(coin.script.type in _SIGNED_FIELD_TYPES for coin in tx.inputs):
        bits |= _SIGHASH_ALL
    return bits


def _relative(tx: Tx) -> Json:
    return {"txid": tx.txid, "fee": tx.fee, "weight": tx.weight}


def projected_block(index: int, sequence: int, txs: Sequence[Seen]) -> Json:
    """The answer to `track-mempool-block`."""
    return {"index": index, "sequence": sequence, "blockTransactions": [compressed(seen) for seen in txs]}


# --- the market ---


def mempool_info(txs: Iterable[Tx], limit: int) -> Json:
    """`mempoolInfo`, the node's getmempoolinfo: fees in BTC."""
    count = size = fees = 0
    for tx in txs:
        count += 1
        size += ceil(tx.vsize)
        fees += tx.fee
    return {
        "loaded": True,
        "size": count,
        "bytes": size,
        "usage": 64 + size * 6,
        "total_fee": number(fees / SAT_PER_BTC),
        "maxmempool": limit,
        "mempoolminfee": 0.00001,
        "minrelaytxfee": 0.00001,
        "unbroadcastcount": 0,
    }


def mempool_blocks(blocks: Sequence[Projected]) -> list[Json]:
    """`mempool-blocks`."""
    return [
        {
            "blockSize": block.size,
            "blockVSize": number(block.weight / 4),
            "nTx": len(block.txs),
            "totalFees": block.fees,
            "medianFee": number(block.median),
            "feeRange": [number(rate) for rate in block.fee_range],
        }
        for block in blocks
    ]


def fees(recommended: Fees) -> Json:
    """`fees`, and REST `fees/...`."""
    return {
        "fastestFee": number(recommended.fastest),
        "halfHourFee": number(recommended.half_hour),
        "hourFee": number(recommended.hour),
        "economyFee": number(recommended.economy),
        "minimumFee": number(recommended.minimum),
    }


def difficulty(estimate: Adjustment) -> Json:
    """`da`."""
    return {
        "progressPercent": number(estimate.progress),
        "difficultyChange": number(estimate.change),
        "estimatedRetargetDate": estimate.retarget_at,
        "remainingBlocks": estimate.remaining,
        "remainingTime": estimate.remaining_ms,
        "previousRetarget": 0,
        "previousTime": estimate.previous_time,
        "nextRetargetHeight": estimate.next_height,
        "timeAvg": estimate.spacing_ms,
        "adjustedTimeAvg": estimate.spacing_ms,
        "timeOffset": 0,
        "expectedBlocks": number(estimate.expected),
    }


def backend_info(hostname: str) -> Json:
    """`backendInfo`."""
    return {
        "hostname": hostname,
        "version": "3.4-dev",
        "gitCommit": shake_128(b"whaled simulator").hexdigest(5)[:9],
        "lightning": False,
        "backend": "none",
        "coreVersion": "/Satoshi:28.1.0/",
        "osVersion": "whaled simulator",
    }
