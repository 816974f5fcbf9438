"""Detection: an exact, inclusive threshold, and alerts that say null where something is not known."""

from datetime import datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.transactions import ADDRESSES, output, relaxed, spent, transaction
from kit.whales import BTC, NOW, txid
from whaled.config.sections import Basis, DetectionSettings
from whaled.model import (
    MAX_SAT,
    NULL_TXID,
    Alert,
    FeeMarket,
    Flow,
    Input,
    Market,
    Output,
    OwnerType,
    Price,
    ProjectedBlock,
    Shape,
    Source,
    Status,
    Transaction,
    Whale,
)
from whaled.whales.detect import Detector, Rules, assess, needs_inputs
from whaled.whales.labels import AddressBook
from whaled.whales.watch import Watch

RULES = Rules(100 * BTC)
BY_MOVED = Rules(100 * BTC, Basis.MOVED)
MARKET = Market(
    fees=FeeMarket(40, 30, 20, 10, 4),
    projected=(ProjectedBlock(999_000, 20, 300), ProjectedBlock(999_000, 8, 20)),
    tip_height=800_000,
    price=Price(64_000.0, NOW - 600),
)


def judge(found: Transaction, rules: Rules = RULES, *, market: Market = MARKET, source: Source = Source.LIVE) -> Whale:
    """The whale that this must be."""
    whale = assess(found, rules=rules, book=AddressBook(), market=market, now=NOW, source=source)
    assert whale is not None
    return whale


def is_whale(found: Transaction, rules: Rules = RULES) -> bool:
    """Whether it is one."""
    whale = assess(found, rules=rules, book=AddressBook(), market=MARKET, now=NOW, source=Source.LIVE)
    return whale is not None


# --- the threshold ---


@relaxed
@given(
    threshold=st.integers(1, 21_000_000 * BTC),
    values=st.lists(st.integers(0, 21_000_000 * BTC), min_size=1, max_size=20),
)
def test_a_whale_is_exactly_what_reaches_the_threshold(threshold: int, values: list[int]) -> None:
    found = transaction([output(value) for value in values])
    assert is_whale(found, Rules(threshold)) == (sum(values) >= threshold)


@pytest.mark.parametrize(("difference", "expected"), [(-1, False), (0, True), (1, True)])
def test_one_satoshi_decides(difference: int, expected: bool) -> None:
    outputs = [output(60 * BTC), output(40 * BTC + difference)]
    assert is_whale(transaction(outputs)) is expected
    assert is_whale(transaction(outputs, [spent(101 * BTC)]), BY_MOVED) is expected


def test_by_moved_change_does_not_count() -> None:
    outputs = [output(50 * BTC), output(100 * BTC, "0014bb")]
    known = transaction(outputs, [spent(151 * BTC, "0014bb")])
    assert is_whale(known)
    assert not is_whale(known, BY_MOVED)


def test_by_moved_unknown_inputs_leave_the_total_to_decide_with_a_reason() -> None:
    unknown = transaction([output(50 * BTC), output(100 * BTC, "0014bb")])
    whale = judge(unknown, BY_MOVED)
    assert whale.alert.moved_sat is None
    assert "moved_unknown" in whale.alert.reasons
    assert "moved_unknown" not in judge(unknown).alert.reasons


def test_rules_are_taken_from_the_configuration_to_the_satoshi() -> None:
    assert Rules.of(DetectionSettings(threshold_btc=0.29, basis=Basis.MOVED)) == Rules(29_000_000, Basis.MOVED)
    assert Rules.of(DetectionSettings()) == RULES
    assert Rules.of(DetectionSettings(min_flow_share=0.3)).min_flow_share == 0.3


@relaxed
@given(
    values=st.lists(st.tuples(st.integers(0, 200 * BTC), st.sampled_from(["0014aa", "0014bb"])), min_size=1),
    fee=st.one_of(st.none(), st.integers(0, 200 * BTC)),
    is_input_known=st.booleans(),
    rules=st.builds(
        Rules,
        threshold_sat=st.one_of(st.none(), st.integers(1, 300 * BTC)),
        basis=st.sampled_from(Basis),
        threshold_usd=st.one_of(st.none(), st.floats(0.01, 3e7)),
        watch=st.sampled_from([(), (Watch("own", frozenset(), frozenset({OwnerType.OWN}), 50 * BTC),)]),
    ),
)
def test_nothing_below_the_detectors_minimum_is_a_whale(
    values: list[tuple[int, str]], fee: int | None, is_input_known: bool, rules: Rules
) -> None:
    book = AddressBook.parse(f"Mine,{ADDRESSES[0]},own", "book.csv")
    outputs = [output(value, script, ADDRESSES[0]) for value, script in values]
    paid = sum(value for value, _ in values) + (fee or 0)
    inputs = [spent(paid, "0014bb", ADDRESSES[0])] if is_input_known else []
    found = transaction(outputs, inputs, fee_sat=fee)
    detector = Detector(rules, book, price=MARKET.price)
    whale = detector.assess(found, market=MARKET, now=NOW, source=Source.LIVE)
    assert whale is None or found.value_sat + (fee or 0) >= detector.minimum_sat


