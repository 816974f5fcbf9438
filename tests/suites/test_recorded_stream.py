"""The acceptance test: a real backend's recorded stream against the truth of what was sent to it.

The truth was written by the program that sent the transactions. What should be found is computed here from that file
and from the frames read as plain JSON, with none of the code under test.
"""

import json
from functools import cache
from typing import Any

import pytest
from msgspec.structs import replace

from kit.recordings import recorded_frames, true_transactions, truth
from kit.whales import BTC, NOW
from whaled.config.sections import Basis
from whaled.model import Block, Draft, Input, Kind, Market, Output, Source, Status, Transaction, Whale
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.dialect import decode
from whaled.whales import lifecycle
from whaled.whales.amounts import moved_sat
from whaled.whales.detect import Detector, Rules

THRESHOLD = 100 * BTC


class Replay:
    """Everything detection says while the whole recording goes by."""

    def __init__(self) -> None:
        self.whales: list[Whale] = []
        self.updates: list[Draft] = []
        self.transactions: dict[str, Transaction] = {}
        self.assessed = 0


@cache
def replay() -> Replay:
    """Both connections, one after the other, as one daemon would see them."""
    detector = Detector(Rules(THRESHOLD))
    result = Replay()
    alerted: dict[str, Whale] = {}
    market = Market()
    for number, raw in enumerate(recorded_frames()):
        frame = decode(raw)
        market = replace(
            market,
            fees=frame.fees or market.fees,
            projected=market.projected if frame.projected is None else frame.projected,
            tip_height=frame.block.height if frame.block else market.tip_height,
        )
        delta, change = frame.delta, change_of(frame, received_at=NOW, received_monotonic=0.0)
        if delta is None:
            continue
        for found in delta.at_least(0):
            result.transactions.setdefault(found.txid, found)
        result.assessed += len(delta.added)
        for found in detector.candidates(delta.at_least(detector.minimum_sat)):
            whale = detector.assess(
                found, market=market, now=NOW + number, source=Source.LIVE, replaces=change.predecessor(found.txid)
            )
            if whale is not None:
                result.whales.append(whale)
                alerted[found.txid] = whale
        result.updates += [
            lifecycle.replaced(alerted[pair.replaced], pair.by, NOW + number)
            for pair in delta.replaced
            if pair.replaced in alerted
        ]
        if frame.block is not None:
            mined = [txid for txid in delta.mined if txid in alerted]
            result.updates += [lifecycle.confirmed(alerted[txid], frame.block, NOW + number) for txid in mined]
    return result


@cache
def mentioned() -> dict[str, dict[str, Any]]:
    """Every transaction the stream gives in full, as first given, by plain JSON."""
    found: dict[str, dict[str, Any]] = {}
    for raw in recorded_frames():
        delta = json.loads(raw).get("mempool-transactions", {})
        for entry in (*delta.get("added", ()), *(pair["by"] for pair in delta.get("replaced", ()))):
            found.setdefault(entry["txid"], entry)
    return found


def expected() -> dict[str, dict[str, Any]]:
    """The whales of the truth that the stream mentions."""
    return {txid: entry for txid, entry in true_transactions().items() if entry["whale"] and txid in mentioned()}


def alerts() -> dict[str, Whale]:
    """What was found, by txid."""
    return {whale.alert.transaction_id: whale for whale in replay().whales}


def sent_as(kind: str) -> str:
    """The txid of the one transaction that was sent as this."""
    (txid,) = (txid for txid, entry in true_transactions().items() if entry["kind"] == kind)
    return txid


def test_every_whale_the_stream_mentions_is_alerted_exactly_once_and_nothing_else_is() -> None:
    found = [whale.alert.transaction_id for whale in replay().whales]
    assert sorted(found) == sorted(expected())
    assert len(found) == 39


def test_the_ground_truth_marks_whales_by_the_threshold() -> None:
    assert all((entry["out_sat"] >= THRESHOLD) == entry["whale"] for entry in true_transactions().values())
    assert replay().assessed > 2000


def test_exactly_100_btc_is_a_whale_and_one_satoshi_less_is_not() -> None:
    assert alerts()[sent_as("whale_exactly_100")].alert.value_sat == THRESHOLD
    below = sent_as("not_whale_one_sat_below")
    assert true_transactions()[below]["out_sat"] == THRESHOLD - 1
    assert below in mentioned()
    assert below not in alerts()


def test_the_winner_of_a_double_spend_that_only_a_block_contains_is_alerted() -> None:
    winner = alerts()[sent_as("whale_block_double_spend")].alert
    assert winner.status is Status.CONFIRMED
    assert winner.replaces == sent_as("whale_double_spent_by_block")


