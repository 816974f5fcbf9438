"""Labelled transactions, built by the published rules of coinjoin protocols and the habits of wallets. Pure.

WabiSabi's standard values follow Wasabi Wallet's AmountDecomposer; the choice among decompositions is simplified.
Whirlpool and Wasabi 1 follow the scanner of Dumplings, JoinMarket its description of makers and takers. The doubling
levels of Wasabi 1 follow the usual description and were not checked against its source. Sizes and fees are invented.
Participants, coins, remixes, change and fees are all varied.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from whaled.model import SAT_PER_BTC, Input, Output, Shape, Transaction

DUST_SAT = 546
WHIRLPOOL_POOLS = (100_000, 1_000_000, 5_000_000, 50_000_000)
WABISABI_LEAST_SAT = 5_000
WABISABI_MOST_SAT = 134_375_000_000
# Sizes of an output and an input in vB, native segwit.
OUTPUT_VB, INPUT_VB = 31, 68


@dataclass(frozen=True, slots=True)
class Sample:
    """A transaction, the rules that made it, and its correct shape. `no_prevouts` is the same without prevouts."""

    kind: str
    shape: Shape
    transaction: Transaction
    no_prevouts: Transaction


@dataclass(frozen=True, slots=True)
class Draft:
    """The amounts of a transaction before it has scripts. A coin is (value, owner's address number)."""

    coins: list[tuple[int, int]]
    paid: list[int]
    returned: tuple[int, ...] = ()
    data: bool = False


def samples(seed: int, each: int) -> Iterator[Sample]:
    """Yield `each` transactions of every kind, determined by the seed."""
    for kind, (shape, make) in KINDS.items():
        random = Random(f"{seed} {kind}")
        for number in range(each):
            draft = make(random)
            yield _sample(kind, shape or by_counts(draft), draft, random, number)


def by_counts(draft: Draft) -> Shape:
    """Return the shape of a transaction of one owner, from the numbers of its inputs and outputs alone."""
    outputs = len(draft.paid) + len(draft.returned)
    if outputs <= 2 and len(draft.coins) >= 5 * outputs:
        return Shape.CONSOLIDATION
    return Shape.BATCH if outputs >= 5 * len(draft.coins) else Shape.TRANSFER


def _sample(kind: str, shape: Shape, draft: Draft, random: Random, number: int) -> Sample:
    outputs = [Output(value, f"0014{number:08x}{place:032x}") for place, value in enumerate(draft.paid)]
    outputs += [Output(value, f"0014ee{draft.coins[0][1]:038x}") for value in draft.returned]
    random.shuffle(outputs)
    if draft.data:
        outputs.append(Output(0, "6a20" + "ab" * 32))
    spent = [
        Input(f"{number:032x}{place:032x}", 0, 0xFFFFFFFD, Output(value, f"0014ee{owner:038x}"))
        for place, (value, owner) in enumerate(draft.coins)
    ]
    fee = sum(value for value, _ in draft.coins) - sum(output.value for output in outputs)
    assert fee >= 0, f"{kind}: spends more than it has"
    vsize = 11.0 + OUTPUT_VB * len(outputs) + INPUT_VB * len(spent)

    def made(inputs: Sequence[Input]) -> Transaction:
        return Transaction(
            txid=f"{number:064x}", inputs=tuple(inputs), outputs=tuple(outputs), fee_sat=fee, vsize=vsize,
            fee_rate=fee / vsize,
        )  # fmt: skip

    return Sample(kind, shape, made(spent), made([Input(i.txid, i.vout, i.sequence) for i in spent]))


# --- amounts ----------------------------------------------------------------------------------------------------------


def _btc(random: Random, median: float, spread: float) -> int:
    """Return an amount in satoshi, log-normal around a median in BTC: real amounts span many orders of magnitude."""
    return max(20_000, int(random.lognormvariate(0, spread) * median * SAT_PER_BTC))


def _fee(random: Random, inputs: int, outputs: int) -> int:
    return int((11 + OUTPUT_VB * outputs + INPUT_VB * inputs) * random.choice((1.0, 2.5, 8.0, 25.0, 90.0)))


def _coins(random: Random, total: int, count: int, owner: int) -> list[tuple[int, int]]:
    """Split a total into `count` coins, each at a separate address from `owner` on."""
    cuts = sorted(random.uniform(0.02, 1) for _ in range(count))
    whole = sum(cuts)
    values = [max(1_000, int(total * cut / whole)) for cut in cuts]
    values[-1] = max(1_000, values[-1] + total - sum(values))
    return [(value, owner + place) for place, value in enumerate(values)]


def _round_btc(random: Random, median: float) -> int:
    """Return a round amount as people type it: 1, 2, 2.5 or 5 with zeros."""
    power = 10 ** random.choice((-2, -1, -1, 0, 0, 1))
    return max(50_000, int(random.choice((1, 1, 1.5, 2, 2.5, 3, 5)) * power * median * SAT_PER_BTC))


def _owned(random: Random, paid: list[int], inputs: int, *, change: bool = True, reuse: bool = False) -> Draft:
    """Pay from one owner's coins, with change to a new address or (`reuse`) to the address of an input."""
    fee = _fee(random, inputs, len(paid) + 1)
    # Coins of about the size of what is paid, or a few large ones.
    rest = int(sum(paid) * random.choice((0.002, 0.05, 0.3, 1.5, 8.0))) + 50_000 if change else 0
    coins = _coins(random, sum(paid) + rest + fee, inputs, 1)
    left = sum(value for value, _ in coins) - sum(paid) - fee
    if not change:
        return Draft(coins, paid)
    return Draft(coins, paid, (left,)) if reuse else Draft(coins, [*paid, left])


# --- coinjoins --------------------------------------------------------------------------------------------------------


def joinmarket(random: Random) -> Draft:
    """Make a JoinMarket coinjoin of a taker and 2 to 12 makers.

    Each has one output of the common amount and its change. The taker may sweep, and pays the makers and the miner. A
    maker spends the coins that its wallet selects in one mixdepth.
    """
    return _joinmarket(random, random.choice((3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 13)))


def joinmarket_pair(random: Random) -> Draft:
    """Make a JoinMarket coinjoin with one maker, the minimum."""
    return _joinmarket(random, 2)


def _joinmarket(random: Random, parties: int) -> Draft:
    amount = _btc(random, 8, 1.2)
    sweeps = parties > 2 and random.random() < 0.25
    coins: list[tuple[int, int]] = []
    paid = [amount] * parties
    earned = 0
    for maker in range(1, parties):
        fee = random.choice((0, 107, 500, 2_000, int(amount * random.choice((0.00001, 0.0001, 0.0003)))))
        change = int(amount * random.lognormvariate(0, 1.4)) + 30_000
        count = 1 if parties == 2 else random.choice((1, 1, 1, 2, 2, 3, 5))
        coins += _coins(random, amount + change - fee, count, 100 * maker)
        paid.append(change)
        earned += fee
    count = 1 if parties == 2 else random.choice((1, 2, 3, 6))
    mine = amount + earned + _fee(random, len(coins) + count, 2 * parties)
    if not sweeps:
        change = int(amount * random.lognormvariate(-0.5, 1.2)) + 30_000
        paid.append(change)
        mine += change
    return Draft([*coins, *_coins(random, mine, count, 100 * parties)], paid)


def whirlpool(random: Random) -> Draft:
    """Make a Whirlpool round: 5 to 10 inputs and as many outputs of the pool's size. New coins pay the miner's fee."""
    pool = random.choice(WHIRLPOOL_POOLS)
    parties = random.choice((5, 5, 5, 6, 7, 8, 9, 10))
    new = random.randint(1, parties - 1)
    share = min(pool // 10, _fee(random, parties, parties) // new + 50)
    return Draft([(pool + share * (place < new), place) for place in range(parties)], [pool] * parties)


def wasabi_single(random: Random) -> Draft:
    """Make a round of early Wasabi 1 (ZeroLink): one denomination near 0.1 BTC, change, the coordinator's fee."""
    return _wasabi(random, levels=1)


def wasabi_levels(random: Random) -> Draft:
    """Make a Wasabi 1 round with levels: larger participants also get outputs of 2, 4 ... times the denomination."""
    return _wasabi(random, levels=random.randint(2, 7))


def _wasabi(random: Random, levels: int) -> Draft:
    base = int(random.choice((0.1, 0.1, random.uniform(0.085, 0.115))) * SAT_PER_BTC)
    parties = random.randint(15, 100)
    remixed = random.uniform(0, 0.3)
    coins: list[tuple[int, int]] = []
    wanted: list[list[int]] = []
    left: list[int] = []
    for party in range(parties):
        if random.random() < remixed:
            has = base + random.randint(10_500, 60_000)
            coins.append((has, 100 * party))
        else:
            has = base + 80_000 + int(base * random.lognormvariate(0.3, 1.5))
            coins += _coins(random, has, random.choice((1, 1, 1, 2, 3, 5, 7)), 100 * party)
        has = has * 997 // 1000 - 15_000 if has > base + 60_000 else has - 10_000
        wanted.append([])
        for level in range(levels):
            if has >= base * 2**level:
                wanted[-1].append(base * 2**level)
                has -= base * 2**level
        left.append(has)
    # A level that only one participant can afford is not mixed: its value remains change.
    paid: list[int] = []
    for outputs, rest in zip(wanted, left, strict=True):
        alone = sum(value for value in outputs if sum(value in other for other in wanted) < 2)
        paid += [value for value in outputs if sum(value in other for other in wanted) > 1]
        if rest + alone > 5_000:
            paid.append(rest + alone)
    coordinator = sum(value for value, _ in coins) - sum(paid) - _fee(random, len(coins), len(paid)) // 5
    return Draft(coins, [*paid, coordinator] if coordinator > 20_000 else paid)


def wabisabi(random: Random) -> Draft:
    """Make a WabiSabi round of a large coordinator: 150 to 400 inputs."""
    return _wabisabi(random, random.randint(40, 100), random.choice((0.3, 0.6, 0.85)))


def wabisabi_small(random: Random) -> Draft:
    """Make a WabiSabi round of one of today's small coordinators: 12 to 60 inputs."""
    return _wabisabi(random, random.randint(4, 20), random.choice((0.0, 0.4, 0.8)))


def denominations() -> list[int]:
    """Return WabiSabi's standard values: powers of two, powers of three and twice these, and 1, 2, 5 with zeros."""
    powers = {factor * base**power for base, factors in ((2, (1,)), (3, (1, 2)), (10, (1, 2, 5)))
              for factor in factors for power in range(40)}  # fmt: skip
    return sorted((value for value in powers if WABISABI_LEAST_SAT <= value <= WABISABI_MOST_SAT), reverse=True)


def _wabisabi(random: Random, parties: int, remixed: float) -> Draft:
    standard = denominations()
    rate = random.choice((2, 6, 20, 60))
    output_fee = OUTPUT_VB * rate
    wallets: list[list[int]] = []
    for _ in range(parties):
        coins = []
        for _ in range(random.choice((1, 1, 2, 3, 4, 6, 8, 10))):
            known = [value for value in standard if 20_000 <= value <= 20 * SAT_PER_BTC]
            coins.append(random.choice(known) if random.random() < remixed else _btc(random, 0.05, 2.2))
        wallets.append(coins)
    effective = [coin - INPUT_VB * rate for wallet in wallets for coin in wallet]
    second = sorted(effective)[-2]
    seen: dict[int, int] = {}
    for amount in effective:
        for value in _greedy(amount, [v for v in standard if v + output_fee <= second], output_fee):
            seen[value] = seen.get(value, 0) + 1
    frequent = sorted((value for value, count in seen.items() if count > 1), reverse=True)
    paid: list[int] = []
    for wallet in wallets:
        has = sum(coin - INPUT_VB * rate for coin in wallet)
        # A wallet chooses among decompositions of similar cost: omit some of the values.
        mine = [value for value in frequent if random.random() < 0.8]
        outputs = _greedy(has, mine, output_fee)[: random.choice((6, 8, 8))]
        rest = has - sum(value + output_fee for value in outputs)
        paid += outputs
        if rest >= WABISABI_LEAST_SAT + output_fee:
            paid.append(rest - output_fee)
    return Draft([(coin, place) for place, coin in enumerate(c for wallet in wallets for c in wallet)], paid)


def _greedy(amount: int, values: Sequence[int], output_fee: int) -> list[int]:
    taken: list[int] = []
    for value in values:
        while value + output_fee <= amount and len(taken) < 10:
            taken.append(value)
            amount -= value + output_fee
    return taken


# --- transactions of one owner ----------------------------------------------------------------------------------------


def payment(random: Random) -> Draft:
    """Make a payment."""
    paid = [random.choice((_btc, _btc, lambda r, m, _s: _round_btc(r, m)))(random, 30, 1.5)]
    return _owned(random, paid, random.choice((1, 1, 2, 3)), reuse=random.random() < 0.4)


def payjoin(random: Random) -> Draft:
    """Make a payjoin (BIP 78), to which the payee adds a coin: two outputs, like any payment."""
    price, change = _btc(random, 20, 1), _btc(random, 20, 1)
    payer = _coins(random, price + change + 5_000, random.choice((1, 1, 2)), 1)
    theirs = (_btc(random, 10, 1), 50)
    return Draft([*payer, theirs], [price + theirs[0], change])


def withdrawals(random: Random) -> Draft:
    """Make a batch of an exchange's withdrawals, from one to three coins."""
    paid = [_btc(random, 0.3, 2) for _ in range(random.randint(12, 250))]
    return _owned(random, paid, random.choice((1, 1, 2, 3)), reuse=random.random() < 0.5)


def withdrawals_round(random: Random) -> Draft:
    """Make a batch of withdrawals of mostly round amounts, some less the exchange's fee."""
    return _owned(random, _round_withdrawals(random, random.randint(20, 250)), random.choice((1, 2, 4)))


def withdrawals_many_coins(random: Random) -> Draft:
    """Make a batch of withdrawals paid from deposits, with 0.3 to 2 coins per payment."""
    paid = _round_withdrawals(random, random.randint(5, 120))
    return _owned(random, paid, max(2, int(len(paid) * random.uniform(0.3, 2))), reuse=random.random() < 0.3)


def _round_withdrawals(random: Random, count: int) -> list[int]:
    fee = random.choice((0, 0, 50_000, 30_000))
    share = random.uniform(0.3, 0.8)
    return [
        _round_btc(random, 1) - fee * (random.random() < 0.9) if random.random() < share else _btc(random, 0.3, 1.6)
        for _ in range(count)
    ]


def airdrop(random: Random) -> Draft:
    """Make an exchange's payment of the same amount to many payees, from many coins."""
    count = random.randint(5, 150)
    amount = _round_btc(random, 1)
    extra = [_btc(random, 1, 1) for _ in range(random.choice((0, 0, 1, count // 6)))]
    return _owned(random, [amount] * count + extra, max(2, int(count * random.uniform(0.2, 2))))


def pool_payout(random: Random) -> Draft:
    """Make a mining pool's payout to its miners; some get the pool's minimum."""
    count = random.randint(30, 400)
    least = random.choice((100_000, 500_000, 1_000_000))
    paid = [least if random.random() < 0.1 else least + _btc(random, 0.05, 1.5) for _ in range(count)]
    return _owned(random, paid, random.choice((1, 1, 2, 5)), reuse=random.random() < 0.5)


def equal_split(random: Random) -> Draft:
    """Split an owner's coins into equal parts for its own addresses; the remainder is another output."""
    parts = random.randint(3, 25)
    amount = random.choice((10, 25, 50, 100, 500)) * SAT_PER_BTC if random.random() < 0.7 else _btc(random, 20, 1)
    return _owned(random, [amount] * parts, random.randint(1, parts * 2))


def equal_dust(random: Random) -> Draft:
    """Send the same tiny amount to many addresses, for tracing or advertising, and the rest to one or more outputs."""
    count = random.randint(5, 200)
    amount = random.choice((547, 555, 600, 999, 1_000, 3_000, 5_000, 10_000, 20_000))
    coins = [(_btc(random, 20, 1), 1 + place) for place in range(random.choice((1, 2, 5, 30, count, count + 5)))]
    fee = _fee(random, len(coins), count + 1)
    left = sum(value for value, _ in coins) - amount * count - fee
    parts = random.choice((1, 1, 1, min(len(coins), count)))
    return Draft(coins, [*[amount] * count, *(value for value, _ in _coins(random, left, parts, 1))])


def tx0(random: Random) -> Draft:
    """Make a Tx0, which precedes a Whirlpool round: equal outputs of one owner, pool fee, change, a data output."""
    pool = random.choice(WHIRLPOOL_POOLS)
    premix = [pool + random.randint(200, 30_000)] * random.randint(2, 70)
    draft = _owned(random, [*premix, max(5_000, pool // 20)], random.choice((1, 1, 2, 3, 8, 20)))
    return Draft(draft.coins, draft.paid, draft.returned, data=True)


def channels(random: Random) -> Draft:
    """Open several Lightning channels in one transaction: round amounts, change."""
    size = [random.choice((1, 2, 5, 10, 16, 20, 50)) * 1_000_000 for _ in range(random.choice((1, 2, 3)))]
    paid = [random.choice(size) for _ in range(random.randint(3, 30))]
    return _owned(random, paid, random.choice((1, 1, 2, 3, 6, 12)))


def consolidation(random: Random) -> Draft:
    """Spend many coins to one output, or to one and a payment."""
    count = random.randint(5, 300)
    if count >= 10 and random.random() < 0.3:
        return _owned(random, [_btc(random, 5, 1)], count)
    coins = [(_btc(random, 1, 1.5), 1 + place) for place in range(count)]
    return Draft(coins, [sum(value for value, _ in coins) - min(4_000, _fee(random, 1, 1))])


def self_transfer(random: Random) -> Draft:
    """Return everything to the address of an input."""
    coins = _coins(random, _btc(random, 100, 1), random.choice((1, 1, 2, 4)), 1)
    return Draft(coins, [], (sum(value for value, _ in coins) - 2_000,))


KINDS: dict[str, tuple[Shape | None, Callable[[Random], Draft]]] = {
    "joinmarket": (Shape.COINJOIN, joinmarket),
    "joinmarket_pair": (Shape.COINJOIN, joinmarket_pair),
    "whirlpool": (Shape.COINJOIN, whirlpool),
    "wasabi_single": (Shape.COINJOIN, wasabi_single),
    "wasabi_levels": (Shape.COINJOIN, wasabi_levels),
    "wabisabi": (Shape.COINJOIN, wabisabi),
    "wabisabi_small": (Shape.COINJOIN, wabisabi_small),
    "payment": (None, payment),
    "payjoin": (Shape.TRANSFER, payjoin),
    "withdrawals": (None, withdrawals),
    "withdrawals_round": (None, withdrawals_round),
    "withdrawals_many_coins": (None, withdrawals_many_coins),
    "airdrop": (None, airdrop),
    "pool_payout": (None, pool_payout),
    "equal_split": (None, equal_split),
    "equal_dust": (None, equal_dust),
    "tx0": (None, tx0),
    "channels": (None, channels),
    "consolidation": (Shape.CONSOLIDATION, consolidation),
    "self_transfer": (Shape.SELF_TRANSFER, self_transfer),
}
