"""How urgent a transaction is, and in which block it should be. Pure; what is not known is None, never a guess."""

from collections.abc import Sequence

from whaled.model import FeeMarket, ProjectedBlock

# What the score is at each recommended rate, from the cheapest to the fastest.
AT_MINIMUM = 0.05
AT_ECONOMY = 0.25
AT_HOUR = 0.5
AT_HALF_HOUR = 0.75
AT_FASTEST = 0.95
# A projected block larger than this is no block but the rest of the mempool (the backend's last one).
BLOCK_VSIZE = 1_000_000
# The backend's blocks leave a little room; in one fuller than this nothing more of ordinary size fits.
FULL_VSIZE = 990_000
# As many blocks as the backend projects at most (MEMPOOL.MEMPOOL_BLOCKS_AMOUNT).
PROJECTED_BLOCKS = 8


def urgency(rate: float | None, fees: FeeMarket | None) -> float | None:
    """Where an effective rate (sat/vB) stands among the recommended ones: 0..1, never falling with the rate.

    Linear between the recommended rates that are known, 0.95 at the fastest, from there towards 1 as the rate grows
    beyond it. None if the rate, the market or its fastest rate is unknown.
    """
    if rate is None or fees is None or fees.fastest is None:
        return None
    if rate >= fees.fastest:
        # Twice the fastest rate is halfway from 0.95 to 1.
        excess = fees.fastest / rate if rate > 0 else 1.0
        return round(1.0 - (1.0 - AT_FASTEST) * excess, 4)
    low_rate, low_score = 0.0, 0.0
    score = 0.0
    for high_rate, high_score in _scale(fees):
        if rate < high_rate:
            part = (rate - low_rate) / (high_rate - low_rate)
            score = low_score + part * (high_score - low_score)
            break
        low_rate, low_score = high_rate, high_score
    return round(max(0.0, score), 4)


def _scale(fees: FeeMarket) -> list[tuple[float, float]]:
    """Rates with their scores, ascending. A slower target is never taken to cost more than a faster one."""
    scale: list[tuple[float, float]] = []
    for rate, score in (
        (fees.fastest, AT_FASTEST),
        (fees.half_hour, AT_HALF_HOUR),
        (fees.hour, AT_HOUR),
        (fees.economy, AT_ECONOMY),
        (fees.minimum, AT_MINIMUM),
    ):
        if rate is not None:
            scale.append((min(rate, scale[-1][0]) if scale else rate, score))
    return scale[::-1]


def predicted_block(
    rate: float | None, projected: Sequence[ProjectedBlock] | None, tip_height: int | None
) -> int | None:
    """The height of the block that should hold a transaction of this effective rate (sat/vB).

    That is the first projected block whose cheapest transaction pays no more; below all of them, the last one if it has
    room, else the one after. None if the market or the tip is unknown, or if it is beyond what the backend projects.

    A full block without a lowest rate (the backend gives 0 for one that a single transaction fills) takes nothing that
    pays no more than what waits behind it; whether it takes who pays more is unknown.
    """
    if rate is None or projected is None or tip_height is None:
        return None
    is_unknown_ahead = False
    for index, block in enumerate(projected):
        if not block.min_rate and block.vsize >= FULL_VSIZE:
            is_in = 0 < block.max_rate <= rate  # it pays more than all of it
            is_unknown_ahead = not is_in
        else:
            is_in = rate >= (block.min_rate or 0)
            if is_in and is_unknown_ahead and rate > block.max_rate:
                return None
            is_unknown_ahead = False
        if is_in:
            return tip_height + 1 + index if block.vsize <= BLOCK_VSIZE else None
    if is_unknown_ahead:
        return None
    if not projected:
        return tip_height + 1
    if projected[-1].vsize < FULL_VSIZE:
        return tip_height + len(projected)
    if projected[-1].vsize <= BLOCK_VSIZE and len(projected) < PROJECTED_BLOCKS:
        return tip_height + len(projected) + 1
    return None