@pytest.mark.parametrize("txid", sorted(expected()))
def test_an_alert_agrees_with_the_truth_to_the_satoshi(txid: str) -> None:
    alert, entry = alerts()[txid].alert, expected()[txid]
    assert alert.value_sat == entry["out_sat"]
    assert alert.btc_value == entry["out_sat"] / BTC
    assert (alert.input_count, alert.output_count) == (entry["n_in"], entry["n_out"])
    assert alert.vsize == entry["vsize"]
    assert alert.moved_sat is None
    if alert.fee_sat is not None:
        assert alert.fee_sat == entry["fee_sat"]
        assert alert.fee_rate is not None
        assert alert.urgency_score is not None
    plain = mentioned()[txid]
    assert alert.rbf_enabled == any(spent["sequence"] < 0xFFFFFFFE for spent in plain["vin"])
    addresses = {output["scriptpubkey_address"] for output in plain["vout"]} - {""}
    assert set(alerts()[txid].addresses) == addresses
    replaces = entry.get("replaces") or [None]
    assert alert.replaces in (*replaces, None)


def test_the_fee_is_unknown_only_where_the_backend_does_not_know_it() -> None:
    unknown = [whale.alert for whale in replay().whales if whale.alert.fee_sat is None]
    assert [alert.status for alert in unknown] == [Status.CONFIRMED] * len(unknown)
    told_without_fee = [
        txid for txid in expected() if mentioned()[txid]["status"]["confirmed"] and not mentioned()[txid]["fee"]
    ]
    assert sorted(alert.transaction_id for alert in unknown) == sorted(told_without_fee)


def test_a_replacer_names_the_one_it_replaced() -> None:
    for kind in ("whale_rbf_replacement", "whale_rbf_second_replacement", "whale_replaces_small"):
        txid = sent_as(kind)
        assert [alerts()[txid].alert.replaces] == true_transactions()[txid]["replaces"]


def test_the_moved_amount_is_exact_if_the_stream_has_the_parents() -> None:
    given = replay().transactions
    checked = 0
    for txid in expected():
        child = given[txid]
        if not all(spent.txid in given for spent in child.inputs):
            continue
        known = replace(child, inputs=tuple(_with_prevout(spent, given) for spent in child.inputs))
        assert moved_sat(known) == expected()[txid]["out_sat"] - expected()[txid]["same_addr_sat"]
        checked += 1
    assert checked >= 3


def _with_prevout(spent: Input, given: dict[str, Transaction]) -> Input:
    output: Output = given[spent.txid].outputs[spent.vout]
    return Input(spent.txid, spent.vout, spent.sequence, output)


def test_by_moved_no_whale_of_a_backend_without_inputs_is_missed() -> None:
    detector = Detector(Rules(THRESHOLD, Basis.MOVED))
    found = detector.candidates(replay().transactions.values())
    whales = [detector.assess(entry, market=Market(), now=NOW, source=Source.LIVE) for entry in found]
    assert {whale.alert.transaction_id for whale in whales if whale} == set(expected())


def test_confirmations_name_blocks_that_truly_held_the_whale() -> None:
    blocks = {entry["hash"]: entry for entry in truth() if entry["event"] == "block"}
    told = [draft for draft in replay().updates if draft.kind is Kind.CONFIRMED]
    for draft in told:
        assert draft.update is not None
        held = blocks[draft.ref]
        assert draft.update.block_height == held["height"]
        txids = held["txids"]
        assert not isinstance(txids, list) or draft.whale.alert.transaction_id in txids
    confirmed = {draft.whale.alert.transaction_id for draft in told}
    finally_confirmed = {
        entry["txid"] for entry in truth() if entry["event"] == "final" and entry["status"] == "confirmed"
    }
    listed = {
        txid for raw in recorded_frames() for txid in json.loads(raw).get("mempool-transactions", {}).get("mined", ())
    }
    assert set(expected()) & finally_confirmed & listed <= confirmed


def test_predictions_are_scored_against_the_block_that_came() -> None:
    scored = [draft.update for draft in replay().updates if draft.update and draft.update.blocks_off is not None]
    assert scored
    for update in scored:
        assert update.block_height is not None
        assert update.predicted_confirmation_block is not None
        assert update.blocks_off == update.block_height - update.predicted_confirmation_block


def test_replacements_are_those_of_the_truth() -> None:
    chains: dict[str, set[str]] = {}
    for entry in truth():
        if entry["event"] == "replaced":
            chains.setdefault(entry["txid"], set()).add(entry["replaced_by"])
    told = {(draft.whale.alert.transaction_id, draft.ref) for draft in replay().updates if draft.kind is Kind.REPLACED}
    for replaced, by in told:
        direct = chains[replaced]
        assert by in direct | {later for step in direct for later in chains.get(step, ())}
    plain = {
        (pair["replaced"], pair["by"]["txid"])
        for raw in recorded_frames()
        for pair in json.loads(raw).get("mempool-transactions", {}).get("replaced", ())
    }
    assert told == {(replaced, by) for replaced, by in plain if replaced in expected()}


def test_block_parts_give_the_chain_of_the_truth() -> None:
    blocks = {entry["hash"]: entry["height"] for entry in truth() if entry["event"] == "block"}
    told: list[Block] = [frame.block for raw in recorded_frames() if (frame := decode(raw)).block]
    known = [block for block in told if block.hash in blocks]
    assert len(known) >= 14
    assert all(block.height == blocks[block.hash] for block in known)
