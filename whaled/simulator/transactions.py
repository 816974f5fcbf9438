"""The transactions of the simulated world, with exact inputs, outputs, fees and sizes."""

from enum import StrEnum
from hashlib import sha256

from msgspec import Struct

from whaled.errors import WhaledError
from whaled.simulator.scripts import SPENDABLE, Script, ScriptType

REPLACEABLE = 0xFFFFFFFD
FINAL = 0xFFFFFFFF


class ImpossibleError(WhaledError):
    """A requested event cannot happen in the simulated world; the message states why."""


class TxKind(StrEnum):
    """The reason for which a transaction was made. Only the ground truth contains it."""

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
    REPLACEMENT = "replacement"
    CANCELLATION = "cancellation"
    CHILD = "child"
    PACKAGE = "package"
    UNRELAYED = "unrelayed"
    DOUBLE_SPEND = "double_spend"
    COINBASE = "coinbase"


class Coin(Struct, frozen=True, gc=False):
    """An output, to be spent by an input."""

    txid: str
    vout: int
    value: int
    script: Script

    @property
    def outpoint(self) -> tuple[str, int]:
        """Return the (txid, vout) by which an input refers to the coin."""
        return self.txid, self.vout


class Payment(Struct, frozen=True, gc=False):
    """An output of a transaction: an amount in satoshi and a script."""

    value: int
    script: Script


class Tx(Struct, frozen=True, kw_only=True, eq=False):
    """A transaction. A coinbase has no `inputs`, and `coinbase` is its scriptSig.

    Use `serial.assemble` to make one: it derives `txid`, `size` and `weight`.
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
        """Return the sum of the outputs."""
        return sum(payment.value for payment in self.outputs)

    @property
    def in_sat(self) -> int:
        """Return the sum of the inputs."""
        return sum(coin.value for coin in self.inputs)

    @property
    def moved_sat(self) -> int:
        """Return the sum of the outputs that do not return to the script of an input."""
        own = {coin.script.hex for coin in self.inputs}
        return sum(payment.value for payment in self.outputs if payment.script.hex not in own)

    @property
    def vsize(self) -> float:
        """Return the size in virtual bytes, not rounded."""
        return self.weight / 4

    @property
    def rate(self) -> float:
        """Return the transaction's own fee rate in sat/vB, without relatives."""
        return self.fee / self.vsize

    @property
    def is_coinbase(self) -> bool:
        """Return whether this is the first transaction of a block."""
        return not self.inputs

    def coin(self, vout: int) -> Coin | None:
        """Return output `vout` as a coin, regardless of its script; None if there is none."""
        if not 0 <= vout < len(self.outputs):
            return None
        return Coin(self.txid, vout, self.outputs[vout].value, self.outputs[vout].script)

    def coins(self) -> list[Coin]:
        """Return the outputs that can be spent."""
        return [
            Coin(self.txid, index, payment.value, payment.script)
            for index, payment in enumerate(self.outputs)
            if payment.value and payment.script.type in SPENDABLE
        ]


class Ids:
    """A source of txids for transactions older than the world: the double SHA-256 of seed and counter."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def next(self) -> str:
        """Return a new id in hex."""
        self._count += 1
        return sha256(sha256(f"{self._seed}/{self._count}".encode()).digest()).hexdigest()


def measure(spent: list[ScriptType], scripts: list[Script]) -> tuple[int, int]:
    """Return the (size, weight) of a transaction that spends outputs of these types and pays to these scripts."""
    base = 8 + _varint(len(spent)) + _varint(len(scripts))
    witness = 0
    for kind in spent:
        size = SPENDABLE[kind]
        base += 41 + size.scriptsig
        witness += size.witness or 1
    base += sum(9 + len(script.hex) // 2 for script in scripts)
    if witness == len(spent):  # no input has a witness: the serialisation without witnesses
        witness = 0
    else:
        witness += 2
    return base + witness, base * 4 + witness


def _varint(count: int) -> int:
    return 1 if count < 0xFD else 3 if count <= 0xFFFF else 5
