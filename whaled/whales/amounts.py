"""The amounts that a transaction moves, and its shape. Pure."""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

from msgspec.structs import replace

from whaled.model import MAX_BTC, NULL_TXID, SAT_PER_BTC, Input, Output, Shape, Transaction
from whaled.whales import coinjoins

# BIP 125: an input signals replaceability with any nSequence below this.
FINAL_SEQUENCES = 0xFFFFFFFE
OP_RETURN = "6a"
# BIP 433: an output that anyone can spend, to add a fee. Backends show it as bc1pfeessrawgf.
PAY_TO_ANCHOR = "51024e73"
# The ratio at which the backend itself calls a transaction a consolidation or a batch payout (api/common.ts, flags).
MANY_TO_ONE = 5
# A consolidation has one output, or two if it also makes a payment.
CONSOLIDATION_OUTPUTS = 2


def btc_to_sat(value: float | str) -> int:
    """Convert BTC to satoshi, rounded to the nearest one.

    The conversion is decimal arithmetic on the shortest text of a float: 0.29 BTC is 29,000,000 sat, and
    110.00000000000001 BTC, the float result of 100 * 1.1, is exactly 110 BTC. Raises ValueError for an invalid amount:
    not a number, negative, or more than 21 million.
    """
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not an amount of BTC") from None
    if not amount.is_finite() or not 0 <= amount <= MAX_BTC:
        raise ValueError(f"{value} is not an amount of BTC: it must be from 0 to {MAX_BTC}")
    return int((amount * SAT_PER_BTC).to_integral_value(ROUND_HALF_EVEN))


def sat_to_btc(value_sat: int) -> float:
    """Convert satoshi to the nearest float in BTC."""
    return value_sat / SAT_PER_BTC


def is_coinbase(spent: Input) -> bool:
    """Return whether an input is that of a coinbase transaction, which creates new coins."""
    return spent.txid == NULL_TXID


def has_unknown_inputs(transaction: Transaction) -> bool:
    """Return whether any output that a transaction spends is unknown."""
    return not transaction.inputs or any(
        spent.prevout is None and not is_coinbase(spent) for spent in transaction.inputs
    )


def input_scripts(transaction: Transaction) -> frozenset[str]:
    """Return the scripts of the known prevouts."""
    return frozenset(spent.prevout.script for spent in transaction.inputs if spent.prevout is not None)


def moved_sat(transaction: Transaction) -> int | None:
    """Return the satoshi in outputs whose script is not the script of an input; None if any prevout is unknown.

    Change to a fresh address counts as moved, because nothing in the transaction proves that it is change. An amount
    burnt by an OP_RETURN output also counts. The result never exceeds the sum of all outputs.
    """
    if has_unknown_inputs(transaction):
        return None
    own = input_scripts(transaction)
    return sum(output.value for output in transaction.outputs if output.script not in own)


def inputs_sat(transaction: Transaction) -> int | None:
    """Return the sum of all inputs: that of the prevouts if they are known, else outputs plus fee, else None.

    The input of a coinbase transaction is the new coins and the fees of its block, that is, all that it pays out.
    """
    if any(map(is_coinbase, transaction.inputs)):
        return transaction.value_sat
    if not has_unknown_inputs(transaction):
        return sum(spent.prevout.value for spent in transaction.inputs if spent.prevout is not None)
    return transaction.value_sat + transaction.fee_sat if transaction.fee_sat is not None else None


def with_known_fee(transaction: Transaction) -> Transaction:
    """Return the transaction with its fee computed from inputs and outputs if the backend sent no fee, or 0.

    A backend sends 0 for a transaction that was mined between two of its calls, and keeps that 0 if the block leaves
    the chain. A fee of 0 may also be real (the parent of a package); only the inputs show which is the case.
    """
    if transaction.fee_sat or any(map(is_coinbase, transaction.inputs)):
        return transaction
    put_in = sum(spent.prevout.value for spent in transaction.inputs if spent.prevout is not None)
    is_known = not has_unknown_inputs(transaction) and put_in >= transaction.value_sat
    fee = put_in - transaction.value_sat if is_known else None
    if fee == transaction.fee_sat:
        return transaction
    # No transaction is smaller than 1 vB; a smaller size is invalid, and dividing by it may overflow.
    rate = fee / transaction.vsize if fee is not None and transaction.vsize >= 1.0 else None
    return replace(transaction, fee_sat=fee, fee_rate=rate)


def is_spendable(output: Output) -> bool:
    """Return whether an output is a payment: it has a value and is neither a data carrier nor an anchor."""
    return output.value > 0 and output.script != PAY_TO_ANCHOR and not output.script.startswith(OP_RETURN)


def shape(transaction: Transaction, *, one_payer: bool = False) -> tuple[Shape, tuple[str, ...]]:
    """Return the shape of a transaction and the rules that decided it.

    `one_payer` states that all inputs are known to belong to one owner. The shape is the first of these that applies to
    the outputs that are payments:

    - self_transfer: all of them return to the script of an input. This is proof, so the inputs must be known.
    - coinjoin: by the rules of `coinjoins.rules_met`; never with one payer.
    - consolidation: one or two outputs, and at least five times as many inputs.
    - batch: at least five times as many outputs as inputs.
    - transfer: anything else; no rule decided.

    The reason "inputs_unknown" states that the rules which need the inputs could not be applied in full.
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
    """Return whether an input signals that the transaction may be replaced (BIP 125, rule 1; ancestors are ignored)."""
    return any(spent.sequence < FINAL_SEQUENCES for spent in transaction.inputs)
