"""The backend's dialect, on recorded frames and on what could go wrong with them."""

import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.recordings import burst_frame, recorded_frames
from kit.transactions import relaxed
from kit.whales import BTC, txid
from whaled.model import FeeMarket, ProjectedBlock
from whaled.source import Continuity
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.continuity import SequenceTracker
from whaled.sources.mempool_space.dialect import (
    PING,
    SAMPLE_LIMIT,
    DialectError,
    DialectFault,
    decode,
    subscribe_frames,
    track_block_frame,
)
from whaled.sources.mempool_space.surrogates import repaired

DELTA = "mempool-transactions"


def frame(**parts: object) -> bytes:
    """A frame of these parts."""
    return json.dumps(parts).encode()


@cache
def recorded_transaction() -> dict[str, Any]:
    """A transaction as a real backend sent it."""
    return dict(json.loads(burst_frame())[DELTA]["added"][0])


def tx(number: int, value: int, **fields: object) -> dict[str, Any]:
    """A recorded transaction with another txid and value."""
    original = recorded_transaction()
    first, *others = original["vout"]
    zeroed = [other | {"value": 0} for other in others]
    return dict(original | {"txid": txid(number), "vout": [first | {"value": value}, *zeroed]} | fields)


def delta(**fields: object) -> dict[str, object]:
    """A delta with all five keys."""
    return {"sequence": 1, "added": [], "removed": [], "mined": [], "replaced": []} | fields


# --- every recorded frame ---


@pytest.mark.parametrize("index", range(len(recorded_frames())))
def test_every_recorded_frame_is_understood_whole(index: int) -> None:
    raw = recorded_frames()[index]
    plain = json.loads(raw)
    read = decode(raw)
    assert (read.skipped, read.unknown) == ((), ())
    assert (read.delta is not None) == (DELTA in plain)
    assert (read.block is not None) == ("block" in plain)
    assert (read.blocks is not None) == ("blocks" in plain)
    assert (read.fees is not None) == ("fees" in plain)
    assert (read.projected is not None) == ("mempool-blocks" in plain)
    assert read.price_known == ("conversions" in plain)
    assert read.has_difficulty == ("da" in plain)
    assert read.is_init == ("backendInfo" in plain)
    assert (read.loading is not None) == ("loadingIndicators" in plain)
    if read.delta is None:
        return
    told = plain[DELTA]
    assert read.delta.sequence == told["sequence"]
    assert len(read.delta.added) == len(told["added"])
    assert list(read.delta.removed) == told["removed"]
    assert list(read.delta.mined) == told["mined"]
    assert [(pair.replaced, pair.by) for pair in read.delta.replaced] == [
        (pair["replaced"], pair["by"]["txid"]) for pair in told["replaced"]
    ]


@pytest.mark.parametrize("index", range(len(recorded_frames())))
def test_every_recorded_transaction_is_read_exactly(index: int) -> None:
    raw = recorded_frames()[index]
    told = json.loads(raw).get(DELTA, delta())
    plain = {found["txid"]: found for found in (*told["added"], *(pair["by"] for pair in told["replaced"]))}
    sample = [found for found in plain.values() if sum(out["value"] for out in found["vout"]) >= BTC]
    change = decode(raw).delta
    read = change.at_least(BTC) if change is not None else []
    assert {found.txid for found in read} == {found["txid"] for found in sample}
    for found in read:
        expected = plain[found.txid]
        assert found.value_sat == sum(out["value"] for out in expected["vout"])
        assert [(out.value, out.script) for out in found.outputs] == [
            (out["value"], out["scriptpubkey"]) for out in expected["vout"]
        ]
        assert [out.address for out in found.outputs] == [
            out["scriptpubkey_address"] or None for out in expected["vout"]
        ]
        assert [(spent.txid, spent.vout, spent.sequence) for spent in found.inputs] == [
            (spent["txid"], spent["vout"], spent["sequence"]) for spent in expected["vin"]
        ]
        assert all(spent.prevout is None for spent in found.inputs)
        assert found.vsize == expected["vsize"]
        assert found.first_seen == expected.get("firstSeen")
        assert found.is_confirmed == expected["status"]["confirmed"]
        assert found.fee_sat == (expected["fee"] or None)


