"""How much a transaction moves, and what it looks like. Pure."""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

from msgspec.structs import replace

from whaled.model import SAT_PER_BTC, Input, Output, Shape, Transaction
from whaled.whales import coinjoins

MAX_BTC = 21_000_000
# BIP 125: an input signals with any nSequence below this.
FINAL_SEQUENCES = 0xFFFFFFFE
NULL_TXID = "0" * 64
OP_RETURN = "6a"
# BIP 433: anyone can spend it, to add a fee. Backends show it as bc1pfeessrawgf.
PAY_TO_ANCHOR = "51024e73"
# The ratio at which the backend itself calls a transaction a consolidation or a batch payout (api/common.ts, flags).
MANY_TO_ONE = 5
# A consolidation gathers: one output, or two where it pays something on the way.
CONSOLIDATION_OUTPUTS = 2


def btc_to_sat(value: float | str) -> int:
    """BTC as satoshi, to the nearest one.

    Decimal arithmetic on the shortest text of a float, so 0.29 is 29,000,000 and 110.00000000000001, which is what a
    program makes of 100 * 1.1, is 110. Raises ValueError for what is no amount: not a number, negative, beyond
    21 million.
    """
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not an amount of BTC") from None
    if not amount.is_finite() or not 0 <= amount <= MAX_BTC:
        raise ValueError(f"{value} is not an amount of BTC: it must be from 0 to {MAX_BTC}")
    return int((amount * SAT_PER_BTC).to_integral_value(ROUND_HALF_EVEN))


def sat_to_btc(value_sat: int) -> float:
    """Satoshi as the nearest float of BTC."""
    return value_sat / SAT_PER_BTC


def is_coinbase(spent: Input) -> bool:
    """Whether this input makes new coins."""
    return spent.txid == NULL_TXID


def has_unknown_inputs(transaction: Transaction) -> bool:
    """Whether an output that this transaction spends is not known."""
    return not transaction.inputs or any(
        spent.prevout is None and not is_coinbase(spent) for spent in transaction.inputs
    )


def input_scripts(transaction: Transaction) -> frozenset[str]:
    """The scripts of the known spent outputs."""
    return frozenset(spent.prevout.script for spent in transaction.inputs if spent.prevout is not None)


def moved_sat(transaction: Transaction) -> int | None:
    """Satoshi in outputs whose script is not the script of an input. None while any spent output is unknown.

    Change to a fresh address counts as moved: nothing in the transaction proves that it is change. So does what an
    OP_RETURN output burns. Never more than the sum of all outputs.
    """
    if has_unknown_inputs(transaction):
        return None
    own = input_scripts(transaction)
    return sum(output.value for output in transaction.outputs if output.script not in own)


def inputs_sat(transaction: Transaction) -> int | None:
    """Sum of all inputs: the spent outputs where they are known, else outputs and fee. None where neither is known.

    The input of a coinbase is the new coins and the fees of its block: all that it pays out.
    """
    if any(map(is_coinbase, transaction.inputs)):
        return transaction.value_sat
    if not has_unknown_inputs(transaction):
        return sum(spent.prevout.value for spent in transaction.inputs if spent.prevout is not None)
    return transaction.value_sat + transaction.fee_sat if transaction.fee_sat is not None else None


def with_known_fee(transaction: Transaction) -> Transaction:
    """The transaction, its fee taken from its inputs and outputs where the backend gave none, or 0.

    A backend writes 0 for a transaction that a block brought between two of its calls, and keeps that 0 when the block
    dies. A transaction can also pay nothing (the parent of a package); whether it does, its inputs tell.
    """
    if transaction.fee_sat or any(map(is_coinbase, transaction.inputs)):
        return transaction
    put_in = sum(spent.prevout.value for spent in transaction.inputs if spent.prevout is not None)
    is_known = not has_unknown_inputs(transaction) and put_in >= transaction.value_sat
    fee = put_in - transaction.value_sat if is_known else None
    if fee == transaction.fee_sat:
        return transaction
    # No transaction is smaller than 1 vB: by what is, a rate would come out infinite.
    rate = fee / transaction.vsize if fee is not None and transaction.vsize >= 1.0 else None
    return replace(transaction, fee_sat=fee, fee_rate=rate)


def is_spendable(output: Output) -> bool:
    """Whether the output pays somebody: it has a value and is neither a data carrier nor an anchor (pay-to-anchor)."""
    return output.value > 0 and output.script != PAY_TO_ANCHOR and not output.script.startswith(OP_RETURN)


def shape(transaction: Transaction, *, one_payer: bool = False) -> tuple[Shape, tuple[str, ...]]:
    """What the transaction looks like, and the rules that decided. `one_payer`: all inputs are known to be one owner's.

    The first that holds, over the outputs that pay somebody:

    - self_transfer: all of them return to the script of an input. Proven, so only where the inputs are known.
    - coinjoin: by the rules of `coinjoins.rules_met`; never of one payer.
    - consolidation: one or two outputs, five times as many inputs.
    - batch: five times as many outputs as inputs.
    - transfer: everything else; no rule decided.

    "inputs_unknown" says that rules which need the inputs could not be tried in full.
    """
    outputs = [output for output in transaction.outputs if is_spendable(output)]
    unknown = has_unknown_inputs(transaction)
    blind = ("inputs_unknown",) if unknown else ()
    count = len(transaction.inputs)
    if not outputs or count == 0:
        return Shape.TRANSFER, blind
    if not unknown:
        own = input_scripts(transaction)
        if all(output.script in own for output in outputs):
            return Shape.SELF_TRANSFER, ("outputs_return_to_inputs",)
    if not one_payer:
        spent = [entry.prevout for entry in transaction.inputs if entry.prevout is not None]
        rules = coinjoins.rules_met(coinjoins.Sides(outputs, count, None if unknown else spent))
        if rules is not None:
            return Shape.COINJOIN, (*rules, *blind)
    if len(outputs) <= CONSOLIDATION_OUTPUTS and count >= MANY_TO_ONE * len(outputs):
        return Shape.CONSOLIDATION, (f"inputs>={MANY_TO_ONE}*outputs", f"outputs<={CONSOLIDATION_OUTPUTS}", *blind)
    if len(outputs) >= MANY_TO_ONE * count:
        return Shape.BATCH, (f"outputs>={MANY_TO_ONE}*inputs", *blind)
    return Shape.TRANSFER, blind


def signals_rbf(transaction: Transaction) -> bool:
    """Whether an input signals that the transaction may be replaced (BIP 125, rule 1; ancestors are not looked at)."""
    return any(spent.sequence < FINAL_SEQUENCES for spent in transaction.inputs)
