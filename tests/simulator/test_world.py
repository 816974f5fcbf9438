"""The simulated world is exact, reproducible and bounded."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.whales import NOW
from whaled.errors import ConfigError
from whaled.simulator.life import Life
from whaled.simulator.scripts import ScriptType
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.transactions import ImpossibleError, Tx, TxKind
from whaled.simulator.truth import Fate, Record
from whaled.simulator.world import World

WHALE = 10_000_000_000


def lived(seconds: float, *, step: float = 1.0, **changes: object) -> World:
    world = World(msgspec.structs.replace(SimulatorSettings(rate=10, block_interval=30), **changes), NOW)
    life = Life(world)
    moment = 0.0
    while moment < seconds:
        moment = min(seconds, moment + step)
        life.advance(NOW + moment)
    return world


def quiet(**changes: object) -> World:
    return World(msgspec.structs.replace(SimulatorSettings(rate=0, block_interval=0), **changes), NOW)


def all_txs(world: World) -> list[Tx]:
    return [entry.tx for entry in world.chain.mempool.values()] + [
        tx for block in world.chain.blocks for tx in block.txs
    ]


@pytest.mark.slow
def test_the_same_seed_makes_the_same_world_at_any_step_size() -> None:
    once, often = lived(120, step=120), lived(120, step=0.7)
    assert msgspec.json.encode(once.truth.records()) == msgspec.json.encode(often.truth.records())
    assert once.chain.tip.hash == often.chain.tip.hash


def test_another_seed_makes_another_world() -> None:
    assert lived(30).truth.records()[-1].txid != lived(30, seed=2).truth.records()[-1].txid


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=6, deadline=None)
def test_inputs_are_outputs_plus_fee_and_nothing_is_spent_twice(seed: int, share: float) -> None:
    world = lived(60, seed=seed, whale_share=share, events=3)
    spent: set[tuple[str, int]] = set()
    outputs = {(tx.txid, at): payment for tx in all_txs(world) for at, payment in enumerate(tx.outputs)}
    for tx in all_txs(world):
        if tx.is_coinbase:
            continue
        assert tx.in_sat == tx.out_sat + tx.fee
        assert tx.fee > 0
        assert all(payment.value >= 0 for payment in tx.outputs)
        for coin in tx.inputs:
            assert coin.outpoint not in spent
            spent.add(coin.outpoint)
            if coin.outpoint in outputs:
                assert (coin.value, coin.script) == (outputs[coin.outpoint].value, outputs[coin.outpoint].script)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_the_truth_agrees_with_mempool_and_chain(seed: int) -> None:
    world = lived(90, seed=seed, events=5, keep_blocks=10_000)
    mined = {tx.txid: block for block in world.chain.blocks for tx in block.txs}
    for record in world.truth.records():
        match record.fate:
            case Fate.PENDING:
                assert record.txid in world.chain.mempool
            case Fate.CONFIRMED:
                assert (record.height, record.block_hash) == (mined[record.txid].height, mined[record.txid].hash)
            case _:
                assert record.txid not in world.chain.mempool
                assert record.txid not in mined
        assert (record.replaced_by is not None) == (record.fate is Fate.REPLACED)
    assert mined.keys() <= {record.txid for record in world.truth.records()}


@pytest.mark.slow
def test_every_kind_script_type_and_outcome_occurs() -> None:
    world = lived(500, events=5)
    records = world.truth.records()
    missing = set(TxKind) - {record.kind for record in records}
    assert not missing
    assert {payment.script.type for tx in all_txs(world) for payment in tx.outputs} == set(ScriptType)
    assert {turn.fate for record in records for turn in record.turns} == set(Fate) - {Fate.UNRELAYED}


def arrived(world: World) -> list[Record]:
    late = {TxKind.REPLACEMENT, TxKind.CANCELLATION, TxKind.CHILD, TxKind.UNRELAYED, TxKind.DOUBLE_SPEND}
    return [record for record in world.truth.records() if record.kind not in late | {TxKind.COINBASE}]


@pytest.mark.slow
def test_the_whale_share_is_kept() -> None:
    world = lived(200, whale_share=0.25, block_interval=0)
    whales = Counter(record.whale for record in arrived(world))
    assert 0.2 < whales[True] / whales.total() < 0.3


@pytest.mark.slow
def test_there_is_no_whale_if_none_is_configured() -> None:
    world = lived(200, whale_share=0.0, events=0)
    assert not [record for record in world.truth.whales() if record.kind is not TxKind.UNRELAYED]


def test_a_payment_has_exactly_the_requested_amount() -> None:
    world = quiet()
    for sat in (WHALE, WHALE - 1, 123_456_789):
        assert world.truth[world.pay(sat).txid].out_sat == sat
    assert [record.out_sat for record in world.truth.whales()] == [WHALE]


def test_change_to_the_own_script_has_not_moved() -> None:
    world = quiet()
    record = world.truth[world.transact(TxKind.CHANGE_TO_SELF, WHALE).txid]
    assert 0 < record.moved_sat < record.out_sat
    record = world.truth[world.transact(TxKind.SELF_TRANSFER, WHALE).txid]
    assert record.moved_sat == 0


def test_a_replacement_takes_the_place_of_the_first_and_evicts_its_child() -> None:
    world = quiet()
    first = world.pay(WHALE)
    child = world.spend(first.txid)
    second = world.replace(first.txid)
    assert list(world.chain.mempool) == [second.txid]
    assert (second.rate, second.fee) > (first.rate, first.fee)
    assert world.truth[first.txid].replaced_by == second.txid
    assert (world.truth[child.txid].fate, world.truth[child.txid].replaced_by) == (Fate.EVICTED, None)


def test_a_cancellation_returns_the_money_to_the_owner() -> None:
    world = quiet()
    first = world.transact(TxKind.BATCH, WHALE, rate=20)
    second = world.cancel(first.txid)
    assert world.truth[first.txid].replaced_by == second.txid
    assert len(second.outputs) == 1


def test_a_child_lifts_its_parent_and_both_are_mined_together() -> None:
    world = quiet(block_weight=20_000)
    parent = world.pay(WHALE, rate=1.0)
    crowd = [world.pay(1_000_000, rate=20.0) for _ in range(60)]
    child = world.spend(parent.txid, rate=100.0)
    assert world.chain.mempool[parent.txid].score > 40
    block = world.mine()
    assert block.txids.index(parent.txid) < block.txids.index(child.txid)
    assert len(block.txs) < len(crowd)


def test_an_evicted_child_no_longer_lifts_its_parent() -> None:
    world = quiet()
    parent = world.pay(WHALE, rate=2.0)
    child = world.spend(parent.txid, rate=100.0)
    world.chain.evict(child.txid)
    assert world.chain.mempool[parent.txid].score == parent.rate


def test_blocks_take_the_best_rates_first_and_stay_within_their_weight() -> None:
    world = quiet(block_weight=20_000)
    cheap, dear = world.pay(WHALE, rate=1.0), world.pay(WHALE, rate=50.0)
    for _ in range(60):
        world.pay(1_000_000, rate=10.0)
    block = world.mine()
    assert block.txids[1] == dear.txid
    assert cheap.txid not in block.txids
    assert sum(tx.weight for tx in block.txs) <= 20_000


def test_a_transaction_sent_only_to_a_miner_is_mined_without_being_pending() -> None:
    world = quiet()
    secret = world.pay(WHALE, relay=False)
    assert secret.txid not in world.chain.mempool
    world.mine([secret])
    record = world.truth[secret.txid]
    assert (record.fate, record.via_block) == (Fate.CONFIRMED, True)


def test_a_block_with_a_double_spend_throws_the_loser_out() -> None:
    world = quiet()
    loser = world.pay(WHALE)
    child = world.spend(loser.txid)
    winner = world.rival(loser.txid)
    world.mine([winner])
    assert world.truth[loser.txid].replaced_by == winner.txid
    assert world.truth[child.txid].fate is Fate.EVICTED
    assert not world.chain.mempool


def test_a_reorganisation_returns_remines_and_double_spends_transactions() -> None:
    world = quiet()
    again, back, lost = world.pay(WHALE), world.pay(WHALE + 1), world.pay(WHALE + 2)
    dead = [world.mine(), world.mine()]
    built = world.reorg(2, double_spend=[lost.txid], keep=[again.txid])
    assert [block.height for block in built] == [dead[0].height, dead[1].height, dead[1].height + 1]
    assert built[0].previous == dead[0].previous
    assert world.truth[again.txid].block_hash == built[0].hash
    assert world.truth[back.txid].fate is Fate.PENDING
    assert world.truth[lost.txid].fate is Fate.REPLACED
    fates = [turn.fate for turn in world.truth[again.txid].turns]
    assert fates == [Fate.PENDING, Fate.CONFIRMED, Fate.PENDING, Fate.CONFIRMED]
    assert world.chain.block_by_hash(dead[0].hash) is dead[0]


def test_an_impossible_action_is_refused_with_a_reason() -> None:
    world = quiet()
    mined = world.pay(WHALE)
    world.mine()
    with pytest.raises(ImpossibleError, match="is not in the mempool"):
        world.replace(mined.txid)
    with pytest.raises(ImpossibleError, match="use 1 to"):
        world.reorg(1_000)
    with pytest.raises(ImpossibleError, match="use one of payment"):
        world.transact(TxKind.COINBASE, WHALE)
    with pytest.raises(ImpossibleError, match="its coins are spent"):
        world.send(mined)


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    world = lived(500, keep_blocks=17, truth_limit=300, mempool_limit=200, block_interval=20, block_weight=60_000)
    assert len(world.chain.blocks) == 17
    assert len(world.chain.mempool) <= 200
    assert len(world.truth) <= 600
    kept = {tx.txid for block in world.chain.blocks for tx in block.txs}
    assert world.chain.confirmed.keys() == kept


@pytest.mark.slow
def test_a_mempool_with_a_floor_keeps_its_size() -> None:
    world = lived(300, mempool_floor=200, block_interval=10, block_weight=4_000_000, events=0)
    assert len(world.chain.blocks) > 10
    for _ in range(3):
        best = max(entry.score for entry in world.chain.mempool.values())
        world.mine()
        assert len(world.chain.mempool) == 200
        assert max(entry.score for entry in world.chain.mempool.values()) < best or not world.chain.blocks[-1].txs[1:]


def test_settings_out_of_range_are_named_with_the_allowed_range() -> None:
    with pytest.raises(ConfigError) as caught:
        SimulatorSettings(rate=-1, whale_share=2)
    assert [fault.where for fault in caught.value.faults] == ["rate", "whale_share"]
    assert "use 0 to 1" in str(caught.value)


def test_a_package_replaces_a_transaction_that_its_parent_alone_could_not() -> None:
    world = quiet()
    old = world.pay(WHALE, rate=10.0)
    grandchild = world.spend(old.txid)
    parent, child = world.replace_by_package(old.txid)
    assert parent.fee <= old.fee
    assert {coin.outpoint for coin in parent.inputs} == {coin.outpoint for coin in old.inputs}
    assert set(world.chain.mempool) == {parent.txid, child.txid}
    assert (world.truth[old.txid].fate, world.truth[old.txid].replaced_by) == (Fate.REPLACED, parent.txid)
    assert world.truth[grandchild.txid].fate is Fate.EVICTED
    assert world.mine().txids[1:] == [parent.txid, child.txid]


def test_a_replaced_transaction_can_return_once_its_coin_is_unspent_again() -> None:
    world = quiet()
    old = world.pay(WHALE)
    wide = world.displace(old.txid)
    with pytest.raises(ImpossibleError):
        world.send(old)
    narrow = world.release(wide.txid)
    world.send(old)
    assert set(world.chain.mempool) == {narrow.txid, old.txid}
    assert [turn.fate for turn in world.truth[old.txid].turns] == [Fate.PENDING, Fate.REPLACED, Fate.PENDING]


@pytest.mark.parametrize("inputs", [12, 13, 14, 100, 1100])
def test_many_inputs_pay_exactly_the_requested_amount(inputs: int) -> None:
    tx = quiet().gather(WHALE, inputs, relay=False)
    assert (len(tx.inputs), tx.out_sat, tx.in_sat) == (inputs, WHALE, WHALE + tx.fee)


def test_a_whole_double_spend_pays_other_scripts() -> None:
    world = quiet()
    old = world.transact(TxKind.BATCH, WHALE)
    rival = world.rival(old.txid, whole=True)
    assert {coin.outpoint for coin in rival.inputs} == {coin.outpoint for coin in old.inputs}
    assert not {payment.script.hex for payment in rival.outputs} & {payment.script.hex for payment in old.outputs}
    world.mine([rival])
    assert world.truth[old.txid].replaced_by == rival.txid
