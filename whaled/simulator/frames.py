"""The JSON that a backend writes. A test compares every shape with a recording of a real backend.

JavaScript has only one type of number and writes 8.0 as 8, as `number` does. Amounts, counts and heights are integers.
"""

from collections.abc import Iterable, Sequence
from hashlib import shake_128
from math import ceil
from typing import Any

import msgspec

from whaled.model import SAT_PER_BTC
from whaled.simulator.market import Adjustment, Fees, Projected
from whaled.simulator.settings import Mode
from whaled.simulator.transactions import Tx

Json = dict[str, Any]  # only encoded, never read

ENCODER = msgspec.json.Encoder()


def number(value: float) -> float:
    """Return a number as JavaScript writes it: integers without a decimal point."""
    return int(value) if value == int(value) else value


# --- the market ---


def mempool_info(txs: Iterable[Tx], limit: int) -> Json:
    """Return `mempoolInfo`, the node's getmempoolinfo, with fees in BTC."""
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
    """Return `mempool-blocks`."""
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
    """Return `fees`, also the response to REST `fees/...`."""
    return {
        "fastestFee": number(recommended.fastest),
        "halfHourFee": number(recommended.half_hour),
        "hourFee": number(recommended.hour),
        "economyFee": number(recommended.economy),
        "minimumFee": number(recommended.minimum),
    }


def difficulty(estimate: Adjustment) -> Json:
    """Return `da`."""
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


def backend_info(hostname: str, mode: Mode) -> Json:
    """Return `backendInfo`."""
    return {
        "hostname": hostname,
        "version": "3.4-dev",
        "gitCommit": shake_128(b"whaled simulator").hexdigest(5)[:9],
        "lightning": False,
        "backend": mode,
        "coreVersion": "/Satoshi:28.1.0/",
        "osVersion": "whaled simulator",
    }
