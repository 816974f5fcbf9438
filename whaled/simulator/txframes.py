"""A transaction as it is written by a backend that reads its node, and as electrs writes it.

The two forms differ in keys and their order. The backend takes over the form of what it reads (`bitcoin-api.ts`,
`esplora-api.ts`) and adds its own fields behind (`transaction-utils.ts`).
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import msgspec

from whaled.model import SAT_PER_BTC
from whaled.simulator.chain import Block
from whaled.simulator.flags import CPFP_CHILD, CPFP_PARENT, REPLACEMENT, flags_of
from whaled.simulator.frames import ENCODER, Json, number
from whaled.simulator.market import Seen
from whaled.simulator.scripts import Script, ScriptType, witness_script_asm
from whaled.simulator.serial import COINBASE_WITNESS, signature
from whaled.simulator.transactions import Coin, Tx

# `bitcoin-api.ts`: in a page of a block's transactions the prevouts of so many inputs are read, and the fee only if
# there are fewer.
EAGER_INPUTS = 13
# `transaction-utils.ts`: bytes that a signature operation counts for.
BYTES_PER_SIGOP = 5
NULL_TXID, NULL_VOUT = "0" * 64, 0xFFFFFFFF
# Signature operations in an output script; those of old script types count fourfold.
_OUTPUT_SIGOPS = {ScriptType.P2PK: 4, ScriptType.P2PKH: 4, ScriptType.MULTISIG: 80}
# In what a witness proves; a backend sees it only where the prevout is filled.
_INPUT_SIGOPS = {ScriptType.P2WPKH: 1, ScriptType.P2SH: 1, ScriptType.P2WSH: 3}


def unrounded(fee: int) -> float:
    """A fee as the backend reckons it for what its mempool never had: the node's BTC times 1e8, in doubles."""
    return fee / SAT_PER_BTC * SAT_PER_BTC


# --- what is spent and paid ---


def core_output(value: int, script: Script) -> Json:
    """An output as a backend that reads its node writes it."""
    return {
        "value": value,
        "scriptpubkey": script.hex,
        "scriptpubkey_address": script.address,
        "scriptpubkey_asm": script.asm,
        "scriptpubkey_type": script.type,
    }


def electrs_output(value: int, script: Script) -> Json:
    """An output as electrs writes it: without an address where there is none."""
    kind = ScriptType.UNKNOWN if script.type is ScriptType.NONSTANDARD else script.type
    frame: Json = {"scriptpubkey": script.hex, "scriptpubkey_asm": script.asm, "scriptpubkey_type": kind}
    if script.address:
        frame["scriptpubkey_address"] = script.address
    frame["value"] = value
    return frame


def core_tx(tx: Tx, fee: float, status: Json, *, prevouts: bool) -> Json:
    """A transaction as a backend reads it from its node."""
    spending = [_core_input(coin, tx, prevouts=prevouts) for coin in tx.inputs]
    return {
        "txid": tx.txid,
        "version": tx.version,
        "locktime": 0,
        "size": tx.size,
        "weight": tx.weight,
        "fee": number(fee),
        "vin": spending or [_core_coinbase(tx)],
        "vout": [core_output(payment.value, payment.script) for payment in tx.outputs],
        "status": status,
    }


def _core_input(coin: Coin, tx: Tx, *, prevouts: bool) -> Json:
    data = signature(coin, tx.fee)
    kind = coin.script.type
    return {
        "is_coinbase": False,
        "prevout": core_output(coin.value, coin.script) if prevouts else None,
        "scriptsig": data.scriptsig,
        "scriptsig_asm": data.scriptsig_asm,
        "sequence": tx.sequence,
        "txid": coin.txid,
        "vout": coin.vout,
        "witness": data.witness,
        "inner_redeemscript_asm": _redeem_asm(data.scriptsig) if prevouts and kind is ScriptType.P2SH else "",
        "inner_witnessscript_asm": witness_script_asm(data) if prevouts and kind is ScriptType.P2WSH else "",
    }


def _redeem_asm(scriptsig: str) -> str:
    """Of a P2SH input that spends a nested P2WPKH output: the only kind there is here."""
    return f"OP_0 OP_PUSHBYTES_20 {scriptsig[6:]}"


def _coinbase_asm(tx: Tx) -> str:
    return f"OP_PUSHBYTES_3 {tx.coinbase[2:8]} OP_PUSHBYTES_1 {tx.coinbase[10:]}"


def _core_coinbase(tx: Tx) -> Json:
    return {
        "is_coinbase": True,
        "prevout": None,
        "scriptsig": tx.coinbase,
        "scriptsig_asm": _coinbase_asm(tx),
        "sequence": tx.sequence,
        "txid": "",
        "vout": 0,
        "witness": [COINBASE_WITNESS],
        "inner_redeemscript_asm": "",
        "inner_witnessscript_asm": "",
    }


