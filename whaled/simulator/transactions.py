"""A transaction of the simulated world: exact inputs, outputs and fee, and sizes that follow from them."""

from enum import StrEnum
from hashlib import sha256

from msgspec import Struct

from whaled.errors import WhaledError
from whaled.simulator.scripts import SPENDABLE, Script, ScriptType

REPLACEABLE = 0xFFFFFFFD
FINAL = 0xFFFFFFFF


class ImpossibleError(WhaledError):
    """What was asked of the simulated world cannot happen; the message says why."""


class TxKind(StrEnum):
    """Why a transaction was made (the ground truth says it, the stream does not)."""

    PAYMENT = "payment"
    CHANGE_TO_SELF = "change_to_self"
    TINY_PAYMENT = "tiny_payment"
    SELF_TRANSFER = "self_transfer"
    CONSOLIDATION = "consolidation"
    BATCH = "batch"
    COINJOIN = "coinjoin"
    OP_RETURN = "op_return"
    ALL_SCRIPTS = "all_scripts"
    EXACT = "exact"
    ONE_SAT_BELOW = "one_sat_below"
    REPLACEMENT = "replacement"
    CANCELLATION = "cancellation"
    CHILD = "child"
    UNRELAYED = "unrelayed"
    DOUBLE_SPEND = "double_spend"
    COINBASE = "coinbase"


class Coin(Struct, frozen=True, gc=False):
    """An output that can be spent."""

    txid: str
    vout: int
    value: int
    script: Script

    @property
    def outpoint(self) -> tuple[str, int]:
        """What an input names."""
        return self.txid, self.vout


class Payment(Struct, frozen=True, gc=False):
    """An output of a transaction: satoshi to a script."""

    value: int
    script: Script


class Tx(Struct, frozen=True, kw_only=True, eq=False):
    """A transaction. `inputs` is empty for a coinbase, `coinbase` is its scriptSig. Made by `serial.assemble`, for
    `txid`, `size` and `weight` follow from the rest.
    """

    txid: str
    kind: TxKind
    inputs: tuple[Coin, ...]
    outputs: tuple[Payment, ...]
    fee: int
    size: int
    weight: int
    sent_at: float
    sequence: int = REPLACEABLE
    version: int = 2
    coinbase: str = ""

    @property
    def out_sat(self) -> int:
        """Sum of the outputs."""
        return sum(payment.value for payment in self.outputs)

    @property
    def in_sat(self) -> int:
        """Sum of the spent coins."""
        return sum(coin.value for coin in self.inputs)

    @property
    def moved_sat(self) -> int:
        """Sum of the outputs that do not return to the script of an input."""
        own = {coin.script.hex for coin in self.inputs}
        return sum(payment.value for payment in self.outputs if payment.script.hex not in own)

    @property
    def vsize(self) -> float:
        """Virtual bytes, fractional."""
        return self.weight / 4

    @property
    def rate(self) -> float:
        """Fee rate in sat/vB, without relatives."""
        return self.fee / self.vsize

    @property
    def is_coinbase(self) -> bool:
        """Whether this is the first transaction of a block."""
        return not self.inputs

    def coin(self, vout: int) -> Coin | None:
        """Output `vout` as a coin, whatever its script; None if there is none."""
        if not 0 <= vout < len(self.outputs):
            return None
        return Coin(self.txid, vout, self.outputs[vout].value, self.outputs[vout].script)

    def coins(self) -> list[Coin]:
        """The outputs somebody could spend next."""
        return [
            Coin(self.txid, index, payment.value, payment.script)
            for index, payment in enumerate(self.outputs)
            if payment.value and payment.script.type in SPENDABLE
        ]


class Ids:
    """Ids of what is older than anything here: double SHA-256 of seed and counter, so a seed always gives the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def next(self) -> str:
        """A new id in hex."""
        self._count += 1
        return sha256(sha256(f"{self._seed}/{self._count}".encode()).digest()).hexdigest()


def measure(spent: list[ScriptType], scripts: list[Script]) -> tuple[int, int]:
    """(size, weight) of a transaction that spends outputs of these types and pays to these scripts."""
    base = 8 + _varint(len(spent)) + _varint(len(scripts))
    witness = 0
    for kind in spent:
        size = SPENDABLE[kind]
        base += 41 + size.scriptsig
        witness += size.witness or 1
    base += sum(9 + len(script.hex) // 2 for script in scripts)
    if witness == len(spent):  # no input has a witness: the old serialisation
        witness = 0
    else:
        witness += 2
    return base + witness, base * 4 + witness


def _varint(count: int) -> int:
    return 1 if count < 0xFD else 3 if count <= 0xFFFF else 5
