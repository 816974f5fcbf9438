"""Whether a transaction is a coinjoin: several owners spend together so that nobody can match payers and paid. Pure.

The rules follow what the protocols publish and what studies of the chain use: Goldfeder et al. 2017 and BlockSci for
JoinMarket, the scanner of Dumplings for Wasabi 1, Wasabi 2 and Whirlpool, Wasabi Wallet's AmountDecomposer for the
standard values. docs/detection.md has their precision and recall; `python -m bench.shapes` measures them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from msgspec import Struct

from whaled.model import SAT_PER_BTC, Output

# Equal outputs that make a round, where the inputs are known to come from as many scripts and where they are not.
EQUAL = 3
EQUAL_BLIND = 5
# Equal values at the dust limits come from token protocols, not from coinjoins (546 sat P2PKH, 2730 sat old relay).
ABOVE_SAT = 2730
# Dust for a hundred addresses holds a millionth of a whale; the mixed part of a large JoinMarket round some percent.
LEAST_VALUE_SHARE = 0.01
# Beside one equal output and one of change for each participant there are one or two for the coordinator.
COORDINATOR_OUTPUTS = 2
# Its fee is a part of the coins, 0.3 % at Wasabi.
COORDINATOR_FEE_SHARE = 100
# Participants without change: the taker of JoinMarket, and in large rounds those whose rest was not worth an output.
WITHOUT_CHANGE = 1
WITHOUT_CHANGE_SHARE = 5
# A coin that exceeds the common value by less than fees and this part of it needs no change.
EXACT_SHARE = 100
# A coin much larger than the common value comes back as change. One participant spends so many such coins, at most.
COINS_OF_ONE = 4
# Two participants: only if each one's coins are what it gets back, to a maker's fee. More coins match by chance.
PAIR_INPUTS = 5
PAIR_FEE_SHARE = 1000
PAIR_FEE_SAT = 1000
# Wasabi 1 with levels: at least so many take the lowest.
LEVEL_LEAST = 10
LEVEL_SCRIPTS = 10
# Any round of many: so many scripts pay, and the outputs repeat so few values.
ROUND_SCRIPTS = 50
ROUND_VALUES = 5
# WabiSabi, as Wasabi Wallet 2 makes it: the range of its standard values, and the smallest round.
STANDARD_LEAST_SAT = 5_000
STANDARD_MOST_SAT = 1344 * SAT_PER_BTC
STANDARD_INPUTS = 5
STANDARD_OUTPUTS = 8

Rules = tuple[str, ...]


def _standard_values() -> tuple[frozenset[int], frozenset[int]]:
    """WabiSabi's: powers of two, of three and twice these, and 1, 2, 5 with zeros; and those nobody asks for."""
    odd = {
        factor * base**power for base, factors in ((2, (1,)), (3, (1, 2))) for factor in factors for power in range(40)
    }
    decimal = {factor * 10**power for factor in (1, 2, 5) for power in range(15)}
    allowed = range(STANDARD_LEAST_SAT, STANDARD_MOST_SAT + 1)
    return frozenset(v for v in odd | decimal if v in allowed), frozenset(v for v in odd - decimal if v in allowed)


STANDARD, POWERS = _standard_values()


class Sides(Struct, frozen=True):
    """A transaction's two sides: outputs that pay somebody, and its inputs. `spent` is None where they are unknown."""

    paid: Sequence[Output]
    inputs: int
    spent: Sequence[Output] | None

    @property
    def payers(self) -> int:
        """How many can have paid, at most: the scripts of the inputs, or their number where these are unknown."""
        return self.inputs if self.spent is None else len({output.script for output in self.spent})

    @property
    def fee_sat(self) -> int:
        """What the inputs have and the outputs have not; 0 where unknown."""
        if self.spent is None:
            return 0
        return max(0, sum(output.value for output in self.spent) - sum(output.value for output in self.paid))


def rules_met(sides: Sides) -> Rules | None:
    """The rules by which this is a coinjoin; None if it is none.

    - equal outputs: three or more with one value, each to another script, about half of all outputs or more, from as
      many input scripts, and change for about as many (JoinMarket, Whirlpool, Wasabi 1).
    - two equal outputs, where the coins of either side are what it gets back (JoinMarket with one maker).
    - standard values: half of the outputs have one of WabiSabi's, and a quarter one that nobody would ask for.
    - levels: half of the outputs repeat a value or its double, fourfold ... (Wasabi 1).
    - a round of many: fifty scripts or more pay, and three quarters of the outputs repeat few values.
    """
    repeated = _repeated(sides.paid)
    for rule in (_equal_outputs, _pair, _standard, _levels, _round_of_many):
        met = rule(sides, repeated)
        if met is not None:
            return met
    return None


def _repeated(paid: Sequence[Output]) -> Counter[int]:
    """How many different scripts get each value that more than one gets."""
    scripts = Counter(value for value, _ in {(output.value, output.script) for output in paid})
    return Counter({value: count for value, count in scripts.items() if count > 1 and value > ABOVE_SAT})