def test_text_is_read_like_bytes() -> None:
    raw = burst_frame()
    for given_frame in (raw, raw.decode()):
        change = decode(given_frame).delta
        assert change is not None
        assert len(change.added) == 1108
        assert len(change.at_least(0)) == 1108


# --- parts ---


def test_a_transaction_in_both_lists_comes_once_and_a_replacer_alone_comes_too() -> None:
    both, alone, small = tx(1, 5 * BTC), tx(2, 6 * BTC), tx(3, 1)
    replaced = [{"replaced": txid(number), "by": by} for number, by in ((8, both), (9, alone), (9, small))]
    change = decode(frame(**{DELTA: delta(added=[both, small], replaced=replaced)})).delta
    assert change is not None
    assert [found.txid for found in change.at_least(5 * BTC)] == [txid(1), txid(2)]
    fee = both["fee"]
    assert [found.txid for found in change.at_least(5 * BTC + fee)] == [txid(1), txid(2)]
    assert [found.txid for found in change.at_least(5 * BTC + fee + 1)] == [txid(2)]


def test_a_child_before_its_parent_and_a_summary_are_not_taken_for_the_parent() -> None:
    parent, child = tx(1, 5 * BTC), tx(2, BTC)
    child["vin"] = [{"txid": txid(1), "vout": 0, "prevout": None, "sequence": 5, "is_coinbase": False}]
    summary = [{"txid": txid(1), "fee": 1, "vsize": 1, "value": 1, "rate": 1, "time": 1}]
    raw = json.dumps({"transactions": summary, DELTA: delta(added=[child, parent])}, separators=(",", ":"))
    change = decode(raw).delta
    assert change is not None
    for minimum, txids in ((BTC, [txid(2), txid(1)]), (5 * BTC, [txid(1)])):
        found = change.at_least(minimum)
        assert [entry.txid for entry in found] == txids
        assert found[-1].value_sat == 5 * BTC


def test_the_parts_of_a_delta_may_come_in_any_order() -> None:
    change = delta(added=[tx(1, 5 * BTC)], replaced=[{"replaced": txid(3), "by": tx(2, 6 * BTC)}])
    turned = dict(reversed(change.items()))
    found = decode(json.dumps({DELTA: turned}, separators=(",", ":"))).delta
    assert found is not None
    assert {entry.txid: entry.value_sat for entry in found.at_least(BTC)} == {txid(1): 5 * BTC, txid(2): 6 * BTC}


def test_transactions_that_do_not_begin_with_their_txid_are_found_all_the_same() -> None:
    turned = dict(reversed(tx(1, 5 * BTC).items()))
    change = decode(frame(**{DELTA: delta(added=[turned], replaced=[{"replaced": txid(2), "by": turned}])})).delta
    assert change is not None
    (found,) = change.at_least(BTC)
    assert (found.txid, found.value_sat, len(found.inputs)) == (txid(1), 5 * BTC, 1)


def test_esplora_mode_gives_the_spent_outputs_and_no_key_for_no_address() -> None:
    whale = tx(1, 5 * BTC)
    whale["vin"] = [
        {
            "txid": txid(7),
            "vout": 1,
            "prevout": {
                "value": 6 * BTC,
                "scriptpubkey": "0014cc",
                "scriptpubkey_asm": "OP_0 OP_PUSHBYTES_20 cc",
                "scriptpubkey_type": "v0_p2wpkh",
                "scriptpubkey_address": "bc1qcc",
            },
            "scriptsig": "",
            "is_coinbase": False,
            "sequence": 4294967293,
        }
    ]
    whale["vout"] = [{"value": 5 * BTC, "scriptpubkey": "6a00", "scriptpubkey_type": "op_return"}]
    change = decode(frame(**{DELTA: delta(added=[whale | {"inputs": []}])})).delta
    assert change is not None
    (found,) = change.at_least(0)
    assert found.inputs[0].prevout is not None
    assert (found.inputs[0].prevout.value, found.inputs[0].prevout.address) == (6 * BTC, "bc1qcc")
    assert found.outputs[0].address is None