# --- the basis `inputs` ---


def test_a_whale_by_its_fee_is_one_by_its_inputs_only() -> None:
    by_inputs = Rules(100 * BTC, Basis.INPUTS)
    known_fee = transaction([output(55 * BTC)], fee_sat=83 * BTC)
    known_inputs = transaction([output(55 * BTC)], [spent(138 * BTC)], fee_sat=None)
    for found in (known_fee, known_inputs):
        alert = judge(found, by_inputs).alert
        assert (alert.value_sat, alert.matched_rules) == (55 * BTC, ("threshold_btc",))
        assert "inputs_sum_unknown" not in alert.reasons
        assert not is_whale(found)
    assert Detector(by_inputs).candidates([known_fee]) == [known_fee]


@pytest.mark.parametrize(("difference", "expected"), [(-1, False), (0, True)])
def test_by_inputs_one_satoshi_of_fee_decides(difference: int, expected: bool) -> None:
    found = transaction([output(99 * BTC)], fee_sat=BTC + difference)
    assert is_whale(found, Rules(100 * BTC, Basis.INPUTS)) is expected


def test_by_inputs_an_unknown_fee_leaves_the_outputs_to_decide_with_a_reason() -> None:
    by_inputs = Rules(100 * BTC, Basis.INPUTS)
    assert "inputs_sum_unknown" in judge(transaction([output(100 * BTC)], fee_sat=None), by_inputs).alert.reasons
    small = transaction([output(100 * BTC - 1)], fee_sat=None)
    assert not is_whale(small, by_inputs)
    assert Detector(by_inputs).is_open(small)


def test_a_coinbase_takes_in_what_it_pays_out() -> None:
    coinbase = transaction([output(100 * BTC)], [Input(NULL_TXID, 0xFFFFFFFF, 0)], fee_sat=None)
    assert "inputs_sum_unknown" not in judge(coinbase, Rules(100 * BTC, Basis.INPUTS)).alert.reasons


# --- dollars ---


BY_USD = Rules(threshold_usd=6_400_000.0)


@pytest.mark.parametrize(("difference", "expected"), [(-1, False), (0, True)])
def test_a_whale_by_dollars_is_exactly_what_reaches_them(difference: int, expected: bool) -> None:
    assert is_whale(transaction([output(100 * BTC + difference)]), BY_USD) is expected


def test_an_alert_names_every_rule_that_matched() -> None:
    both = Rules(100 * BTC, threshold_usd=6_400_001.0)
    assert judge(transaction([output(100 * BTC)]), both).alert.matched_rules == ("threshold_btc",)
    assert judge(transaction([output(101 * BTC)]), both).alert.matched_rules == ("threshold_btc", "threshold_usd")


@pytest.mark.parametrize("price", [None, Price(64_000.0, NOW - 7201), Price(64_000.0, NOW + 7201)])
def test_an_unknown_price_matches_no_rule_in_dollars(price: Price | None) -> None:
    market = Market(price=price)
    found = transaction([output(21_000_000 * BTC)])
    assert assess(found, rules=BY_USD, book=AddressBook(), market=market, now=NOW, source=Source.LIVE) is None
    assert Detector(BY_USD).minimum_sat == MAX_SAT


def test_the_minimum_follows_the_price() -> None:
    detector = Detector(BY_USD, price=Price(64_000.0, NOW))
    assert detector.minimum_sat == 100 * BTC
    detector.priced(Price(640_000.0, NOW))
    assert detector.minimum_sat == 10 * BTC
    assert detector.with_rules(BY_USD, AddressBook()).minimum_sat == 10 * BTC
    detector.priced(Price(5e-324, NOW))
    assert detector.minimum_sat == MAX_SAT


# --- the age of the price ---


@pytest.mark.parametrize(("age", "usd"), [(0, 6_400_000.0), (7200, 6_400_000.0), (7201, None), (21 * 86400, None)])
def test_a_price_is_used_until_its_maximum_age_and_the_alert_has_its_time(age: float, usd: float | None) -> None:
    alert = judge(transaction([output(100 * BTC)]), market=Market(price=Price(64_000.0, NOW - age))).alert
    assert alert.usd_value == usd
    assert (alert.btc_usd is None) == (alert.price_timestamp is None) == (usd is None)
    if usd is not None:
        assert datetime.fromisoformat(alert.price_timestamp or "").timestamp() == NOW - age


