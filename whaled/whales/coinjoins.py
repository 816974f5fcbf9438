"""Recognition of coinjoins: transactions in which several owners spend together to hide who pays whom. Pure.

The rules follow the published protocols and studies of the chain: Goldfeder et al. 2017 and BlockSci for JoinMarket,
the scanner of Dumplings for Wasabi 1, Wasabi 2 and Whirlpool, Wasabi Wallet's AmountDecomposer for the standard values.
docs/detection.md has their precision and recall; `python -m bench.shapes` measures them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from msgspec import Struct

from whaled.model import SAT_PER_BTC, Output

# Minimum number of equal outputs in a round, if the inputs are known (to have at least as many scripts) and if not.
EQUAL = 3
EQUAL_BLIND = 5
# Equal values up to here are ignored: at the dust limits (546 sat for P2PKH, 2730 sat in old relay rules) they come
# from token protocols, not from coinjoins.
ABOVE_SAT = 2730
# Minimum share of the equal outputs in the value of all outputs. Dust for a hundred addresses has a millionth of a
# whale's value; the mixed part of a large JoinMarket round has a few percent.
LEAST_VALUE_SHARE = 0.01
# In addition to an equal output and a change output for each participant, the coordinator has one or two outputs.
COORDINATOR_OUTPUTS = 2
# The coordinator's fee is at most 1 / COORDINATOR_FEE_SHARE of a coin; Wasabi's is 0.3 %.
COORDINATOR_FEE_SHARE = 100
# Number of participants without change: JoinMarket's taker, and in large rounds 1 / WITHOUT_CHANGE_SHARE of the
# participants, whose remainder was not worth an output.
WITHOUT_CHANGE = 1
WITHOUT_CHANGE_SHARE = 5
# A coin needs no change if it exceeds the common value by less than the fees and 1 / EXACT_SHARE of that value.
EXACT_SHARE = 100
# A coin much larger than the common value returns as change. One participant spends at most this many such coins.
COINS_OF_ONE = 4
# Two participants make a round only if each receives what its coins are worth, within a maker's fee. With more inputs
# than this, some division of the coins matches by chance.
PAIR_INPUTS = 5
PAIR_FEE_SHARE = 1000
PAIR_FEE_SAT = 1000
# Wasabi 1 with levels: the minimum number of outputs at the most common level, and of input scripts.
LEVEL_LEAST = 10
LEVEL_SCRIPTS = 10
# A round of many, of any protocol: the minimum number of input scripts and of values that several outputs have.
ROUND_SCRIPTS = 50
ROUND_VALUES = 5
# WabiSabi, as implemented by Wasabi Wallet 2: the range of its standard values, and the size of the smallest round.
STANDARD_LEAST_SAT = 5_000
STANDARD_MOST_SAT = 1344 * SAT_PER_BTC
STANDARD_INPUTS = 5
STANDARD_OUTPUTS = 8

Rules = tuple[str, ...]


def _standard_values() -> tuple[frozenset[int], frozenset[int]]:
    """Return WabiSabi's standard values, and those among them that are not round decimal amounts.

    The standard values are powers of two, powers of three and their doubles, and 1, 2 and 5 times powers of ten.
    """
    odd = {
        factor * base**power for base, factors in ((2, (1,)), (3, (1, 2))) for factor in factors for power in range(40)
    }
    decimal = {factor * 10**power for factor in (1, 2, 5) for power in range(15)}
    allowed = range(STANDARD_LEAST_SAT, STANDARD_MOST_SAT + 1)
    return frozenset(v for v in odd | decimal if v in allowed), frozenset(v for v in odd - decimal if v in allowed)


STANDARD, POWERS = _standard_values()


class Sides(Struct, frozen=True):
    """The two sides of a transaction: its spendable outputs `paid`, and its number of inputs with their prevouts.

    `spent` is None if the prevouts are unknown.
    """

    paid: Sequence[Output]
    inputs: int
    spent: Sequence[Output] | None

    @property
    def payers(self) -> int:
        """The maximum number of payers: the number of input scripts, or of inputs if the scripts are unknown."""
        return self.inputs if self.spent is None else len({output.script for output in self.spent})

    @property
    def fee_sat(self) -> int:
        """The difference of inputs and outputs in satoshi; 0 if unknown."""
        if self.spent is None:
            return 0
        return max(0, sum(output.value for output in self.spent) - sum(output.value for output in self.paid))


def rules_met(sides: Sides) -> Rules | None:
    """Return the rules by which a transaction is a coinjoin; None if it is not one.

    - equal outputs: at least three outputs have the same value and different scripts, they are about half of all
      outputs or more, at least as many input scripts pay, and about as many outputs are change (JoinMarket, Whirlpool,
      Wasabi 1).
    - two equal outputs, and each side receives what its coins are worth (JoinMarket with one maker).
    - standard values: half of the outputs have one of WabiSabi's values, and a quarter one that is not a round decimal
      amount.
    - levels: half of the outputs repeat a value or its double, fourfold ... (Wasabi 1).
    - a round of many: at least fifty scripts pay, and three quarters of the outputs have repeated values.
    """
    repeated = _repeated(sides.paid)
    for rule in (_equal_outputs, _pair, _standard, _levels, _round_of_many):
        met = rule(sides, repeated)
        if met is not None:
            return met
    return None


def _repeated(paid: Sequence[Output]) -> Counter[int]:
    """Return the number of different scripts that receive each value which more than one script receives."""
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
    # Only large rounds have several common values; in a payout to many by one owner they occur by chance.
    if len(repeated) > 1 and most < LEVEL_LEAST:
        return None
    if most * value < LEAST_VALUE_SHARE * sum(output.value for output in sides.paid):
        return None
    if not _change_is_shared(sides, value, repeated):
        return None
    return (f"equal_outputs>={least}", "inputs>=equal_outputs")


def _change_is_shared(sides: Sides, value: int, repeated: Counter[int]) -> bool:
    """Return whether the change goes to many outputs, as it does with many owners: one owner has one change output."""
    count = repeated[value]
    others = sorted(output.value for output in sides.paid if output.value not in repeated)
    spare = WITHOUT_CHANGE + count // WITHOUT_CHANGE_SHARE
    if sides.spent is None:
        return (count == len(sides.paid) == sides.inputs) or len(others) + spare >= count
    without = _without_change(sides.spent, value, sides.fee_sat)
    kept = value + sides.fee_sat + value // EXACT_SHARE
    return len(others) + without + spare >= count and _comes_back(sides.spent, others, kept)


def _without_change(spent: Sequence[Output], value: int, fee_sat: int) -> int:
    """Return the number of coins that need no change, because their excess over the common value goes to fees."""
    count, left = 0, fee_sat
    for coin in sorted(output.value for output in spent if output.value >= value):
        left -= max(0, coin - value - value // EXACT_SHARE)
        if left < 0:
            break
        count += 1
    return count


def _comes_back(spent: Sequence[Output], others: Sequence[int], kept: int) -> bool:
    """Return whether there is enough change for each large coin; `others` must be in ascending order.

    Dumplings checks only the largest coin.
    """
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
