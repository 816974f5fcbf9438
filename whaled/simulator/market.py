"""The values that a backend derives: projected blocks, recommended fees, the difficulty adjustment, prices.

Follows the backend's rules (`mempool-blocks.ts`, `fee-api.ts`, `difficulty-adjustment.ts`). Its constants for a block
of 4 million weight units are scaled if the simulator fills smaller blocks.
"""

from collections.abc import Sequence
from math import ceil

from msgspec import Struct

from whaled.simulator.chain import Block
from whaled.simulator.transactions import Tx

MINIMUM_FEE = 1.0
RETARGET_BLOCKS = 2016
TARGET_SPACING_S = 600


class Seen(Struct, eq=False):
    """A transaction as the backend has it. `uid` counts the fetched transactions, `rate` ranks them.

    `block` is set if the transaction was mined before it was fetched. `fee` is 0 if the backend does not know it, and
    not an integer if a block brought the transaction. `is_known_replacement`: it was known to be a replacement when
    blocks were last projected, which happens before replaced transactions are searched. `has_prevouts`: a REST request
    filled its prevouts. `is_from_node`: a backend that reads electrs read it from the node, since electrs did not know
    it yet.
    """

    tx: Tx
    fee: float
    uid: int | None
    first_seen: int | None
    rate: float
    ancestors: tuple[Tx, ...] = ()
    descendants: tuple[Tx, ...] = ()
    block: Block | None = None
    is_replacement: bool = False
    is_known_replacement: bool = False
    sigops: int = 0
    has_prevouts: bool = False
    is_from_node: bool = False
    in_block: int = 0
    at_vsize: float = 0.0
    frame: bytes = b""


class Projected(Struct, frozen=True):
    """A projected block. `txs` are sorted by rate, best first. Rates are in sat/vB."""

    txs: list[Seen]
    size: int
    weight: int
    fees: float
    median: float
    fee_range: tuple[float, ...]


class Fees(Struct, frozen=True):
    """Recommended fee rates, sat/vB."""

    fastest: float = MINIMUM_FEE
    half_hour: float = MINIMUM_FEE
    hour: float = MINIMUM_FEE
    economy: float = MINIMUM_FEE
    minimum: float = MINIMUM_FEE


def project(mempool: Sequence[Seen], limit: int, count: int) -> list[Projected]:
    """Project the next `count` blocks of `limit` weight units; the last has all the rest. Sets each one's position."""
    blocks: list[Projected] = []
    chosen: list[Seen] = []
    weight = 0
    for seen in sorted(mempool, key=lambda each: -each.rate):
        if weight + seen.tx.weight > limit and chosen and len(blocks) < count - 1:
            blocks.append(_summarise(chosen, weight, limit))
            chosen, weight = [], 0
        seen.in_block, seen.at_vsize = len(blocks), (weight + seen.tx.weight / 2) / 4
        weight += seen.tx.weight
        chosen.append(seen)
    if chosen:
        blocks.append(_summarise(chosen, weight, limit))
    return blocks


def _summarise(chosen: list[Seen], weight: int, limit: int) -> Projected:
    return Projected(
        txs=chosen,
        size=sum(seen.tx.size for seen in chosen),
        weight=weight,
        fees=sum(seen.fee for seen in chosen),
        median=median_rate([(seen.rate, seen.tx.weight) for seen in chosen], limit),
        fee_range=fee_range([seen.rate for seen in reversed(chosen)]),
    )


def median_rate(rates: Sequence[tuple[float, int]], limit: int) -> float:
    """Return the rate in the middle of a full block, from (rate, weight), best first; 0 if it is not half full."""
    weight = 0
    for rate, each in rates:
        weight += each
        if weight * 2 >= limit:
            return rate
    return 0.0


def fee_range(ascending: Sequence[float]) -> tuple[float, ...]:
    """Return the minimum, 10th, 25th, 50th, 75th and 90th percentile, and maximum; zeros if empty."""
    if not ascending:
        return (0.0,) * 7
    last = len(ascending) - 1
    return tuple(ascending[round(last * share)] for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))


