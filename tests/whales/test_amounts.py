"""Amounts and shapes: exact arithmetic, and only what the transaction proves."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.transactions import output, relaxed, spent, transaction
from kit.whales import BTC
from whaled.model import NULL_TXID, Input, Output, Shape
from whaled.whales.amounts import (
    btc_to_sat,
    has_unknown_inputs,
    moved_sat,
    sat_to_btc,
    shape,
    signals_rbf,
    with_known_fee,
)

SCRIPTS = st.sampled_from(["0014aa", "0014bb", "0014cc", "6a00", "51024e73", ""])
VALUES = st.integers(0, 21_000_000 * BTC)
OUTPUTS = st.lists(st.builds(output, VALUES, SCRIPTS), min_size=1, max_size=12)
KNOWN_INPUTS = st.lists(st.builds(spent, VALUES, SCRIPTS), min_size=1, max_size=12)
INPUTS = st.lists(st.builds(spent, st.none() | VALUES, SCRIPTS), min_size=1, max_size=12)


def coins(count: int, value: int = BTC) -> list[Input]:
    """Inputs from as many different scripts."""
    return [spent(value, f"0014b{number:x}") for number in range(count)]


def payments(*values: int) -> list[Output]:
    """Outputs to different scripts."""
    return [output(value, f"0014a{number:x}") for number, value in enumerate(values)]


# --- BTC and satoshi ---


@pytest.mark.parametrize(
    ("btc", "sat"),
    [
        (100, 100 * BTC),
        (100.0, 100 * BTC),
        ("100", 100 * BTC),
        (0.29, 29_000_000),
        (1.1, 110_000_000),
        (100 * 1.1, 110 * BTC),
        ("0.00000001", 1),
        (1e-8, 1),
        ("99.99999999", 100 * BTC - 1),
        (20_999_999.99999999, 21_000_000 * BTC - 1),
        (0, 0),
    ],
)
def test_btc_becomes_the_satoshi_that_was_meant(btc: float | str, sat: int) -> None:
    assert btc_to_sat(btc) == sat


@pytest.mark.parametrize("value", ["", "1,5", "abc", -1, -1e-9, float("nan"), float("inf"), 21_000_001, True, "1e99"])
def test_an_invalid_amount_is_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match="not an amount of BTC"):
        btc_to_sat(value)


@relaxed
@given(VALUES)
def test_every_satoshi_survives_the_way_through_a_float(value_sat: int) -> None:
    assert btc_to_sat(sat_to_btc(value_sat)) == value_sat
    assert btc_to_sat(str(Decimal(value_sat) / BTC)) == value_sat


# --- what moved ---


@relaxed
@given(OUTPUTS, INPUTS)
def test_the_moved_amount_is_at_most_the_outputs_and_unknown_with_any_unknown_input(
    outputs: list[Output], inputs: list[Input]
) -> None:
    found = transaction(outputs, inputs)
    moved = moved_sat(found)
    if any(entry.prevout is None for entry in inputs):
        assert moved is None
        assert has_unknown_inputs(found)
    else:
        assert moved is not None
        assert 0 <= moved <= found.value_sat


@relaxed
@given(OUTPUTS, KNOWN_INPUTS)
def test_moved_and_returned_amounts_add_up(outputs: list[Output], inputs: list[Input]) -> None:
    own = {entry.prevout.script for entry in inputs if entry.prevout is not None}
    returned = sum(entry.value for entry in outputs if entry.script in own)
    found = transaction(outputs, inputs)
    assert moved_sat(found) == found.value_sat - returned


def test_change_to_a_fresh_address_counts_as_moved_and_to_an_inputs_script_does_not() -> None:
    inputs = [spent(10 * BTC, "0014bb")]
    assert moved_sat(transaction([output(7 * BTC, "0014aa"), output(3 * BTC, "0014cc")], inputs)) == 10 * BTC
    assert moved_sat(transaction([output(7 * BTC, "0014aa"), output(3 * BTC, "0014bb")], inputs)) == 7 * BTC


def test_a_coinbase_moves_everything_and_misses_no_input() -> None:
    minted = transaction([output(BTC)], [Input(NULL_TXID, 0xFFFFFFFF, 0xFFFFFFFF)])
    assert (moved_sat(minted), has_unknown_inputs(minted)) == (BTC, False)


def test_a_transaction_whose_inputs_could_not_be_read_has_unknown_inputs() -> None:
    unread = replace(transaction([output(BTC)]), inputs=())
    assert moved_sat(unread) is None
    assert shape(unread)[0] is Shape.TRANSFER


# --- shapes ---


def test_a_payment_with_change_is_a_transfer_and_no_rule_decided() -> None:
    assert shape(transaction(payments(7, 3), coins(1))) == (Shape.TRANSFER, ())
    assert shape(transaction(payments(7, 3))) == (Shape.TRANSFER, ("inputs_unknown",))


def test_a_self_transfer_is_proven_by_its_inputs_and_never_assumed() -> None:
    home = [output(5 * BTC, "0014bb"), output(0, "6a0401"), output(BTC, "0014bb")]
    assert shape(transaction(home, [spent(7 * BTC, "0014bb")]))[0] is Shape.SELF_TRANSFER
    assert shape(transaction(home))[0] is Shape.TRANSFER
    away = [*home, output(1, "0014aa")]
    assert shape(transaction(away, [spent(7 * BTC, "0014bb")]))[0] is Shape.TRANSFER


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        (5, 1, Shape.CONSOLIDATION),
        (4, 1, Shape.TRANSFER),
        (10, 2, Shape.CONSOLIDATION),
        (9, 2, Shape.TRANSFER),
        (15, 3, Shape.TRANSFER),
        (1, 5, Shape.BATCH),
        (1, 4, Shape.TRANSFER),
        (2, 10, Shape.BATCH),
        (2, 9, Shape.TRANSFER),
    ],
)
def test_many_to_few_is_a_consolidation_and_few_to_many_a_batch(inputs: int, outputs: int, expected: Shape) -> None:
    values = [BTC + number for number in range(outputs)]
    assert shape(transaction(payments(*values), coins(inputs)))[0] is expected


def test_data_carriers_and_empty_outputs_do_not_count_as_outputs() -> None:
    extras = [output(0, "6a04"), output(0, "51024e73"), output(0, "6a05"), output(240, "51024e73")]
    assert shape(transaction([output(5 * BTC), *extras], coins(5)))[0] is Shape.CONSOLIDATION
    assert shape(transaction([output(BTC, "0014b0"), *extras], coins(2)))[0] is Shape.SELF_TRANSFER
    assert shape(transaction([*payments(7, 8, 9, 10), output(240, "51024e73")], coins(1)))[0] is Shape.TRANSFER


def test_the_reasons_name_the_rules() -> None:
    assert shape(transaction(payments(5 * BTC), coins(12)))[1] == ("inputs>=5*outputs", "outputs<=2")
    assert shape(transaction(payments(*range(1, 7)), coins(1)))[1] == ("outputs>=5*inputs",)
    assert shape(transaction(payments(*[BTC] * 3), coins(3)))[1] == ("equal_outputs>=3", "inputs>=equal_outputs")
    blind = transaction(payments(*[BTC] * 5), [spent() for _ in range(5)])
    assert shape(blind)[1] == ("equal_outputs>=5", "inputs>=equal_outputs", "inputs_unknown")


@pytest.mark.parametrize(
    ("values", "inputs", "expected"),
    [
        ([BTC] * 5, coins(5), Shape.COINJOIN),  # Whirlpool
        ([BTC, BTC, BTC, 7, 8], coins(4), Shape.COINJOIN),  # JoinMarket: three take part, two have change
        ([BTC, BTC, BTC, 7, 8, 9, 10], coins(7), Shape.TRANSFER),  # more change than takers
        ([BTC, BTC, 7], coins(3), Shape.TRANSFER),  # two equal outputs happen
        ([BTC] * 5, coins(4), Shape.TRANSFER),  # fewer inputs than equal outputs
        ([BTC] * 5, [spent(BTC, "0014bb")] * 5, Shape.TRANSFER),  # one owner splits
        ([BTC] * 5, [spent() for _ in range(5)], Shape.COINJOIN),
        ([BTC] * 4, [spent() for _ in range(5)], Shape.TRANSFER),  # blind: too few to say so
        ([546] * 5, coins(5), Shape.TRANSFER),  # tokens
    ],
)
def test_equal_outputs_from_as_many_inputs_are_a_coinjoin(
    values: list[int], inputs: list[Input], expected: Shape
) -> None:
    assert shape(transaction(payments(*values), inputs))[0] is expected


@pytest.mark.parametrize(
    ("values", "inputs", "expected"),
    [
        ([100 * BTC] * 5 + [39 * BTC], coins(6, 90 * BTC), Shape.TRANSFER),  # one output of change: one owner
        ([1000 * BTC] * 3 + [199 * BTC], coins(4, 800 * BTC), Shape.TRANSFER),
        ([10 * BTC] * 5 + [5 * BTC] * 4 + [BTC], coins(9, 9 * BTC), Shape.TRANSFER),  # pays two amounts to many
        ([10_000] * 10 + [50 * BTC + n for n in range(10)], coins(10, 51 * BTC), Shape.TRANSFER),  # dust
        ([30 * BTC] * 5 + [n * BTC for n in (3, 7, 12, 15, 19)], coins(9, 23 * BTC), Shape.COINJOIN),
        # Ten large coins, and what could be their change is small.
        ([BTC] * 5 + [60 * BTC, 2 * BTC, 3, 4, 5], coins(10, 67 * BTC // 10 + 1_000), Shape.TRANSFER),
    ],
)
def test_among_many_owners_the_remainder_goes_to_many(values: list[int], inputs: list[Input], expected: Shape) -> None:
    assert shape(transaction(payments(*values), inputs))[0] is expected


def test_two_owners_make_a_coinjoin_if_each_receives_its_own_amount() -> None:
    inputs = [spent(30 * BTC, "0014b0"), spent(12 * BTC, "0014b1")]
    fair = payments(10 * BTC, 10 * BTC, 20 * BTC + 5_000, 2 * BTC - 9_000)
    assert shape(transaction(fair, inputs)) == (Shape.COINJOIN, ("equal_outputs=2", "change_matches_inputs"))
    assert shape(transaction(fair))[0] is Shape.TRANSFER
    other = payments(10 * BTC, 10 * BTC, 15 * BTC, 7 * BTC - 4_000)
    assert shape(transaction(other, inputs))[0] is Shape.TRANSFER
    same = [spent(30 * BTC, "0014b0"), spent(12 * BTC, "0014b0")]
    assert shape(transaction(fair, same))[0] is Shape.TRANSFER


def test_standard_values_of_wabisabi_are_a_coinjoin_and_round_ones_are_not() -> None:
    powers = [2**n for n in range(24, 32)] + [2 * 3**n for n in range(14, 18)]
    found, reasons = shape(transaction(payments(*powers, 12_345, 7_654_321), coins(6, 30 * BTC)))
    assert (found, reasons) == (Shape.COINJOIN, ("standard_values>=1/2", "powers_of_2_or_3>=1/4"))
    rounded = [n * 10**zeros for n in (1, 2, 5) for zeros in (6, 7, 8, 9)]
    assert shape(transaction(payments(*rounded), coins(6, 30 * BTC)))[0] is Shape.TRANSFER


def test_doubling_levels_are_a_coinjoin_if_many_pay_and_many_have_change() -> None:
    values = [BTC // 10] * 12 + [BTC // 5] * 6 + [2 * BTC // 5] * 3
    change = [BTC + number for number in range(12)]
    levels = transaction(payments(*values, *change), coins(20, BTC))
    assert shape(levels) == (Shape.COINJOIN, ("doubling_outputs>=1/2", "inputs>=equal_outputs"))
    assert shape(transaction(payments(*values, 12 * BTC), coins(20, BTC)))[0] is Shape.TRANSFER
    assert shape(transaction(payments(*values, *change), coins(8, 3 * BTC)))[0] is Shape.TRANSFER


def test_fifty_scripts_and_few_values_are_a_coinjoin() -> None:
    values = [BTC * 7 // 3 + number % 12 * 7_919 for number in range(60)]
    many = payments(*values, *range(BTC, BTC + 10))
    found, reasons = shape(transaction(many, coins(55, 4 * BTC)))
    assert (found, reasons) == (Shape.COINJOIN, ("input_scripts>=50", "repeated_outputs>=3/4"))
    assert shape(transaction(many, coins(30, 8 * BTC)))[0] is Shape.TRANSFER
    assert shape(transaction(many, coins(55, 4 * BTC)), one_payer=True)[0] is Shape.TRANSFER


def test_equal_values_to_one_script_are_no_coinjoin() -> None:
    assert shape(transaction([output(BTC)] * 5, coins(5)))[0] is Shape.TRANSFER


@pytest.mark.slow
@relaxed
@given(OUTPUTS, INPUTS)
def test_every_transaction_has_a_shape_and_only_decided_ones_have_rules(
    outputs: list[Output], inputs: list[Input]
) -> None:
    found, reasons = shape(transaction(outputs, inputs))
    rules = [reason for reason in reasons if reason != "inputs_unknown"]
    assert bool(rules) == (found is not Shape.TRANSFER)


# --- replace by fee ---


@pytest.mark.parametrize(
    ("sequences", "signals"),
    [
        ([0xFFFFFFFF], False),
        ([0xFFFFFFFE], False),
        ([0xFFFFFFFD], True),
        ([0], True),
        ([0xFFFFFFFF, 0xFFFFFFFD], True),
    ],
)
def test_any_input_below_the_two_final_sequences_signals(sequences: list[int], signals: bool) -> None:
    inputs = [spent(sequence=sequence) for sequence in sequences]
    assert signals_rbf(transaction([output(BTC)], inputs)) is signals


# --- fees that the backend does not know ---


@pytest.mark.parametrize("fee", [None, 0])
@pytest.mark.parametrize(
    ("inputs", "known"),
    [
        ([spent(BTC + 192)], 192),
        ([spent(BTC)], 0),  # the parent of a package may pay nothing
        ([spent(BTC + 192), spent(None)], None),
        ([spent(BTC - 1)], None),  # what the backend says of the inputs cannot be
        ([], None),
    ],
)
def test_an_unknown_fee_is_inputs_minus_outputs(fee: int | None, inputs: list[Input], known: int | None) -> None:
    found = with_known_fee(
        replace(transaction([output(BTC)], inputs), fee_sat=fee, fee_rate=None if fee is None else 0.0, vsize=100.0)
    )
    assert found.fee_sat == known
    assert found.fee_rate == (None if known is None else known / 100)


def test_a_known_fee_is_kept() -> None:
    before = replace(transaction([output(BTC)], [spent(BTC + 192)]), fee_sat=191, fee_rate=2.0, vsize=100.0)
    assert with_known_fee(before) is before
