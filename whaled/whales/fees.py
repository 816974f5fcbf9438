"""The urgency of a transaction and the block predicted for it. Pure; an unknown result is None, never a guess."""

from collections.abc import Sequence

from whaled.model import PROJECTED_BLOCKS, FeeMarket, ProjectedBlock

# The score at each recommended rate, from the cheapest to the fastest.
AT_MINIMUM = 0.05
AT_ECONOMY = 0.25
AT_HOUR = 0.5
AT_HALF_HOUR = 0.75
AT_FASTEST = 0.95
# A projected block larger than this is not a block but the rest of the mempool (the backend's last one).
BLOCK_VSIZE = 1_000_000
# The backend's projected blocks leave some room; from this size on, no further transaction of ordinary size fits.
FULL_VSIZE = 990_000


def urgency(rate: float | None, fees: FeeMarket | None) -> float | None:
    """Return the urgency of an effective rate (sat/vB) relative to the recommended rates: 0..1, monotonic in the rate.

    The score is linear between the known recommended rates, 0.95 at the fastest, and approaches 1 above it. None if the
    rate, the market or its fastest rate is unknown.
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
    """Return rates with their scores, ascending. The rate of a slower target is capped at that of a faster one."""
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
    """Return the height of the block predicted to contain a transaction of this effective rate (sat/vB).

    It is the first projected block whose cheapest transaction does not pay more. A rate below all blocks gets the last
    block if that has room, otherwise the next one. None if the market or the tip is unknown, or if the block is beyond
    the backend's projection.

    A full block without a lowest rate (the backend sends 0 for a block that one transaction fills) contains no
    transaction that pays at most the highest rate of the following block. For a rate between that and its own highest
    rate the result is unknown.
    """
    if rate is None or projected is None or tip_height is None:
        return None
    is_unknown_ahead = False
    for index, block in enumerate(projected):
        if not block.min_rate and block.vsize >= FULL_VSIZE:
            is_in = 0 < block.max_rate <= rate  # it pays at least as much as everything in the block
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
