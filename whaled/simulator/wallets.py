"""The coins of the world, and the transactions that spend them. Inputs always equal outputs plus fee."""

from collections.abc import Callable
from math import ceil
from random import Random

from whaled.simulator.owners import Owners
from whaled.simulator.scripts import Script, Scripts, ScriptType
from whaled.simulator.serial import assemble
from whaled.simulator.transactions import Coin, Ids, ImpossibleError, Payment, Tx, TxKind, measure

DUST_SAT = 546
# Coins kept for spending. Further ones are dropped, which limits memory.
MAX_COINS = 4_000
CONTACTS = 300
# More than the fee of any transaction made here at MAX_RATE, so that a whale's outputs stay above the threshold.
FEE_BUDGET = 3_000_000
MAX_RATE = 300.0
# Minimum sum of coins for kinds with few and with many parts: a fifth of it covers any fee.
FEW_PARTS_SAT = 500_000
MANY_PARTS_SAT = 20_000_000
MANY_PARTS = frozenset({TxKind.CONSOLIDATION, TxKind.BATCH, TxKind.COINJOIN, TxKind.ALL_SCRIPTS})

_OWN_TYPES = (
    ScriptType.P2WPKH,
    ScriptType.P2TR,
    ScriptType.P2PKH,
    ScriptType.P2SH,
    ScriptType.P2WSH,
    ScriptType.MULTISIG,
    ScriptType.P2PK,
)
_OWN_SHARES = (46, 16, 15, 14, 7, 1, 1)

Plan = tuple[list[Coin], list[Payment], Script]