def _equal_outputs(sides: Sides, repeated: Counter[int]) -> Rules | None:
    least = EQUAL if sides.spent is not None else EQUAL_BLIND
    if not repeated:
        return None
    most = max(repeated.values())
    value = max(value for value, count in repeated.items() if count == most)
    if not least <= most <= sides.payers or 2 * most + COORDINATOR_OUTPUTS * (most >= LEVEL_LEAST) < len(sides.paid):
        return None
    # Only large rounds have several common values; an owner who pays many has them by chance.
    if len(repeated) > 1 and most < LEVEL_LEAST:
        return None
    if most * value < LEAST_VALUE_SHARE * sum(output.value for output in sides.paid):
        return None
    if not _change_is_shared(sides, value, repeated):
        return None
    return (f"equal_outputs>={least}", "inputs>=equal_outputs")


def _change_is_shared(sides: Sides, value: int, repeated: Counter[int]) -> bool:
    """Whether what is left over goes to many, as it does among many owners: one owner has one output of change."""
    count = repeated[value]
    others = sorted(output.value for output in sides.paid if output.value not in repeated)
    spare = WITHOUT_CHANGE + count // WITHOUT_CHANGE_SHARE
    if sides.spent is None:
        return (count == len(sides.paid) == sides.inputs) or len(others) + spare >= count
    without = _without_change(sides.spent, value, sides.fee_sat)
    kept = value + sides.fee_sat + value // EXACT_SHARE
    return len(others) + without + spare >= count and _comes_back(sides.spent, others, kept)


def _without_change(spent: Sequence[Output], value: int, fee_sat: int) -> int:
    """How many coins need no change: what they exceed the common value by goes to fees."""
    count, left = 0, fee_sat
    for coin in sorted(output.value for output in spent if output.value >= value):
        left -= max(0, coin - value - value // EXACT_SHARE)
        if left < 0:
            break
        count += 1
    return count


def _comes_back(spent: Sequence[Output], others: Sequence[int], kept: int) -> bool:
    """Whether there is change enough for each large coin; `others` ascend. Dumplings asks it of the largest only."""
    for rank, coin in enumerate(sorted((output.value for output in spent), reverse=True), start=1):
        if coin <= kept:
            break
        if rank > COINS_OF_ONE * (len(others) - bisect_left(others, coin - kept - coin // COORDINATOR_FEE_SHARE)):
            return False
    return True


def _pair(sides: Sides, repeated: Counter[int]) -> Rules | None:
    if sides.spent is None or not 2 <= sides.inputs <= PAIR_INPUTS or len(sides.paid) != 4 or len(repeated) != 1:
        return None
    ((value, count),) = repeated.items()
    total = sum(output.value for output in sides.paid)
    if count != 2 or 2 * value < LEAST_VALUE_SHARE * total:
        return None
    change = next(output.value for output in sides.paid if output.value != value)
    slack = sides.fee_sat + max(value // PAIR_FEE_SHARE, PAIR_FEE_SAT)
    for one in _proper_parts(sides.spent):
        scripts = {output.script for output in one}
        theirs = [output for output in sides.spent if output.script not in scripts]
        if len(one) + len(theirs) == sides.inputs and abs(sum(o.value for o in one) - value - change) <= slack:
            return ("equal_outputs=2", "change_matches_inputs")
    return None


def _proper_parts(spent: Sequence[Output]) -> Iterator[tuple[Output, ...]]:
    for size in range(1, len(spent)):
        yield from combinations(spent, size)


def _standard(sides: Sides, _: Counter[int]) -> Rules | None:
    if sides.payers < STANDARD_INPUTS or len(sides.paid) < STANDARD_OUTPUTS:
        return None
    standard = sum(output.value in STANDARD for output in sides.paid)
    powers = sum(output.value in POWERS for output in sides.paid)
    if 2 * standard >= len(sides.paid) and 4 * powers >= len(sides.paid):
        return ("standard_values>=1/2", "powers_of_2_or_3>=1/4")
    return None


def _levels(sides: Sides, repeated: Counter[int]) -> Rules | None:
    if sides.payers < LEVEL_SCRIPTS or not repeated:
        return None
    most = max(repeated.values())
    base = min(value for value, count in repeated.items() if count == most)
    levels = {base << level for level in range(12)} & repeated.keys()
    mixed = sum(repeated[value] for value in levels)
    if not LEVEL_LEAST <= most <= sides.payers or 2 * mixed + COORDINATOR_OUTPUTS < len(sides.paid):
        return None
    others = sorted(output.value for output in sides.paid if output.value not in levels)
    if 3 * len(others) < most:
        return None
    if sum(repeated[value] * value for value in levels) < LEAST_VALUE_SHARE * sum(o.value for o in sides.paid):
        return None
    if sides.spent is not None:
        kept = sum(levels)
        if not _comes_back(sides.spent, others, kept + sides.fee_sat + kept // EXACT_SHARE):
            return None
    return ("doubling_outputs>=1/2", "inputs>=equal_outputs")


def _round_of_many(sides: Sides, repeated: Counter[int]) -> Rules | None:
    if sides.payers < ROUND_SCRIPTS or len(repeated) < ROUND_VALUES or 2 * max(repeated.values()) > sides.payers:
        return None
    if len(sides.paid) > 2 * sides.inputs or 4 * sum(repeated.values()) < 3 * len(sides.paid):
        return None
    return (f"input_scripts>={ROUND_SCRIPTS}", "repeated_outputs>=3/4")