def recommend(blocks: Sequence[Projected], limit: int, *, whole: bool) -> Fees:
    """Return the recommended fees.

    With `whole` they are integers (`fees/recommended`). Otherwise they are in thousandths, and the two fastest are
    higher by 0.5 and 0.25 (`fees/precise` and the stream).
    """
    rates: list[float] = []
    for place in range(3):
        previous = rates[-1] if rates else None
        rates.append(_optimise(blocks, place, previous, limit, whole) if place < len(blocks) else MINIMUM_FEE)
    economy = max(MINIMUM_FEE, min(2 * MINIMUM_FEE, rates[2]))
    hour = max(rates[2], economy)
    half_hour = max(rates[1], hour)
    fastest = max(rates[0], half_hour)
    return Fees(fastest + (0 if whole else 0.5), half_hour + (0 if whole else 0.25), hour, economy, MINIMUM_FEE)


def _optimise(blocks: Sequence[Projected], place: int, previous: float | None, limit: int, whole: bool) -> float:
    block = blocks[place]
    used = block.median if previous is None else (block.median + previous) / 2
    if block.weight <= limit / 2 or block.median < MINIMUM_FEE:
        return MINIMUM_FEE
    if block.weight <= limit * 0.95 and place + 1 == len(blocks):
        used *= (block.weight - limit / 2) / (limit / 2)
    step = 1.0 if whole else 0.001
    return max(MINIMUM_FEE, round(ceil(round(used / step, 6)) * step, 3))


class Adjustment(Struct, frozen=True):
    """The difficulty adjustment as in `da`. Times are in milliseconds, except `previous_time` in seconds."""

    progress: float
    change: float
    retarget_at: int
    remaining: int
    remaining_ms: int
    previous_time: int
    next_height: int
    spacing_ms: int
    expected: float


def adjustment(tip: Block, first: Block, now: float) -> Adjustment:
    """Estimate the adjustment from the mean spacing of the known blocks, assumed for the whole epoch."""
    spacing = max(1.0, (tip.timestamp - first.timestamp) / max(1, tip.height - first.height))
    done = tip.height % RETARGET_BLOCKS
    remaining = RETARGET_BLOCKS - done
    began = tip.timestamp - done * spacing
    # Consensus limits a change of difficulty to a factor of four.
    change = min(300.0, max(-75.0, (TARGET_SPACING_S / spacing - 1) * 100))
    return Adjustment(
        progress=done / RETARGET_BLOCKS * 100,
        change=change,
        retarget_at=int((now + remaining * spacing) * 1000),
        remaining=remaining,
        remaining_ms=int(remaining * spacing * 1000),
        previous_time=int(began),
        next_height=tip.height + remaining,
        spacing_ms=int(spacing * 1000),
        expected=(now - began) / TARGET_SPACING_S,
    )


# Approximate exchange rates per US dollar. Only the keys matter.
PER_USD = {
    "USD": 1.0, "EUR": 0.92, "GBP": 0.78, "CAD": 1.37, "CHF": 0.88, "AUD": 1.52, "JPY": 151.0, "BGN": 1.8, "BRL": 5.6,
    "CNY": 7.2, "CZK": 23.2, "DKK": 6.87, "HKD": 7.8, "HRK": 6.93, "HUF": 365.0, "IDR": 15800.0, "ILS": 3.7,
    "INR": 84.0, "ISK": 138.0, "KRW": 1380.0, "MXN": 19.5, "MYR": 4.4, "NOK": 10.9, "NZD": 1.66, "PHP": 57.5,
    "PLN": 3.98, "RON": 4.58, "RUB": 96.0, "SEK": 10.6, "SGD": 1.33, "THB": 34.0, "TRY": 34.2, "ZAR": 17.8,
}  # fmt: skip
# The currencies of a backend with a database.
WITH_DATABASE = ("USD", "EUR", "GBP", "CAD", "CHF", "AUD", "JPY")


def prices(usd: int | None, at: int, *, database: bool) -> dict[str, int]:
    """Return `conversions`: integers, -1 for unknown, time 0 for never."""
    names = WITH_DATABASE if database else tuple(PER_USD)
    if usd is None:
        return {"time": 0, **dict.fromkeys(names, -1)}
    return {"time": at, **{name: int(usd * PER_USD[name]) for name in names}}