def test_a_coinbase_input_has_no_spent_output() -> None:
    coinbase = {"is_coinbase": True, "prevout": None, "txid": "0" * 64, "vout": 0xFFFFFFFF, "sequence": 0xFFFFFFFF}
    change = decode(frame(**{DELTA: delta(added=[tx(1, BTC, vin=[coinbase])])})).delta
    assert change is not None
    assert change.at_least(0)[0].inputs[0].prevout is None


@pytest.mark.parametrize(
    ("fields", "fee"),
    [
        ({"fee": 0, "status": {"confirmed": True}}, None),
        ({"fee": 3400, "status": {"confirmed": True}}, 3400),
        ({"fee": 0, "status": {"confirmed": False}}, 0),
        ({"fee": -1}, None),
        ({"fee": None}, None),
    ],
)
def test_a_fee_the_backend_does_not_know_is_unknown(fields: dict[str, object], fee: int | None) -> None:
    change = decode(frame(**{DELTA: delta(added=[tx(1, BTC, **fields)])})).delta
    assert change is not None
    (found,) = change.at_least(0)
    assert found.fee_sat == fee
    assert (found.fee_rate is None) == (fee is None and fields["fee"] is not None)


def test_of_several_replaced_the_one_that_left_now_is_the_predecessor() -> None:
    by = tx(3, BTC)
    pairs = [{"replaced": txid(1), "by": by}, {"replaced": txid(2), "by": by}]
    for removed, predecessor in (([txid(2)], txid(2)), ([], txid(1))):
        read = decode(frame(**{DELTA: delta(replaced=pairs, removed=removed)}))
        change = change_of(read, received_at=0.0, received_monotonic=0.0)
        assert change.predecessor(txid(3)) == predecessor
        assert change.predecessor(txid(4)) is None


def test_prices_distinguish_absent_from_unknown() -> None:
    assert (decode(frame(pong=True)).price_known, decode(frame(pong=True)).btc_usd) == (False, None)
    for conversions, price in (({"time": 0, "USD": -1}, None), ({"time": 5, "USD": 64000}, 64000.0), ({}, None)):
        read = decode(frame(conversions=conversions))
        assert (read.price_known, read.btc_usd) == (True, price)


@pytest.mark.parametrize(
    ("conversions", "price", "at"),
    [
        ({"time": 1_800_000_000, "USD": 64_000, "EUR": -1}, 64_000.0, 1_800_000_000.0),
        ({"time": 1_800_000_000.5, "USD": 64_000.5}, 64_000.5, 1_800_000_000.5),
        ({"USD": 64_000}, 64_000.0, None),
        ({"time": 0, "USD": 64_000}, None, None),
        ({"time": 1_800_000_000, "USD": -1}, None, None),
        ({"time": 1_800_000_000, "USD": 64_000, "EUR": None, "GBP": "x"}, 64_000.0, 1_800_000_000.0),
    ],
)
def test_a_price_has_its_time_and_other_currencies_cost_nothing(
    conversions: dict[str, object], price: float | None, at: float | None
) -> None:
    read = decode(frame(conversions=conversions))
    assert (read.price_known, read.btc_usd, read.price_at, read.skipped) == (True, price, at, ())


@pytest.mark.parametrize("time", [-1, "2026", None, True, 1e300, 1_800_000_000_000, []])
def test_a_price_whose_time_cannot_be_read_costs_that_part_only(time: object) -> None:
    read = decode(frame(conversions={"time": time, "USD": 64_000}, da={}))
    assert (read.price_known, read.btc_usd, read.skipped, read.has_difficulty) == (False, None, ("conversions",), True)