def electrs_tx(tx: Tx, status: Json) -> Json:
    """A transaction as electrs writes it: everything is known, and nothing is written that is empty."""
    vin = [_electrs_coinbase(tx)] if tx.is_coinbase else [_electrs_input(coin, tx) for coin in tx.inputs]
    return {
        "txid": tx.txid,
        "version": tx.version,
        "locktime": 0,
        "vin": vin,
        "vout": [electrs_output(payment.value, payment.script) for payment in tx.outputs],
        "size": tx.size,
        "weight": tx.weight,
        "sigops": sigops(tx, prevouts=True),
        "fee": tx.fee,
        "status": status,
    }


def _electrs_input(coin: Coin, tx: Tx) -> Json:
    data = signature(coin, tx.fee)
    frame: Json = {
        "txid": coin.txid,
        "vout": coin.vout,
        "prevout": electrs_output(coin.value, coin.script),
        "scriptsig": data.scriptsig,
        "scriptsig_asm": data.scriptsig_asm,
    }
    if data.witness:
        frame["witness"] = data.witness
    frame |= {"is_coinbase": False, "sequence": tx.sequence}
    if coin.script.type is ScriptType.P2SH:
        frame["inner_redeemscript_asm"] = _redeem_asm(data.scriptsig)
    if coin.script.type is ScriptType.P2WSH:
        frame["inner_witnessscript_asm"] = witness_script_asm(data)
    return frame


def _electrs_coinbase(tx: Tx) -> Json:
    return {
        "txid": NULL_TXID,
        "vout": NULL_VOUT,
        "prevout": None,
        "scriptsig": tx.coinbase,
        "scriptsig_asm": _coinbase_asm(tx),
        "witness": [COINBASE_WITNESS],
        "is_coinbase": True,
        "sequence": tx.sequence,
    }


def sigops(tx: Tx, *, prevouts: bool) -> int:
    """Signature operations as the backend counts them; electrs counts the same with prevouts."""
    count = sum(_OUTPUT_SIGOPS.get(payment.script.type, 0) for payment in tx.outputs)
    if prevouts:
        count += sum(_INPUT_SIGOPS.get(coin.script.type, 0) for coin in tx.inputs)
    return count


def status_of(block: Block | None, behind: int = 0) -> Json:
    """`status`. The backend counts the height down from its own, so it is too low by as many blocks as it is behind."""
    if block is None:
        return {"confirmed": False}
    return {
        "confirmed": True,
        "block_height": block.height - behind,
        "block_hash": block.hash,
        "block_time": block.timestamp,
    }


# --- the mempool's ---


def full_tx(seen: Seen, *, electrs: bool, behind: int = 0) -> msgspec.Raw:
    """A transaction as in `added` and `replaced[].by`, encoded once. `electrs`: the backend reads electrs."""
    if not seen.frame:
        seen.frame = ENCODER.encode(mempool_tx(seen, electrs=electrs, behind=behind))
    return msgspec.Raw(seen.frame)


def mempool_tx(seen: Seen, *, electrs: bool, behind: int = 0) -> Json:
    """A transaction of the mempool. What a block brought that electrs did not know yet has the node's form."""
    tx, status = seen.tx, status_of(seen.block, behind)
    is_electrs = electrs and not seen.is_from_node
    prevouts = is_electrs or seen.has_prevouts
    frame = electrs_tx(tx, status) if is_electrs else core_tx(tx, seen.fee, status, prevouts=prevouts)
    # What was counted when the transaction was fetched stays, also when its prevouts are filled later.
    frame |= _extended(tx, seen.fee, effective(seen), count=seen.sigops)
    if seen.first_seen is not None:
        frame["firstSeen"] = seen.first_seen
    if seen.uid is not None:
        frame["uid"] = seen.uid
    if seen.uid is not None or seen.first_seen is not None:
        relatives = bool(seen.ancestors or seen.descendants)
        frame |= {
            "cpfpDirty": relatives,
            "ancestors": [_relative(each) for each in seen.ancestors],
            "descendants": [_relative(each) for each in seen.descendants],
            "bestDescendant": None,
        }
        if relatives:
            frame["cpfpChecked"] = True
        if seen.descendants:
            frame["lastBoosted"] = seen.first_seen
        frame["position"] = {"block": seen.in_block, "vsize": number(seen.at_vsize)}
    bits = flags(seen, prevouts=prevouts)
    # First classified before it is known to be a replacement; again when REST fills its prevouts.
    frame["flags"] = bits if seen.has_prevouts else bits & ~REPLACEMENT
    if seen.is_replacement:
        frame["replacement"] = True
    return frame


def _extended(tx: Tx, fee: float, rate: float, *, count: int) -> Json:
    vsize = adjusted_vsize(tx, count)
    return {
        "order": int.from_bytes(bytes.fromhex(tx.txid[-8:])[::-1], "big"),
        "vsize": ceil(tx.vsize),
        "adjustedVsize": number(vsize),
        "sigops": count,
        "feePerVsize": number(fee / tx.vsize),
        "adjustedFeePerVsize": number(fee / vsize),
        "effectiveFeePerVsize": number(rate),
    }


