"""Filters: parsed strictly, equal when they mean the same, and one meaning for every event."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.transactions import ADDRESSES, detected, output, relaxed, transaction
from kit.whales import BTC, NOW, txid
from whaled.errors import ClientError, ClientErrorCode
from whaled.model import Block, Draft, Event, Flow, Kind, Whale
from whaled.whales import lifecycle
from whaled.whales.filters import EVERYTHING, KEYS, Filter, Subject, parse_filter

BLOCK = Block(height=100, hash="b" * 64, previous_hash=None, timestamp=int(NOW))


def whale_of(value_sat: int = 150 * BTC, *, addresses: tuple[str, ...] = (), **fields: Any) -> Whale:
    """A whale with these fields in its alert."""
    found = detected(transaction([output(value_sat)]))
    return Whale(replace(found.alert, **fields), addresses)


def alert_of(value_sat: int = 150 * BTC, *, addresses: tuple[str, ...] = (), **fields: Any) -> Draft:
    """The alert of such a whale."""
    return lifecycle.alerted(whale_of(value_sat, addresses=addresses, **fields), NOW)


def wants(**filters: Any) -> Filter:
    """A parsed filter."""
    return parse_filter(filters, max_addresses=1000)


def refusal(raw: object, *, max_addresses: int = 1000) -> ClientError:
    """How a filter is refused."""
    with pytest.raises(ClientError) as refused:
        parse_filter(raw, max_addresses=max_addresses)
    assert refused.value.code is ClientErrorCode.INVALID_FILTER
    return refused.value


# --- meaning ---


def test_no_filter_wants_everything() -> None:
    assert wants() == EVERYTHING == Filter()
    whales = (alert_of(1), alert_of(10**15, flow_type=Flow.INFLOW))
    assert all(EVERYTHING.matches(found) for found in whales)
    assert EVERYTHING.matches(lifecycle.dropped(whale_of(), NOW))


@pytest.mark.parametrize(
    ("filters", "passes", "fails"),
    [
        ({"min_btc": 150}, {"value_sat": 150 * BTC}, {"value_sat": 150 * BTC - 1}),
        ({"max_btc": 150}, {"value_sat": 150 * BTC}, {"value_sat": 150 * BTC + 1}),
        ({"min_moved_btc": 0.29}, {"moved_sat": 29_000_000}, {"moved_sat": 28_999_999}),
        ({"min_moved_btc": 0}, {"moved_sat": 0}, {"moved_sat": None}),
        ({"min_flow_btc": 0.29}, {"flow_sat": 29_000_000}, {"flow_sat": 28_999_999}),
        ({"min_flow_btc": 0}, {"flow_sat": 0}, {"flow_sat": None}),
        ({"min_usd": 1e6}, {"usd_value": 1e6}, {"usd_value": 999_999.99}),
        ({"min_usd": 0}, {"usd_value": 0.0}, {"usd_value": None}),
        ({"min_urgency": 0.95}, {"urgency_score": 0.95}, {"urgency_score": 0.9499}),
        ({"min_urgency": 0}, {"urgency_score": 0.0}, {"urgency_score": None}),
        ({"min_confidence": 0.5}, {"confidence_score": 0.5}, {"confidence_score": 0.4}),
        ({"min_confidence": 0}, {"confidence_score": 0.0}, {"confidence_score": None}),
        ({"flow_types": ["inflow", "outflow"]}, {"flow_type": Flow.OUTFLOW}, {"flow_type": Flow.UNKNOWN}),
        ({"exchanges": ["kraken"]}, {"from_labels": ("Kraken",)}, {"from_labels": ("Krake",)}),
        ({"exchanges": ["KRAKEN", "x"]}, {"to_labels": ("Trust", "Kraken")}, {"to_labels": ("Trust",)}),
        ({"exchanges": ["kraken 8"]}, {"from_other_labels": ("Kraken 8",)}, {"from_other_labels": ("Kraken",)}),
        ({"exchanges": ["pool"]}, {"to_other_labels": ("Pool",)}, {"to_labels": ("Pools",)}),
        ({"exchanges": [ADDRESSES[2]]}, {"exchange_addresses": (ADDRESSES[2],)}, {"exchange_addresses": ()}),
        ({"addresses": [ADDRESSES[0], "bc1qx" * 4]}, {"addresses": ("q", ADDRESSES[0])}, {"addresses": ("q",)}),
        ({"addresses": [ADDRESSES[2].upper()]}, {"addresses": (ADDRESSES[2],)}, {"addresses": ()}),
        ({"addresses": [ADDRESSES[0]]}, {"addresses": (ADDRESSES[0],)}, {"addresses": (ADDRESSES[0].upper(),)}),
        ({"rules": ["watch:a", "x"]}, {"matched_rules": ("threshold_btc", "watch:a")}, {"matched_rules": ("watch:b",)}),
        ({"rules": ["threshold_btc"]}, {"matched_rules": ("threshold_btc",)}, {"matched_rules": ()}),
    ],
)
def test_each_condition_is_inclusive_and_null_never_passes_a_minimum(
    filters: dict[str, Any], passes: dict[str, Any], fails: dict[str, Any]
) -> None:
    chosen = wants(**filters)
    assert chosen.matches(alert_of(**passes))
    assert not chosen.matches(alert_of(**fails))


def test_all_conditions_must_hold() -> None:
    chosen = wants(min_btc=100, max_btc=200, flow_types=["inflow"])
    assert chosen.matches(alert_of(150 * BTC, flow_type=Flow.INFLOW))
    assert not chosen.matches(alert_of(150 * BTC, flow_type=Flow.OUTFLOW))
    assert not chosen.matches(alert_of(250 * BTC, flow_type=Flow.INFLOW))


@pytest.mark.parametrize(
    ("filters", "alerts_pass", "updates_pass"),
    [
        ({}, (True, True), (True, True)),
        ({"min_btc": 100}, (True, False), (True, False)),
        ({"min_btc": 100, "updates_of": "sent"}, (True, False), (True, False)),
        ({"min_btc": 100, "updates_of": "all"}, (True, False), (True, True)),
        ({"min_btc": 100, "kinds": ["alert"]}, (True, False), (False, False)),
        ({"min_btc": 100, "kinds": ["update"]}, (False, False), (True, False)),
        ({"min_btc": 100, "kinds": ["update"], "updates_of": "all"}, (False, False), (True, True)),
        ({"min_btc": 100, "kinds": ["alert"], "updates_of": "all"}, (True, False), (False, False)),
        ({"min_btc": 100, "kinds": ["alert", "update"]}, (True, False), (True, False)),
    ],
)
def test_updates_go_with_their_alert_unless_all_are_wanted(
    filters: dict[str, Any], alerts_pass: tuple[bool, bool], updates_pass: tuple[bool, bool]
) -> None:
    chosen = wants(**filters)
    for found, alert_passes, update_passes in zip(
        (whale_of(150 * BTC), whale_of(50 * BTC)), alerts_pass, updates_pass, strict=True
    ):
        updates = (
            lifecycle.confirmed(found, BLOCK, NOW),
            lifecycle.replaced(found, txid(2), NOW),
            lifecycle.dropped(found, NOW),
            lifecycle.pending_again(found, BLOCK.hash, NOW),
        )
        assert chosen.matches(lifecycle.alerted(found, NOW)) is alert_passes
        assert {chosen.matches(update) for update in updates} == {update_passes}


def test_an_event_of_the_log_and_its_draft_are_judged_alike() -> None:
    draft = lifecycle.confirmed(whale_of(), BLOCK, NOW)
    event = Event(offset=1, kind=Kind.CONFIRMED, at=NOW, whale=draft.whale, ref=draft.ref, update=draft.update)
    for chosen in (wants(min_btc=150), wants(min_btc=151), wants(kinds=["alert"])):
        assert chosen.matches(event) == chosen.matches(draft)


# --- identity ---


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ("a" * 14 + "\n" + "b" * 14, "'aaaaaaaaaaaaaa\\nbbbbbbbbbbbbbb'"),
        ("a" * 13, "'aaaaaaaaaaaaa'"),
        ("ß" * 20, repr("ß" * 20)),
        ("\n", "'\\n'"),
    ],
)
def test_one_wrong_address_among_many_is_named(wrong: str, shown: str) -> None:
    error = refusal({"addresses": [ADDRESSES[0], wrong, ADDRESSES[1]]})
    assert error.path == "filters.addresses[1]"
    assert shown in str(error)


def test_filters_that_mean_the_same_are_one_key() -> None:
    same = [
        wants(min_btc=100, flow_types=["inflow", "outflow"], exchanges=["Kraken"]),
        wants(exchanges=["KRAKEN"], flow_types=["outflow", "inflow", "inflow"], min_btc=100.0),
        wants(exchanges=["kraken"], flow_types=["outflow", "inflow"], min_btc=100, updates_of="sent"),
    ]
    assert len(set(same)) == 1
    assert len({*same, wants(min_btc=100), EVERYTHING}) == 3


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "min_btc": st.integers(0, 1000) | st.floats(0, 1000),
        "max_btc": st.floats(1000, 21_000_000),
        "min_moved_btc": st.floats(0, 21_000_000),
        "min_flow_btc": st.floats(0, 21_000_000),
        "min_usd": st.floats(0, 1e12),
        "min_urgency": st.floats(0, 1),
        "min_confidence": st.integers(0, 1),
        "flow_types": st.lists(st.sampled_from([str(flow) for flow in Flow]), min_size=1),
        "exchanges": st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=5),
        "addresses": st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=5),
        "rules": st.lists(st.sampled_from(["threshold_btc", "watch:a"]), min_size=1),
        "kinds": st.lists(st.sampled_from(["alert", "update"]), min_size=1),
        "updates_of": st.sampled_from(["sent", "all"]),
    },
)


@relaxed
@given(FILTERS)
def test_the_normalised_filters_parse_to_the_same_filter(filters: dict[str, Any]) -> None:
    chosen = parse_filter(filters, max_addresses=5)
    answered = msgspec.json.decode(msgspec.json.encode(chosen.normalised()))
    assert set(answered) <= set(filters)
    assert parse_filter(answered, max_addresses=5) == chosen
    assert hash(parse_filter(answered, max_addresses=5)) == hash(chosen)


@relaxed
@given(FILTERS, st.integers(0, 2000 * BTC), st.sampled_from(Flow))
def test_a_filter_passes_at_most_what_each_of_its_conditions_passes(
    filters: dict[str, Any], value_sat: int, flow: Flow
) -> None:
    found = alert_of(value_sat, flow_type=flow, usd_value=1.0, moved_sat=value_sat // 2, urgency_score=0.5)
    whole = parse_filter(filters, max_addresses=5).matches(found)
    each = [parse_filter({key: value}, max_addresses=5).matches(found) for key, value in filters.items()]
    assert whole == all(each)


@relaxed
@given(
    FILTERS, st.lists(st.sampled_from(ADDRESSES), max_size=3, unique=True), st.lists(st.text(max_size=5), max_size=3)
)
def test_an_event_that_many_filters_look_at_is_judged_like_one_alone(
    filters: dict[str, Any], addresses: list[str], names: list[str]
) -> None:
    found = alert_of(addresses=tuple(addresses), exchange_addresses=tuple(names), matched_rules=("threshold_btc",))
    subject = Subject(found)
    for chosen in (parse_filter(filters, max_addresses=5), parse_filter({"addresses": ADDRESSES}, max_addresses=5)):
        assert chosen.passes(subject) == chosen.matches(found)
        assert chosen.matched_in(subject) == chosen.matched_addresses(found)


# --- refusals ---


@pytest.mark.parametrize(
    ("raw", "path", "told"),
    [
        (None, "filters", "must be an object, found null"),
        ([], "filters", "must be an object, found an array"),
        ({"min_btcc": 5}, "filters.min_btcc", "did you mean 'min_btc'?"),
        ({"zzz": 5}, "filters.zzz", "known are min_btc, max_btc"),
        ({"min_btc": "5"}, "filters.min_btc", "must be a number, found a string"),
        ({"min_btc": True}, "filters.min_btc", "must be a number, found a boolean"),
        ({"min_btc": None}, "filters.min_btc", "must be a number, found null"),
        ({"min_btc": -1}, "filters.min_btc", "must be from 0 to 21,000,000, found -1"),
        ({"max_btc": 10**5000}, "filters.max_btc", "must be from 0 to 21,000,000, found a larger one"),
        ({"min_usd": float("nan")}, "filters.min_usd", "must be from 0 to"),
        ({"min_btc": 5, "max_btc": 4}, "filters.max_btc", "less than min_btc (4 < 5)"),
        ({"min_urgency": 1.01}, "filters.min_urgency", "must be from 0 to 1, found 1.01"),
        ({"flow_types": "inflow"}, "filters.flow_types", "must be an array of strings, found a string"),
        ({"flow_types": []}, "filters.flow_types", "must have 1 to 100 entries, found 0; leave it out to allow any"),
        ({"flow_types": ["inflow", "up"]}, "filters.flow_types[1]", "inflow, outflow, internal, unknown; found 'up'"),
        ({"exchanges": ["a", 1]}, "filters.exchanges[1]", "must be a string, found a number"),
        ({"exchanges": [""]}, "filters.exchanges[0]", "must have 1 to 100 characters, found 0"),
        ({"addresses": [ADDRESSES[0]] * 3}, "filters.addresses", "must have 1 to 2 entries, found 3"),
        ({"addresses": ["not an address"]}, "filters.addresses[0]", "is no address"),
        ({"rules": "watch:a"}, "filters.rules", "must be an array of strings, found a string"),
        ({"rules": ["w"] * 103}, "filters.rules", "must have 1 to 102 entries, found 103"),
        ({"kinds": ["alerts"]}, "filters.kinds[0]", "must be one of alert, update; found 'alerts'"),
        ({"kinds": {"alert": 1}}, "filters.kinds", "must be an array of strings, found an object"),
        ({"updates_of": ["all"]}, "filters.updates_of", "must be a string, found an array"),
        ({"updates_of": "mine"}, "filters.updates_of", "must be one of sent, all; found 'mine'"),
    ],
)
def test_a_bad_filter_is_refused_with_path_found_and_allowed(raw: object, path: str, told: str) -> None:
    refused = refusal(raw, max_addresses=2)
    assert refused.path == path
    assert told in str(refused)
    assert str(refused).startswith(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@relaxed
@given(json_values | st.dictionaries(st.sampled_from([*KEYS, "other"]), json_values, max_size=4))
def test_any_json_is_a_filter_or_refused_with_a_path(raw: object) -> None:
    try:
        path = "filters" if parse_filter(raw, max_addresses=2).normalised() == raw else "filters of another wording"
    except ClientError as error:
        path = error.path or ""
    assert path.startswith("filters")


def test_the_addresses_that_matched_are_named_in_the_order_of_the_transaction() -> None:
    first, second, third = ADDRESSES[:3]
    event = alert_of(addresses=(second, third, first))
    assert wants(addresses=[first, second]).matched_addresses(event) == (second, first)
    assert wants(min_btc=1).matched_addresses(event) == ()


def test_an_update_names_the_addresses_of_its_whale_and_none_if_it_passed_without() -> None:
    first, second = ADDRESSES[:2]
    confirmed = lifecycle.confirmed(whale_of(addresses=(first,)), BLOCK, NOW)
    assert wants(addresses=[first]).matched_addresses(confirmed) == (first,)
    others = wants(addresses=[second], updates_of="all")
    assert others.matches(confirmed)
    assert others.matched_addresses(confirmed) == ()