def test_a_block_whose_rates_are_all_zero_has_no_lowest_one() -> None:
    projected = [{"blockVSize": 998500, "nTx": 1, "feeRange": [0] * 7}, {"blockVSize": 1000, "feeRange": [0, 2]}]
    read = decode(frame(**{"mempool-blocks": projected}))
    assert read.projected == (ProjectedBlock(998_500, None, 0), ProjectedBlock(1000, 0, 2))


def test_loading_is_read_from_the_key_mempool_only() -> None:
    assert decode(frame(loadingIndicators={"mempool": 99})).loading is True
    assert decode(frame(loadingIndicators={"blocktxs-00ab": 50})).loading is False
    assert decode(frame(pong=True)).loading is None


def test_the_first_init_object_is_ready_and_the_one_during_start_up_is_not() -> None:
    inits = [read for raw in recorded_frames() if (read := decode(raw)).is_init]
    assert [read.is_ready for read in inits] == [True, False]
    assert [read.backend and (read.backend.version, read.backend.backend) for read in inits] == [
        ("3.4-dev", "none")
    ] * 2
    assert [len(read.blocks or ()) for read in inits] == [8, 0]


def test_fees_and_projected_blocks_keep_their_fractions() -> None:
    fees = {"fastestFee": 1.5, "halfHourFee": 1.25, "hourFee": 1, "economyFee": 1, "minimumFee": 1}
    projected = [{"blockVSize": 1402.5, "nTx": 10, "feeRange": [1.5, 2, 8.25], "medianFee": 0}]
    read = decode(frame(**{"fees": fees, "mempool-blocks": projected}))
    assert read.fees == FeeMarket(1.5, 1.25, 1, 1, 1)
    assert read.projected is not None
    (first,) = read.projected
    assert (first.vsize, first.min_rate, first.max_rate) == (1402.5, 1.5, 8.25)


def test_a_projected_block_answers_as_a_snapshot_with_its_sequence() -> None:
    rows = [[txid(1), 1470, 141, 5 * BTC, 10.4, 1, 1795375780], [txid(2), 1, 99.5, BTC, 1, 1, 1, 1]]
    read = decode(frame(**{"projected-block-transactions": {"index": 3, "sequence": 7, "blockTransactions": rows}}))
    assert read.snapshot is not None
    assert (read.snapshot.index, read.snapshot.sequence) == (3, 7)
    assert [found.txid for found in read.snapshot.at_least(5 * BTC)] == [txid(1)]
    later = {"index": 3, "sequence": 8, "delta": {"added": [], "removed": [], "changed": []}}
    assert decode(frame(**{"projected-block-transactions": later})).snapshot is None


def test_requests_are_json_that_the_backend_understands() -> None:
    assert [json.loads(text) for text in (*subscribe_frames(), PING, track_block_frame(-1))] == [
        {"action": "init"},
        {"action": "want", "data": ["blocks", "stats", "mempool-blocks"]},
        {"track-mempool": True},
        {"action": "ping"},
        {"track-mempool-block": -1},
    ]


# --- what could go wrong ---


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", DialectFault.MALFORMED),
        (b'{"block":', DialectFault.MALFORMED),
        (b"\xff\xfe", DialectFault.MALFORMED),
        (b'{"pong":tru}', DialectFault.MALFORMED),
        (b'{"block":' + b"[" * 100_000, DialectFault.MALFORMED),
        (b"[]", DialectFault.NOT_AN_OBJECT),
        (b"null", DialectFault.NOT_AN_OBJECT),
        (b'"offline"', DialectFault.NOT_AN_OBJECT),
        (b'{"block":3}', DialectFault.BAD_SHAPE),
        (b'{"mempool-transactions":[]}', DialectFault.BAD_SHAPE),
    ],
)
def test_a_useless_frame_is_refused_with_its_reason(raw: bytes, reason: DialectFault) -> None:
    with pytest.raises(DialectError) as refused:
        decode(raw)
    assert refused.value.reason is reason
    assert refused.value.sample == raw[:SAMPLE_LIMIT].decode(errors="replace")