class Wallets:
    """The coins of all wallets.

    A recipe takes coins of at least `gross` satoshi and returns a plan: (coins, payments, script for the rest).
    """

    def __init__(
        self, scripts: Scripts, ids: Ids, rng: Random, is_spendable: Callable[[Coin], bool], owners: Owners
    ) -> None:
        self._scripts = scripts
        self._owners = owners
        self._ids = ids
        self._rng = rng
        self._is_spendable = is_spendable
        self._coins: dict[int, list[Coin]] = {}
        self._count = 0
        self._contacts = [scripts.make(self._any_type()) for _ in range(CONTACTS)]
        self._recipes: dict[TxKind, Callable[[int, int], Plan]] = {
            TxKind.PAYMENT: self._payment,
            TxKind.CHANGE_TO_SELF: self._change_to_self,
            TxKind.TINY_PAYMENT: self._tiny_payment,
            TxKind.SELF_TRANSFER: self._self_transfer,
            TxKind.CONSOLIDATION: self._consolidation,
            TxKind.BATCH: self._batch,
            TxKind.COINJOIN: self._coinjoin,
            TxKind.OP_RETURN: self._op_return,
            TxKind.ALL_SCRIPTS: self._all_scripts,
        }

    # --- coins ---

    def put(self, coins: list[Coin]) -> None:
        """Add confirmed outputs that may be spent from now on."""
        for coin in coins:
            if self._count >= MAX_COINS:
                return
            self._coins.setdefault(coin.value.bit_length(), []).append(coin)
            self._count += 1

    def mint(self, value: int, kind: ScriptType | None = None, script: Script | None = None) -> Coin:
        """Return an old coin of exactly this value, whose transaction precedes the kept blocks."""
        txid, vout = self._ids.next(), self._rng.randrange(4)
        if script is None and kind is None:
            script = self._owners.draw()
        return Coin(txid, vout, value, script or self._scripts.make(kind or self._any_type()))

    def take(self, at_least: int, at_most: int) -> Coin:
        """Return a coin with a value in this range: a received one if there is one, else an old one."""
        for size in range(at_least.bit_length(), at_most.bit_length() + 1):
            pocket = self._coins.get(size)
            if not pocket:
                continue
            coin = pocket[-1]
            if at_least <= coin.value <= at_most:
                pocket.pop()
                self._count -= 1
                if self._is_spendable(coin):
                    return coin
        return self.mint(self._rng.randint(at_least, at_most))

    # --- transactions ---

    def make(self, kind: TxKind, gross: int, at_most: int, rate: float, now: float) -> Tx:
        """Return a transaction of a kind, with coins of `gross` to `at_most` satoshi.

        Raises ImpossibleError if there is no recipe for the kind.
        """
        recipe = self._recipes.get(kind)
        if recipe is None:
            allowed = ", ".join(self._recipes)
            raise ImpossibleError(f"there is no recipe for {kind.value!r}; use one of {allowed}")
        floor = MANY_PARTS_SAT if kind in MANY_PARTS else FEW_PARTS_SAT
        gross = max(gross, floor)
        return self.compose(kind, recipe(gross, max(gross, at_most)), rate, now)

    def compose(self, kind: TxKind, plan: Plan, rate: float, now: float) -> Tx:
        """Return the transaction of a plan. What remains goes to the plan's script, dust to the fee."""
        coins, payments, rest_script = plan
        spent = [coin.script.type for coin in coins]
        scripts = [payment.script for payment in payments]
        _, weight = measure(spent, [*scripts, rest_script])
        left = sum(coin.value for coin in coins) - sum(payment.value for payment in payments)
        fee = ceil(rate * weight / 4)
        rest = left - fee
        if rest >= DUST_SAT:
            # Change is the first or last output, since wallets shuffle outputs.
            at = self._rng.choice((0, len(payments)))
            outputs = (*payments[:at], Payment(rest, rest_script), *payments[at:])
        else:
            if left < 0 or not payments:
                raise ImpossibleError(f"coins do not pay for a {kind.value}: {left} satoshi left, fee {fee}")
            fee = left
            outputs = tuple(payments)
        return assemble(kind, coins, outputs, fee, sent_at=now)

    def exact(self, out_sat: int, rate: float, now: float, kind: TxKind = TxKind.EXACT) -> Tx:
        """Return a payment with change whose outputs sum to exactly `out_sat`."""
        script = self._scripts.make(ScriptType.P2WPKH)
        payee, change = self._payee(), self._scripts.make(ScriptType.P2WPKH)
        _, weight = measure([ScriptType.P2WPKH], [payee, change])
        paid = out_sat * 3 // 5
        coin = Coin(self._ids.next(), 0, out_sat + ceil(rate * weight / 4), script)
        if out_sat - paid < DUST_SAT:
            raise ImpossibleError(f"{out_sat} satoshi cannot be split in two outputs; use at least {DUST_SAT * 3}")
        return self.compose(kind, ([coin], [Payment(paid, payee)], change), rate, now)

    def gather(self, out_sat: int, count: int, rate: float, now: float, kind: TxKind) -> Tx:
        """Return a transaction of `count` coins into one output of exactly `out_sat`."""
        script = self._scripts.make(ScriptType.P2WPKH)
        fee = ceil(rate * measure([ScriptType.P2WPKH] * count, [script])[1] / 4)
        coins = [self.mint(value, ScriptType.P2WPKH) for value in self._split(out_sat + fee, count)]
        return self.compose(kind, (coins, [Payment(out_sat, script)], script), rate, now)

    def resent(self, old: Tx, rate: float, now: float, kind: TxKind) -> Tx:
        """Return a transaction of all inputs of `old` to one new script, with another fee."""
        script = self._scripts.make(ScriptType.P2WPKH)
        return self.compose(kind, (list(old.inputs), [], script), rate, now)

    def widened(self, old: Tx, fee_above: int, now: float) -> Tx:
        """Return a transaction of the first input of `old` and another coin, with a fee above `fee_above`.

        The other coin can later be spent without the first input.
        """
        coins = [old.inputs[0], self.mint(old.in_sat + FEE_BUDGET, old.inputs[0].script.type)]
        script = self._scripts.make(coins[0].script.type)
        vsize = measure([coin.script.type for coin in coins], [script])[1] / 4
        fee = max(fee_above + vsize, (old.rate + 1) * vsize)
        return self.compose(TxKind.REPLACEMENT, (coins, [], script), fee / vsize, now)

    def narrowed(self, wide: Tx, now: float) -> Tx:
        """Return a transaction of only the last input of `wide`, with a higher fee."""
        coin = wide.inputs[-1]
        script = self._scripts.make(coin.script.type)
        vsize = measure([coin.script.type], [script])[1] / 4
        fee = max(wide.fee + vsize, (wide.rate + 1) * vsize)
        return self.compose(TxKind.REPLACEMENT, ([coin], [], script), fee / vsize, now)

    def replacement(self, old: Tx, rate: float, now: float, fee_above: int) -> Tx:
        """Return the same payment at a higher rate and with a fee above `fee_above` (BIP 125).

        The largest output pays for it.
        """
        vsize = ceil(old.vsize)
        fee = max(fee_above + vsize, ceil(rate * vsize))
        largest = max(range(len(old.outputs)), key=lambda at: old.outputs[at].value)
        outputs = list(old.outputs)
        outputs[largest] = Payment(outputs[largest].value - (fee - old.fee), outputs[largest].script)
        if outputs[largest].value < DUST_SAT:
            raise ImpossibleError(f"{old.txid} cannot pay a fee of {fee} satoshi")
        return assemble(TxKind.REPLACEMENT, old.inputs, outputs, fee, sent_at=now)

    def takeback(self, old: Tx, fee_above: int, now: float, kind: TxKind = TxKind.CANCELLATION) -> Tx:
        """Return a transaction of the smallest input of `old` to a new script, with a fee above `fee_above`.

        Adds another coin if that input cannot pay the fee.
        """
        coins = [min(old.inputs, key=lambda each: each.value)]
        kind_of_script = coins[0].script.type
        script = self._scripts.make(kind_of_script)
        vsize = measure([kind_of_script], [script])[1] / 4
        fee = max(fee_above + vsize, (old.rate + 1) * vsize)
        if coins[0].value < fee + DUST_SAT:
            vsize = measure([kind_of_script] * 2, [script])[1] / 4
            fee = max(fee_above + vsize, (old.rate + 1) * vsize)
            coins.append(self.mint(ceil(fee) + FEW_PARTS_SAT, kind_of_script))
        return self.compose(kind, (coins, [], script), fee / vsize, now)

    def child(self, coin: Coin, rate: float, now: float) -> Tx:
        """Return a transaction that spends one output of another transaction completely."""
        return self.compose(TxKind.CHILD, ([coin], [], self._scripts.make(coin.script.type)), rate, now)

    # --- recipes ---

    def _any_type(self) -> ScriptType:
        return self._rng.choices(_OWN_TYPES, _OWN_SHARES)[0]

    def _change(self, coin: Coin) -> Script:
        """Return a script for change of a coin, of the same owner."""
        return self._owners.sibling(coin.script) or self._scripts.make(coin.script.type)

    def _payee(self) -> Script:
        owner = self._owners.draw()
        if owner is not None:
            return owner
        if self._rng.random() < 0.6:
            return self._rng.choice(self._contacts)
        return self._scripts.make(self._any_type())

    def _split(self, total: int, parts: int) -> list[int]:
        shares = [self._rng.uniform(1, 10) for _ in range(parts)]
        scale = total / sum(shares)
        values = [int(share * scale) for share in shares]
        values[0] += total - sum(values)
        return values

    def _payment(self, gross: int, at_most: int) -> Plan:
        coin = self.take(gross, at_most)
        coins = [coin]
        if self._rng.random() < 0.15:
            # The small second input makes a later cancellation small.
            small = max(FEW_PARTS_SAT // 5, gross // 1000)
            coins.append(self.mint(small, coin.script.type, self._owners.sibling(coin.script)))
        paid = int(coin.value * self._rng.uniform(0.1, 0.8))
        return coins, [Payment(paid, self._payee())], self._change(coin)

    def _change_to_self(self, gross: int, at_most: int) -> Plan:
        coins, payments, _ = self._payment(gross, at_most)
        return coins, payments, coins[0].script

    def _tiny_payment(self, gross: int, at_most: int) -> Plan:
        coin = self.take(gross, at_most)
        paid = max(DUST_SAT, int(coin.value * self._rng.uniform(0.0001, 0.005)))
        return [coin], [Payment(paid, self._payee())], self._change(coin)

    def _self_transfer(self, gross: int, at_most: int) -> Plan:
        coin = self.take(gross, at_most)
        return [coin], [], coin.script

    def _consolidation(self, gross: int, at_most: int) -> Plan:
        kind = self._any_type()
        total = self._rng.randint(gross, at_most)
        # Usually few inputs, sometimes many.
        parts = min(60, 4 + int(self._rng.expovariate(1 / 8)))
        owner = self._owners.draw()
        if owner is not None:
            return (
                [self.mint(value, script=owner) for value in self._split(total, parts)],
                [],
                self._owners.sibling(owner) or owner,
            )
        coins = [self.mint(value, kind) for value in self._split(total, parts)]
        return coins, [], self._scripts.make(kind)

    def _batch(self, gross: int, at_most: int) -> Plan:
        coin = self.take(gross, at_most)
        parts = min(100, 8 + int(self._rng.expovariate(1 / 10)))
        paid = int(coin.value * self._rng.uniform(0.3, 0.8))
        payments = [Payment(value, self._payee()) for value in self._split(paid, parts)]
        rest = coin.script if self._rng.random() < 0.5 else self._change(coin)
        return [coin], payments, rest

    def _coinjoin(self, gross: int, at_most: int) -> Plan:
        parts = self._rng.randint(5, 8)
        total = self._rng.randint(gross, at_most)
        equal = total // parts * 4 // 5
        coins = [self.mint(total // parts, ScriptType.P2WPKH) for _ in range(parts)]
        # Every participant gets the equal amount and exact change, except the one that pays the fee.
        payments = [Payment(equal, self._scripts.make(ScriptType.P2WPKH)) for _ in range(parts)]
        change = total // parts - equal
        payments += [Payment(change, self._scripts.make(ScriptType.P2WPKH)) for _ in range(parts - 1)]
        return coins, payments, self._scripts.make(ScriptType.P2WPKH)

    def _op_return(self, gross: int, at_most: int) -> Plan:
        coins, payments, rest = self._payment(gross, at_most)
        return coins, [*payments, Payment(0, self._scripts.make(ScriptType.OP_RETURN))], rest

    def _all_scripts(self, gross: int, at_most: int) -> Plan:
        coin = self.take(gross, at_most)
        kinds = [kind for kind in ScriptType if kind not in (ScriptType.OP_RETURN, ScriptType.ANCHOR)]
        values = self._split(coin.value // 2, len(kinds))
        payments = [Payment(value, self._scripts.make(kind)) for value, kind in zip(values, kinds, strict=True)]
        payments.append(Payment(0, self._scripts.make(ScriptType.OP_RETURN)))
        payments.append(Payment(240, self._scripts.make(ScriptType.ANCHOR)))
        return [coin], payments, self._change(coin)