def test_how_long_a_price_counts_is_configured() -> None:
    rules = Rules.of(DetectionSettings(price_max_age=60.0))
    for age, is_known in ((60, True), (61, False)):
        alert = judge(transaction([output(100 * BTC)]), rules, market=Market(price=Price(64_000.0, NOW - age))).alert
        assert (alert.usd_value is not None) is is_known


@pytest.mark.parametrize(("mined", "is_known"), [(-7800, True), (-7801, False), (7200, True)])
def test_the_price_of_a_whale_of_a_block_is_one_of_the_block_s_time(mined: float, is_known: bool) -> None:
    market = Market(price=Price(64_000.0, NOW - 600), moment=NOW + mined)
    alert = judge(transaction([output(100 * BTC)]), market=market, source=Source.BLOCK).alert
    assert (alert.usd_value is not None) is is_known


# --- the alert ---


def test_an_alert_has_every_known_value() -> None:
    inputs = [
        Input(txid(7), 0, 0xFFFFFFFD, Output(200 * BTC, "0014bb", ADDRESSES[2])),
        Input(txid(8), 1, 0xFFFFFFFF, Output(BTC, "0014cc", None)),
    ]
    outputs = [Output(150 * BTC, "0014aa", ADDRESSES[0]), Output(50 * BTC, "0014bb", ADDRESSES[2]), output(0, "6a")]
    found = transaction(outputs, inputs, number=5, fee_rate=30.0)
    book = AddressBook.parse(f"Kraken,{ADDRESSES[0]},exchange", "book.csv")
    whale = assess(found, rules=RULES, book=book, market=MARKET, now=NOW, source=Source.LIVE, replaces=txid(4))
    assert whale is not None
    alert = whale.alert
    assert (alert.transaction_id, alert.replaces) == (txid(5), txid(4))
    assert (alert.btc_value, alert.value_sat, alert.moved_sat) == (200.0, 200 * BTC, 150 * BTC)
    assert (alert.fee_sat, alert.fee_rate, alert.vsize) == (1470, 30.0, 141.0)
    assert (alert.usd_value, alert.btc_usd) == (12_800_000.0, 64_000.0)
    assert (alert.urgency_score, alert.predicted_confirmation_block) == (0.75, 800_001)
    assert (alert.flow_type, alert.flow_sat, alert.confidence_score) == (Flow.INFLOW, 150 * BTC, 0.8)
    assert (alert.exchange_addresses, alert.from_labels, alert.to_labels) == ((ADDRESSES[0],), (), ("Kraken",))
    assert (alert.shape, alert.reasons) == (Shape.TRANSFER, ())
    assert (alert.input_count, alert.output_count, alert.rbf_enabled) == (2, 3, True)
    assert (alert.status, alert.source) == (Status.PENDING, Source.LIVE)
    assert alert.detection_timestamp == "2027-01-15T08:00:00.000+00:00"
    assert whale.addresses == (ADDRESSES[2], ADDRESSES[0])


def test_unknown_values_are_null_and_never_a_number() -> None:
    alert = judge(transaction([output(150 * BTC)], fee_sat=None, fee_rate=None), market=Market()).alert
    unknown = (
        alert.moved_sat,
        alert.fee_sat,
        alert.fee_rate,
        alert.usd_value,
        alert.btc_usd,
        alert.urgency_score,
        alert.predicted_confirmation_block,
        alert.confidence_score,
        alert.flow_sat,
        alert.replaces,
    )
    assert set(unknown) == {None}
    assert alert.flow_type is Flow.UNKNOWN


def test_dollars_are_rounded_to_cents() -> None:
    alert = judge(transaction([output(100 * BTC + 12_345)]), market=Market(price=Price(64_123.45, NOW))).alert
    assert alert.usd_value == 6_412_352.92


@pytest.mark.parametrize(
    ("confirmed", "source", "status"),
    [
        (False, Source.LIVE, Status.PENDING),
        (False, Source.SNAPSHOT, Status.PENDING),
        (True, Source.LIVE, Status.CONFIRMED),
        (False, Source.BLOCK, Status.CONFIRMED),
    ],
)
def test_a_whale_first_seen_in_a_block_is_confirmed_and_nothing_is_predicted(
    confirmed: bool, source: Source, status: Status
) -> None:
    alert = judge(transaction([output(150 * BTC)], confirmed=confirmed), source=source).alert
    assert (alert.status, alert.source) == (status, source)
    assert (alert.predicted_confirmation_block is None) == (status is Status.CONFIRMED)