def test_a_bad_part_costs_only_itself() -> None:
    read = decode(frame(**{"block": 3, "fees": {"fastestFee": "?"}, DELTA: delta(mined=[txid(1)]), "da": {}}))
    assert set(read.skipped) == {"block", "fees"}
    assert read.delta is not None
    assert read.delta.mined == (txid(1),)
    assert read.has_difficulty


def test_a_bad_transaction_costs_only_itself() -> None:
    good, bad = tx(1, 5 * BTC), tx(2, 5 * BTC)
    broken = [bad | {"vout": [{"value": "5"}]}, bad | {"txid": None}, 7, bad | {"vout": None}, {}]
    change = delta(
        added=[broken[0], good, *broken[1:]],
        removed=[txid(3), None],
        mined=[4, txid(4)],
        replaced=[{"replaced": txid(5)}, {"replaced": txid(5), "by": tx(6, 7 * BTC)}, "?"],
    )
    read = decode(frame(**{DELTA: change}))
    assert read.skipped == (DELTA,)
    assert read.delta is not None
    assert read.delta.malformed == 5 + 1 + 1 + 2
    assert (read.delta.sequence, read.delta.removed, read.delta.mined) == (1, (txid(3),), (txid(4),))
    assert [found.txid for found in read.delta.at_least(BTC)] == [txid(1), txid(6)]


def test_a_delta_without_a_usable_sequence_claims_no_order() -> None:
    for sequence in ("seven", None, 1.5):
        read = decode(frame(**{DELTA: delta(sequence=sequence, mined=[txid(1)])}))
        assert read.delta is not None
        assert (read.delta.sequence, read.delta.mined) == (0, (txid(1),))


@pytest.mark.parametrize("key", ["vin", "vsize", "fee", "status", "effectiveFeePerVsize", "firstSeen"])
@pytest.mark.parametrize("value", [None, "?", [], {}, -1])
def test_a_whale_is_not_lost_over_what_surrounds_its_value(key: str, value: object) -> None:
    change = decode(frame(**{DELTA: delta(added=[tx(1, 5 * BTC, **{key: value})])})).delta
    assert change is not None
    (found,) = change.at_least(BTC)
    assert (found.txid, found.value_sat) == (txid(1), 5 * BTC)
    assert found.vsize > 0


def test_an_output_with_a_bad_script_keeps_its_value() -> None:
    whale = tx(1, 5 * BTC)
    whale["vout"][0]["scriptpubkey"] = None
    change = decode(frame(**{DELTA: delta(added=[whale])})).delta
    assert change is not None
    (found,) = change.at_least(BTC)
    assert (found.value_sat, found.outputs[0].script) == (5 * BTC, "")


@pytest.mark.parametrize("written", ["500000000.0", "5e8", "499999999.99999994", "500000000.0000001"])
def test_a_value_that_comes_out_of_a_computation_is_rounded(written: str) -> None:
    raw = frame(**{DELTA: delta(added=[tx(1, 5 * BTC), tx(2, 7 * BTC)])}).decode()
    read = decode(re.sub(r'"value": ?500000000\b', f'"value":{written}', raw))
    assert (read.skipped, read.delta is not None) == ((), True)
    assert read.delta is not None
    (first, _) = read.delta.at_least(BTC)
    assert (first.value_sat, first.outputs[0].script) == (5 * BTC, tx(1, 5 * BTC)["vout"][0]["scriptpubkey"])
    assert len(first.inputs) == 1


def test_the_fee_of_a_double_spend_winner_is_rounded_and_what_is_not_known_is_unknown() -> None:
    winner = tx(1, 5 * BTC, fee=13229.999999999998, effectiveFeePerVsize=94.32)
    many = tx(2, 5 * BTC, fee=-1, effectiveFeePerVsize=-0.00098)
    pairs = [{"replaced": txid(8), "by": winner}, {"replaced": txid(9), "by": many}]
    read = decode(frame(**{DELTA: delta(replaced=pairs)}))
    assert read.skipped == ()
    assert read.delta is not None
    (first, second) = read.delta.at_least(BTC)
    assert (first.fee_sat, first.fee_rate) == (13230, 94.32)
    assert (second.fee_sat, second.fee_rate, len(second.inputs)) == (None, None, 1)