def _relative(tx: Tx) -> Json:
    return {"txid": tx.txid, "fee": tx.fee, "weight": number(adjusted_vsize(tx, sigops(tx, prevouts=False)) * 4)}


def adjusted_vsize(tx: Tx, count: int) -> float:
    """What the backend ranks by: `count` signature operations stand for bytes."""
    return max(tx.vsize, count * BYTES_PER_SIGOP)


def effective(seen: Seen) -> float:
    """`effectiveFeePerVsize`: the transaction's own rate, but with relatives that of the package."""
    is_in_mempool = seen.uid is not None or seen.first_seen is not None
    if seen.ancestors or seen.descendants or not is_in_mempool:
        return seen.rate
    return seen.fee / adjusted_vsize(seen.tx, seen.sigops)


def mined_rate(seen: Seen) -> float:
    """Its rate in the summary of a block that the backend followed: the vsize is rounded up there."""
    if seen.ancestors or seen.descendants:
        return seen.rate
    return seen.fee / ceil(adjusted_vsize(seen.tx, seen.sigops))


def flags(seen: Seen, *, prevouts: bool) -> int:
    """The bits of a transaction and of its relatives."""
    bits = flags_of(seen.tx, prevouts=prevouts)
    bits |= CPFP_PARENT if seen.descendants else 0
    bits |= CPFP_CHILD if seen.ancestors else 0
    return bits | (REPLACEMENT if seen.is_replacement else 0)


def projected_flags(seen: Seen, *, prevouts: bool) -> int:
    """The bits as projected blocks have them: a replacement is known from the change after its own."""
    bits = flags(seen, prevouts=prevouts)
    return bits if seen.is_known_replacement else bits & ~REPLACEMENT


# --- REST's ---


def found_tx(tx: Tx, status: Json) -> Json:
    """`tx/:txid` of what is not in the backend's mempool."""
    frame, count = core_tx(tx, tx.fee, status, prevouts=True), sigops(tx, prevouts=True)
    return frame | _extended(tx, tx.fee, tx.fee / adjusted_vsize(tx, count), count=count)


def page_tx(tx: Tx, status: Json) -> Json:
    """One of `block/:hash/txs/:index`. From the 13th input on the fee is -1, and rates are negative with it; inputs
    beyond the 13th say that they are `lazy`.
    """
    fee = -1 if len(tx.inputs) >= EAGER_INPUTS else tx.fee
    frame = core_tx(tx, fee, status, prevouts=True)
    for each in frame["vin"][EAGER_INPUTS:]:
        each |= {"prevout": None, "inner_redeemscript_asm": "", "inner_witnessscript_asm": "", "lazy": True}
    rate = number(fee / tx.vsize)
    return {"vsize": number(tx.vsize), "feePerVsize": rate, "effectiveFeePerVsize": rate, **frame}


def stale_page_tx(tx: Tx, status: Json, now: int) -> Json:
    """The same in a dead block: what was only in it counts as pending."""
    frame = page_tx(tx, status)
    count = sigops(tx, prevouts=True)
    fee = frame["fee"]
    del frame["vsize"], frame["feePerVsize"], frame["effectiveFeePerVsize"]
    frame |= _extended(tx, fee, fee / adjusted_vsize(tx, count), count=count)
    return frame | {"firstSeen": now}


# --- in a line ---


def stripped(seen: Seen, rate: float | None = None) -> Json:
    """A transaction in a line (`common.ts`): `value` is the sum of the outputs; `time` only if the mempool had it."""
    tx = seen.tx
    frame: Json = {
        "txid": tx.txid,
        "fee": number(seen.fee),
        "vsize": number(tx.vsize),
        "value": tx.out_sat,
        "rate": number(effective(seen) if rate is None else rate),
    }
    if seen.first_seen is not None:
        frame["time"] = seen.first_seen
    return frame


def classified(seen: Seen, rate: float, *, prevouts: bool) -> Json:
    """A line of `block/:hash/summary`."""
    return stripped(seen, rate) | {"flags": flags(seen, prevouts=prevouts)}


def compressed(seen: Seen, *, prevouts: bool) -> list[Any]:
    """A transaction as `projected-block-transactions` has it: the rate in hundredths."""
    line = stripped(seen)
    numbers = (line[key] for key in ("fee", "vsize", "value"))
    return [
        line["txid"],
        *numbers,
        cents(effective(seen)),
        projected_flags(seen, prevouts=prevouts),
        line.get("time", 0),
    ]


def cents(rate: float) -> float:
    """A rate in hundredths, rounded as JavaScript rounds."""
    return number(int(rate * 100 + 0.5) / 100)


def projected_block(index: int, sequence: int, txs: Sequence[Seen], *, prevouts: bool) -> Json:
    """The answer to `track-mempool-block`."""
    lines = [compressed(seen, prevouts=prevouts) for seen in txs]
    return {"index": index, "sequence": sequence, "blockTransactions": lines}
