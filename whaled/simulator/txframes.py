"""The JSON of a transaction as written by a backend that reads its node, and as written by electrs.

The two forms differ in their keys and the order of keys. The backend keeps the form of its data source
(`bitcoin-api.ts`, `esplora-api.ts`) and appends its own fields (`transaction-utils.ts`).
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import msgspec

from whaled.model import NULL_TXID, SAT_PER_BTC
from whaled.simulator.chain import Block
from whaled.simulator.flags import CPFP_CHILD, CPFP_PARENT, REPLACEMENT, flags_of
from whaled.simulator.frames import ENCODER, Json, number
from whaled.simulator.market import Seen
from whaled.simulator.scripts import Script, ScriptType, witness_script_asm
from whaled.simulator.serial import COINBASE_WITNESS, signature
from whaled.simulator.transactions import Coin, Tx

# `bitcoin-api.ts`: for a page of a block's transactions the backend reads the prevouts of at most this many inputs, and
# computes the fee only if there are fewer.
EAGER_INPUTS = 13
# `transaction-utils.ts`: bytes that a signature operation counts as.
BYTES_PER_SIGOP = 5
NULL_VOUT = 0xFFFFFFFF
# Signature operations of an output script; those of legacy script types count fourfold.
_OUTPUT_SIGOPS = {ScriptType.P2PK: 4, ScriptType.P2PKH: 4, ScriptType.MULTISIG: 80}
# Signature operations of an input's witness; a backend counts them only if the prevout is filled.
_INPUT_SIGOPS = {ScriptType.P2WPKH: 1, ScriptType.P2SH: 1, ScriptType.P2WSH: 3}


def unrounded(fee: int) -> float:
    """Return the fee that the backend computes for a transaction its mempool never had: BTC times 1e8 in doubles."""
    return fee / SAT_PER_BTC * SAT_PER_BTC


# --- inputs and outputs ---


def core_output(value: int, script: Script) -> Json:
    """Return an output in the form of a backend that reads its node."""
    return {
        "value": value,
        "scriptpubkey": script.hex,
        "scriptpubkey_address": script.address,
        "scriptpubkey_asm": script.asm,
        "scriptpubkey_type": script.type,
    }


def electrs_output(value: int, script: Script) -> Json:
    """Return an output in electrs's form, which omits a missing address."""
    kind = ScriptType.UNKNOWN if script.type is ScriptType.NONSTANDARD else script.type
    frame: Json = {"scriptpubkey": script.hex, "scriptpubkey_asm": script.asm, "scriptpubkey_type": kind}
    if script.address:
        frame["scriptpubkey_address"] = script.address
    frame["value"] = value
    return frame


def core_tx(tx: Tx, fee: float, status: Json, *, prevouts: bool) -> Json:
    """Return a transaction in the form of a backend that reads its node."""
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
    """Return the redeem script of a P2SH input in assembly. The simulator's P2SH outputs are all nested P2WPKH."""
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
    """Return a transaction in electrs's form, which has all prevouts and omits empty keys."""
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
    """Return the number of signature operations as the backend counts them; electrs's count is that with prevouts."""
    count = sum(_OUTPUT_SIGOPS.get(payment.script.type, 0) for payment in tx.outputs)
    if prevouts:
        count += sum(_INPUT_SIGOPS.get(coin.script.type, 0) for coin in tx.inputs)
    return count


def status_of(block: Block | None, behind: int = 0) -> Json:
    """Return `status`.

    The backend derives the height from its own, so it is too low by the number of blocks that the backend is behind.
    """
    if block is None:
        return {"confirmed": False}
    return {
        "confirmed": True,
        "block_height": block.height - behind,
        "block_hash": block.hash,
        "block_time": block.timestamp,
    }


# --- transactions of the mempool ---


def full_tx(seen: Seen, *, electrs: bool, behind: int = 0) -> msgspec.Raw:
    """Return an element of `added` or `replaced[].by`, encoded once. `electrs`: the backend reads electrs."""
    if not seen.frame:
        seen.frame = ENCODER.encode(mempool_tx(seen, electrs=electrs, behind=behind))
    return msgspec.Raw(seen.frame)