def test_one_input_that_cannot_be_read_is_unknown_and_the_others_are_not() -> None:
    whale = tx(1, 5 * BTC)
    whale["vin"] = [
        dict(whale["vin"][0], vout=number, prevout={"value": 1, "scriptpubkey": "51"}) for number in range(3)
    ]
    whale["vin"][1]["prevout"] = {"value": None}
    whale["vin"][2]["sequence"] = "?"
    change = decode(frame(**{DELTA: delta(added=[whale])})).delta
    assert change is not None
    (found,) = change.at_least(BTC)
    assert [spent.prevout is not None for spent in found.inputs] == [True, False, True]
    assert found.inputs[2].sequence == 0xFFFFFFFF


@pytest.mark.parametrize("tag", ["\\ud83d", "\\udC00\\ud83d", "cut \\uD83D and \\ude00 back", "\\\\ud83d\\ud83d"])
def test_half_a_surrogate_pair_in_an_unused_text_costs_nothing(tag: str) -> None:
    block = {"id": txid(7), "height": 1, "timestamp": 5, "extras": {"pool": {"minerNames": ["TAG"]}}}
    raw = frame(**{"block": block, DELTA: delta(added=[tx(1, 5 * BTC)])}).decode().replace("TAG", tag)
    for sent in (raw, raw.encode()):
        read = decode(sent)
        assert read.skipped == ()
        assert read.block is not None
        assert read.delta is not None
        assert [found.txid for found in read.delta.at_least(BTC)] == [txid(1)]


def test_whole_surrogate_pairs_and_other_escapes_stay_as_they_are() -> None:
    for text in (rb'"\ud83d\ude00"', rb'"\\ud83d"', rb'"\n\u00e9\"\\"', b'"plain"'):
        assert repaired(text) == text
    assert repaired(rb'"\ud83d\ud83d\ude00\ude00"') == rb'"\ufffd\ud83d\ude00\ufffd"'


@pytest.mark.parametrize("row", [[None, None], ["fee", -1], [13229.999999999998, "vsize"]])
def test_an_odd_field_of_a_snapshot_costs_that_field(row: list[object]) -> None:
    rows = [
        [txid(1), *row, 5.0 * BTC, None, "flags", -1],
        [txid(2), 1, 1.0, None],
        ["short"],
        7,
        [txid(3), 1, 1, 5 * BTC],
    ]
    read = decode(frame(**{"projected-block-transactions": {"index": 0, "sequence": 1, "blockTransactions": rows}}))
    assert read.snapshot is not None
    assert read.snapshot.malformed == 3
    assert [(each.txid, each.value) for each in read.snapshot.at_least(BTC)] == [(txid(1), 5 * BTC), (txid(3), 5 * BTC)]


def test_a_rate_that_cannot_be_read_costs_itself() -> None:
    blocks = [{"blockVSize": 999_000, "feeRange": [None, 1, 2]}, {"blockVSize": 7, "feeRange": []}, {"blockVSize": 8}]
    read = decode(frame(**{"mempool-blocks": blocks}))
    assert read.projected == (
        ProjectedBlock(999_000, 1.0, 2.0),
        ProjectedBlock(7, None, 0.0),
        ProjectedBlock(8, None, 0.0),
    )
    assert read.skipped == ("mempool-blocks",)
    with pytest.raises(DialectError):  # which block is which?
        decode(frame(**{"mempool-blocks": [{"blockVSize": None, "feeRange": [1]}, *blocks]}))


def test_a_recommended_rate_that_cannot_be_read_is_unknown() -> None:
    fees = {"fastestFee": 5, "halfHourFee": None, "hourFee": "?", "economyFee": 1}
    read = decode(frame(fees=fees))
    assert read.fees == FeeMarket(5, None, None, 1, None)
    assert read.skipped == ("fees",)
    with pytest.raises(DialectError):
        decode(frame(fees={"fastestFee": "?"}))


