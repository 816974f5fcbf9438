"""A frame of whaled's own making, as the backend would send it. Pure."""

from msgspec.json import encode

from whaled.model import SAT_PER_BTC

# A P2WPKH output and its input, as small as a transaction gets.
WEIGHT = 438
FEE_SAT = 1_000
MAX_SAT = 21_000_000 * SAT_PER_BTC
# Scripts nobody can spend (the witness program is all zeros and all ones), so that no address of anybody is in it.
FROM = ("0014" + "00" * 20, "bc1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq9e75rs")
TO = ("0014" + "ff" * 20, "bc1qllllllllllllllllllllllllllllllllfglmy6")


def canary_frame(txid: str, value_sat: int) -> bytes:
    """A `mempool-transactions` message with one transaction that moves `value_sat`.

    The keys are those of a backend in esplora mode, which sends what is spent along, so that nothing has to be asked of
    the backend: the canary is to sing while the backend is away. Its sequence number is 0; the link never sees it.
    """
    fee_sat = min(FEE_SAT, MAX_SAT - value_sat)
    rate = fee_sat / (WEIGHT / 4)
    spent = {
        "is_coinbase": False,
        "prevout": _output(value_sat + fee_sat, FROM),
        "scriptsig": "",
        "scriptsig_asm": "",
        "sequence": 0xFFFF_FFFD,
        "txid": txid[::-1],
        "vout": 0,
        "witness": ["00" * 72, "00" * 33],
        "inner_redeemscript_asm": "",
        "inner_witnessscript_asm": "",
    }
    transaction = {
        "txid": txid,
        "version": 2,
        "locktime": 0,
        "size": 192,
        "weight": WEIGHT,
        "fee": fee_sat,
        "vin": [spent],
        "vout": [_output(value_sat, TO)],
        "status": {"confirmed": False},
        "order": 0,
        "vsize": WEIGHT / 4,
        "adjustedVsize": WEIGHT / 4,
        "sigops": 1,
        "feePerVsize": rate,
        "adjustedFeePerVsize": rate,
        "effectiveFeePerVsize": rate,
        "firstSeen": 1,
        "uid": 0,
        "cpfpDirty": False,
        "ancestors": [],
        "descendants": [],
        "bestDescendant": None,
        "position": {"block": 0, "vsize": WEIGHT / 8},
        "flags": 0,
    }
    delta = {"sequence": 0, "added": [transaction], "removed": [], "mined": [], "replaced": []}
    return encode({"mempool-transactions": delta})


def _output(value_sat: int, to: tuple[str, str]) -> dict[str, object]:
    script, address = to
    return {
        "value": value_sat,
        "scriptpubkey": script,
        "scriptpubkey_address": address,
        "scriptpubkey_asm": f"OP_0 OP_PUSHBYTES_20 {script[4:]}",
        "scriptpubkey_type": "v0_p2wpkh",
    }
