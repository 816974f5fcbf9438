"""The accuracy of urgencies and predicted blocks, measured by the outcomes of whales. Pure."""

from collections.abc import Iterable, Sequence
from statistics import median_low

from msgspec import Struct

from whaled.whales.fees import AT_ECONOMY, AT_FASTEST, AT_HALF_HOUR, AT_HOUR, AT_MINIMUM

# The lower limits of the bands, most urgent first.
BANDS = (AT_FASTEST, AT_HALF_HOUR, AT_HOUR, AT_ECONOMY, AT_MINIMUM, 0.0)


class Outcome(Struct, frozen=True):
    """The prediction and the outcome of a whale that was alerted unconfirmed and is now in a block."""

    urgency: float | None
    blocks_off: int | None
    waited_s: float | None


class Band(Struct, frozen=True):
    """The outcomes of the whales of one band; `urgency` is its lower limit, None for an unknown urgency.

    Of the whales with a `predicted` block, `on_time` were mined in it. `off_low` and `off_high` are the 10th and the
    90th percentile of the number of blocks by which they were later (negative: earlier). Waits are in seconds, from the
    alert to the block.
    """

    urgency: float | None
    whales: int
    predicted: int
    early: int
    on_time: int
    late: int
    off_low: int | None
    off_high: int | None
    wait_median_s: float | None
    wait_high_s: float | None


def bands(outcomes: Iterable[Outcome]) -> list[Band]:
    """Return the bands that have whales, the most urgent first, the one of unknown urgency last."""
    found: dict[float | None, list[Outcome]] = {begin: [] for begin in (*BANDS, None)}
    for outcome in outcomes:
        begin = None if outcome.urgency is None else next(each for each in BANDS if outcome.urgency >= each)
        found[begin].append(outcome)
    return [band(begin, members) for begin, members in found.items() if members]


def band(urgency: float | None, outcomes: Sequence[Outcome]) -> Band:
    """Return the band of these outcomes."""
    off = sorted(each.blocks_off for each in outcomes if each.blocks_off is not None)
    waits = sorted(each.waited_s for each in outcomes if each.waited_s is not None)
    return Band(
        urgency=urgency,
        whales=len(outcomes),
        predicted=len(off),
        early=sum(each < 0 for each in off),
        on_time=off.count(0),
        late=sum(each > 0 for each in off),
        off_low=off[len(off) // 10] if off else None,
        off_high=off[-1 - len(off) // 10] if off else None,
        wait_median_s=median_low(waits) if waits else None,
        wait_high_s=waits[-1 - len(waits) // 10] if waits else None,
    )