def test_a_block_that_cannot_be_read_costs_itself() -> None:
    good = {"id": txid(7), "height": 1, "timestamp": 5}
    read = decode(frame(blocks=[good | {"height": None}, good, 7]))
    assert [block.height for block in read.blocks or ()] == [1]
    assert read.skipped == ("blocks",)


def test_a_value_beyond_all_coins_is_malformed() -> None:
    read = decode(frame(**{DELTA: delta(added=[tx(1, 21_000_001 * BTC), tx(2, 10**30), tx(3, -1)])}))
    assert read.delta is not None
    assert (read.delta.malformed, len(read.delta.added)) == (3, 0)


def test_unknown_keys_are_named_and_cost_nothing() -> None:
    read = decode(frame(**{"new-thing": {"a": [1]}, DELTA: delta(mined=[txid(1)])}))
    assert (read.unknown, read.skipped) == (("new-thing",), ())
    assert read.delta is not None
    assert read.delta.mined == (txid(1),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART_NAMES = [DELTA, "block", "blocks", "fees", "mempool-blocks", "conversions", "da", "backendInfo", "pong", "new"]


@pytest.mark.slow
@relaxed
@given(
    parts=st.dictionaries(st.sampled_from(PART_NAMES), json_values, max_size=5),
    change=st.fixed_dictionaries({}, optional=dict.fromkeys(delta(), json_values)),
)
def test_any_json_is_either_read_or_refused(parts: dict[str, Any], change: dict[str, Any]) -> None:
    for content in (parts, parts | {DELTA: change}):
        try:
            read = decode(frame(**content))
        except DialectError:
            continue
        assert not set(read.unknown) - {"new"}
        if read.delta is not None:
            read.delta.at_least(0)


@relaxed
@given(position=st.integers(0, 3000), byte=st.binary(min_size=1, max_size=2))
def test_a_damaged_recorded_frame_is_either_read_or_refused(position: int, byte: bytes) -> None:
    raw = min((raw for raw in recorded_frames() if b'"added":[{' in raw), key=len)
    damaged = raw[:position] + byte + raw[position + len(byte) :]
    try:
        change = decode(damaged).delta
    except DialectError:
        return
    if change is not None:
        assert len(change.at_least(0)) <= 2


# --- continuity ---


@pytest.mark.parametrize(
    ("sequences", "last"),
    [
        ([5], Continuity.FIRST),
        ([0], Continuity.NOT_IN_SYNC),
        ([5, 6], Continuity.IN_ORDER),
        ([0, 0], Continuity.NOT_IN_SYNC),
        ([5, 5], Continuity.NOT_IN_SYNC),
        ([5, 5, 6], Continuity.IN_ORDER),
        ([0, 1], Continuity.IN_ORDER),
        ([5, 7], Continuity.GAP),
        ([5, 0], Continuity.RESTARTED),
        ([5, 4], Continuity.RESTARTED),
        ([5, 0, 0], Continuity.NOT_IN_SYNC),
    ],
)
def test_sequence_numbers_show_the_continuity(sequences: list[int], last: Continuity) -> None:
    tracker = SequenceTracker()
    assert [tracker.observe(sequence) for sequence in sequences][-1] is last


@relaxed
@given(start=st.integers(1, 10**6), steps=st.lists(st.sampled_from([0, 1]), max_size=30))
def test_a_stream_without_holes_never_reports_one(start: int, steps: list[int]) -> None:
    tracker = SequenceTracker()
    seen = {tracker.observe(start)}
    for step in steps:
        start += step
        seen.add(tracker.observe(start))
    assert seen <= {Continuity.FIRST, Continuity.IN_ORDER, Continuity.NOT_IN_SYNC}


def test_the_recording_has_one_restart_and_no_gap() -> None:
    tracker = SequenceTracker()
    told = [tracker.observe(change.sequence) for raw in recorded_frames() if (change := decode(raw).delta) is not None]
    assert told.count(Continuity.RESTARTED) == 1
    assert told.count(Continuity.GAP) == 0
    assert told.count(Continuity.NOT_IN_SYNC) == 8