def mempool_tx(seen: Seen, *, electrs: bool, behind: int = 0) -> Json:
    """Return a transaction of the mempool. One that electrs did not know when its block came has the node's form."""
    tx, status = seen.tx, status_of(seen.block, behind)
    is_electrs = electrs and not seen.is_from_node
    prevouts = is_electrs or seen.has_prevouts
    frame = electrs_tx(tx, status) if is_electrs else core_tx(tx, seen.fee, status, prevouts=prevouts)
    # The count from when the transaction was fetched stays, even if its prevouts are filled later.
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
    # It is classified before it is known to be a replacement, and again when REST fills its prevouts.
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
    """Return the vsize by which the backend ranks, in which `count` signature operations count as bytes."""
    return max(tx.vsize, count * BYTES_PER_SIGOP)


def effective(seen: Seen) -> float:
    """Return `effectiveFeePerVsize`: the transaction's own rate, or the package's if it has relatives."""
    is_in_mempool = seen.uid is not None or seen.first_seen is not None
    if seen.ancestors or seen.descendants or not is_in_mempool:
        return seen.rate
    return seen.fee / adjusted_vsize(seen.tx, seen.sigops)


def mined_rate(seen: Seen) -> float:
    """Return the rate in the summary of a block that the backend read live, in which the vsize is rounded up."""
    if seen.ancestors or seen.descendants:
        return seen.rate
    return seen.fee / ceil(adjusted_vsize(seen.tx, seen.sigops))


def flags(seen: Seen, *, prevouts: bool) -> int:
    """Return the bits of a transaction, including those for its relatives."""
    bits = flags_of(seen.tx, prevouts=prevouts)
    bits |= CPFP_PARENT if seen.descendants else 0
    bits |= CPFP_CHILD if seen.ancestors else 0
    return bits | (REPLACEMENT if seen.is_replacement else 0)


def projected_flags(seen: Seen, *, prevouts: bool) -> int:
    """Return the bits in projected blocks, where a replacement is known only one change after its own."""
    bits = flags(seen, prevouts=prevouts)
    return bits if seen.is_known_replacement else bits & ~REPLACEMENT


# --- transactions of REST ---


def found_tx(tx: Tx, status: Json) -> Json:
    """Return `tx/:txid` for a transaction that is not in the backend's mempool."""
    frame, count = core_tx(tx, tx.fee, status, prevouts=True), sigops(tx, prevouts=True)
    return frame | _extended(tx, tx.fee, tx.fee / adjusted_vsize(tx, count), count=count)


def page_tx(tx: Tx, status: Json) -> Json:
    """Return an element of `block/:hash/txs/:index`.

    With 13 inputs or more the fee is -1, so the rates are negative too. Inputs after the 13th have `lazy`.
    """
    fee = -1 if len(tx.inputs) >= EAGER_INPUTS else tx.fee
    frame = core_tx(tx, fee, status, prevouts=True)
    for each in frame["vin"][EAGER_INPUTS:]:
        each |= {"prevout": None, "inner_redeemscript_asm": "", "inner_witnessscript_asm": "", "lazy": True}
    rate = number(fee / tx.vsize)
    return {"vsize": number(tx.vsize), "feePerVsize": rate, "effectiveFeePerVsize": rate, **frame}


def stale_page_tx(tx: Tx, status: Json, now: int) -> Json:
    """Return an element of `block/:hash/txs/:index` for a stale block: its transactions count as pending."""
    frame = page_tx(tx, status)
    count = sigops(tx, prevouts=True)
    fee = frame["fee"]
    del frame["vsize"], frame["feePerVsize"], frame["effectiveFeePerVsize"]
    frame |= _extended(tx, fee, fee / adjusted_vsize(tx, count), count=count)
    return frame | {"firstSeen": now}


# --- short forms ---


def stripped(seen: Seen, rate: float | None = None) -> Json:
    """Return the stripped form (`common.ts`): `value` is the sum of the outputs; no `time` if never in the mempool."""
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
    """Return an element of `block/:hash/summary`."""
    return stripped(seen, rate) | {"flags": flags(seen, prevouts=prevouts)}


def compressed(seen: Seen, *, prevouts: bool) -> list[Any]:
    """Return an element of `projected-block-transactions`, with the rate rounded to hundredths."""
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
    """Return a rate rounded to hundredths, as JavaScript rounds."""
    return number(int(rate * 100 + 0.5) / 100)


def projected_block(index: int, sequence: int, txs: Sequence[Seen], *, prevouts: bool) -> Json:
    """Return the response to `track-mempool-block`."""
    lines = [compressed(seen, prevouts=prevouts) for seen in txs]
    return {"index": index, "sequence": sequence, "blockTransactions": lines}