def test_the_flow_of_a_coinjoin_is_unknown_but_its_labels_are_given() -> None:
    book = AddressBook.parse(f"Kraken,{ADDRESSES[0]},exchange", "book.csv")
    outputs = [Output(50 * BTC, f"0014a{n}", ADDRESSES[0] if n == 0 else None) for n in range(5)]
    mixed = transaction(outputs, [spent(51 * BTC, f"0014b{n}") for n in range(5)])
    whale = assess(mixed, rules=RULES, book=book, market=MARKET, now=NOW, source=Source.LIVE)
    assert whale is not None
    assert whale.alert.shape is Shape.COINJOIN
    assert whale.alert.flow_sat is None
    assert (whale.alert.flow_type, whale.alert.confidence_score) == (Flow.UNKNOWN, None)
    assert (whale.alert.to_labels, whale.alert.exchange_addresses) == (("Kraken",), (ADDRESSES[0],))


def test_inputs_are_needed_while_one_is_unknown() -> None:
    assert needs_inputs(transaction([output(1)], [spent(1), spent()]))
    assert not needs_inputs(transaction([output(1)], [spent(1), spent(2)]))


# --- memory ---


def test_a_transaction_is_new_once() -> None:
    detector = Detector(RULES)
    assert [detector.is_new(txid(number)) for number in (1, 2, 1, 2, 3)] == [True, True, False, False, True]


@relaxed
@given(limit=st.integers(1, 20), asked=st.lists(st.integers(0, 40), max_size=200))
def test_memory_is_bounded_and_the_oldest_is_forgotten_first(limit: int, asked: list[int]) -> None:
    detector = Detector(RULES, seen_limit=limit)
    remembered: list[int] = []
    for number in asked:
        assert detector.is_new(txid(number)) == (number not in remembered)
        if number not in remembered:
            remembered = [*remembered, number][-limit:]
        assert detector.seen_count == len(remembered) <= limit


def test_candidates_are_new_and_large_enough_and_the_small_are_not_remembered() -> None:
    detector = Detector(RULES)
    small = transaction([output(100 * BTC - 1471)], number=1)
    large = transaction([output(100 * BTC - 1470)], number=2)  # with its fee it has as much
    assert detector.candidates([small, large, large]) == [large]
    assert detector.seen_count == 1


def test_a_reload_changes_the_rules_and_keeps_the_memory() -> None:
    before = Detector(RULES)
    seen = transaction([output(150 * BTC)], number=1)
    before.candidates([seen])
    book = AddressBook.parse(f"Kraken,{ADDRESSES[0]},exchange", "book.csv")
    after = before.with_rules(Rules(10 * BTC), book)
    fresh = transaction([output(10 * BTC)], number=2)
    assert (after.minimum_sat, after.book, after.seen_limit) == (10 * BTC, book, before.seen_limit)
    assert after.candidates([seen, fresh]) == [fresh]
    assert after.assess(fresh, market=MARKET, now=NOW, source=Source.LIVE) is not None
    assert before.rules == RULES


def test_a_transaction_paid_by_one_label_is_no_coinjoin() -> None:
    outputs = [Output(50 * BTC, f"0014a{n}") for n in range(5)]
    inputs = [spent(50 * BTC, f"0014b{n}", address) for n, address in enumerate(ADDRESSES)]
    mixed = transaction(outputs, inputs)
    assert judge(mixed).alert.shape is Shape.COINJOIN
    book = AddressBook.parse("\n".join(f"Trust,{address},custodian" for address in ADDRESSES), "book.csv")
    whale = assess(mixed, rules=RULES, book=book, market=MARKET, now=NOW, source=Source.LIVE)
    assert whale is not None
    assert (whale.alert.shape, whale.alert.flow_type) == (Shape.TRANSFER, Flow.OUTFLOW)


def test_the_least_share_of_a_flow_is_that_of_the_rules() -> None:
    book = AddressBook.parse(f"Kraken,{ADDRESSES[0]},exchange", "book.csv")
    found = transaction([Output(30 * BTC, "0014aa", ADDRESSES[0]), output(170 * BTC, "0014cc")], [spent(200 * BTC)])
    for share, flow in ((0.1, Flow.INFLOW), (0.2, Flow.UNKNOWN)):
        rules = Rules(100 * BTC, min_flow_share=share)
        whale = assess(found, rules=rules, book=book, market=MARKET, now=NOW, source=Source.LIVE)
        assert whale is not None
        assert whale.alert.flow_type is flow


def test_an_alert_of_a_version_without_flow_sat_can_be_read() -> None:
    alert = judge(transaction([output(150 * BTC)])).alert
    older = msgspec.to_builtins(alert)
    del older["flow_sat"]
    assert msgspec.json.decode(msgspec.json.encode(older), type=Alert) == alert
