"""The simulated backend keeps back exactly what the real one keeps back."""

from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from kit.whales import NOW
from whaled.simulator.backend import Backend, Corrected, Delta, Indicators, Prices, Update
from whaled.simulator.dialogue import Dialogue
from whaled.simulator.messages import Messages
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.world import World

WHALE = 10_000_000_000
QUIET = SimulatorSettings(rate=0, block_interval=0)


class Bench:
    """A world, its backend, and a clock that polls move."""

    def __init__(self, settings: SimulatorSettings = QUIET, *, synced: bool = True) -> None:
        self.world = World(settings, NOW)
        self.backend = Backend(self.world.chain, settings, NOW, usd=settings.usd)
        if synced:
            self.poll()

    def poll(self, meanwhile: Callable[[], None] = lambda: None) -> list[Update]:
        self.world.now += 2
        return list(self.backend.poll(self.world.now, usd=self.world.usd, meanwhile=meanwhile))

    def deltas(self, meanwhile: Callable[[], None] = lambda: None) -> list[Delta]:
        return [update for update in self.poll(meanwhile) if isinstance(update, Delta)]


def txids(delta: Delta) -> list[str]:
    return [seen.tx.txid for seen in delta.added]


def pairs(delta: Delta) -> list[tuple[str, str]]:
    return [(loser, winner.tx.txid) for loser, winner in delta.replaced]


def test_a_poll_without_changes_has_no_updates() -> None:
    assert Bench().poll() == []


def test_a_new_transaction_is_added_once() -> None:
    bench = Bench()
    tx = bench.world.pay(WHALE)
    (delta,) = bench.deltas()
    assert (txids(delta), delta.sequence) == ([tx.txid], 1)
    assert bench.deltas() == []


def test_a_loser_replaced_within_a_poll_is_never_mentioned() -> None:
    bench = Bench()
    loser = bench.world.pay(WHALE)
    winner = bench.world.replace(loser.txid)
    (delta,) = bench.deltas()
    assert (txids(delta), delta.removed, delta.replaced) == ([winner.txid], [], [])


def test_a_replacement_removes_and_names_the_loser_and_an_older_one_again() -> None:
    bench = Bench()
    first = bench.world.pay(WHALE)
    bench.poll()
    second = bench.world.replace(first.txid)
    (delta,) = bench.deltas()
    assert (txids(delta), delta.removed, pairs(delta)) == (
        [second.txid],
        [first.txid],
        [(first.txid, second.txid)],
    )
    third = bench.world.replace(second.txid)
    (delta,) = bench.deltas()
    assert delta.removed == [second.txid]
    assert sorted(pairs(delta)) == sorted([(second.txid, third.txid), (first.txid, third.txid)])


def test_a_loser_is_forgotten_after_ten_updates() -> None:
    bench = Bench()
    first = bench.world.pay(WHALE)
    bench.poll()
    second = bench.world.replace(first.txid)
    bench.poll()
    for _ in range(10):
        bench.world.pay(1_000_000)
        bench.poll()
    third = bench.world.replace(second.txid)
    (delta,) = bench.deltas()
    assert pairs(delta) == [(second.txid, third.txid)]


def test_an_evicted_child_is_removed_but_not_replaced() -> None:
    bench = Bench()
    parent = bench.world.pay(WHALE)
    child = bench.world.spend(parent.txid)
    (delta,) = bench.deltas()
    assert next(seen for seen in delta.added if seen.tx is child).ancestors == (parent,)
    winner = bench.world.replace(parent.txid)
    (delta,) = bench.deltas()
    assert sorted(delta.removed) == sorted([parent.txid, child.txid])
    assert pairs(delta) == [(parent.txid, winner.txid)]


def test_a_block_names_all_its_transactions_and_they_are_never_removed() -> None:
    bench = Bench()
    known = bench.world.pay(WHALE)
    bench.poll()
    unseen, secret = bench.world.pay(WHALE), bench.world.pay(WHALE, relay=False)
    block = bench.world.mine([secret])
    (delta,) = bench.deltas()
    assert delta.block is block
    assert delta.mined == block.txids
    assert {known.txid, unseen.txid, secret.txid} < set(delta.mined)
    assert (delta.added, delta.removed, delta.sequence) == ((), (), 2)
    assert bench.deltas() == []


def test_a_double_spend_by_a_block_is_named_with_it_and_removed_after_it() -> None:
    bench = Bench()
    loser = bench.world.pay(WHALE)
    bench.poll()
    winner = bench.world.rival(loser.txid)
    bench.world.mine([winner])
    mined, after = bench.deltas()
    assert pairs(mined) == [(loser.txid, winner.txid)]
    assert (after.removed, after.sequence) == ([loser.txid], mined.sequence + 1)
    assert after.replaced == []


def test_a_block_in_the_midst_of_a_poll_gives_a_confirmed_transaction_without_fee() -> None:
    bench = Bench()
    tx = bench.world.pay(WHALE)

    def mine() -> None:
        bench.world.mine()

    (delta,) = bench.deltas(mine)
    (seen,) = delta.added
    assert (seen.tx, seen.block, seen.fee, seen.first_seen) == (tx, bench.world.chain.tip, 0, None)
    (delta,) = bench.deltas()
    assert tx.txid in delta.mined


def test_a_new_process_sends_the_last_eight_blocks_and_the_whole_mempool_at_sequence_zero() -> None:
    bench = Bench(synced=False)
    pending = [bench.world.pay(WHALE) for _ in range(3)]
    updates = bench.poll()
    blocks = [update for update in updates if isinstance(update, Delta) and update.block]
    assert [delta.block.height for delta in blocks if delta.block] == list(range(900_000 - 7, 900_001))
    assert updates[8] == Indicators({"mempool": 0})
    whole = updates[9]
    assert isinstance(whole, Delta)
    assert sorted(txids(whole)) == sorted(tx.txid for tx in pending)
    assert {update.sequence for update in updates if isinstance(update, Delta)} == {0}
    assert updates[10:] == [Indicators({})]
    bench.world.pay(WHALE)
    assert bench.deltas()[0].sequence == 1


def test_a_process_with_its_cache_has_the_mempool_and_sends_no_delta_of_it() -> None:
    bench = Bench()
    bench.world.pay(WHALE)
    bench.poll()
    old = bench.backend
    bench.backend = Backend(bench.world.chain, QUIET, bench.world.now, usd=None)
    bench.backend.load_cache(old)
    assert bench.deltas() == []
    assert bench.backend.in_sync
    assert bench.backend.mempool.keys() == old.mempool.keys()


def test_without_a_database_a_reorganisation_goes_unnoticed() -> None:
    bench = Bench()
    again, back = bench.world.pay(WHALE), bench.world.pay(WHALE)
    bench.poll()
    dead = [bench.world.mine(), bench.world.mine()]
    bench.poll()
    built = bench.world.reorg(2, keep=[again.txid])
    block, after = bench.deltas()
    assert block.block is built[-1]
    assert block.block.previous != dead[-1].hash
    assert again.txid not in block.mined
    assert txids(after) == [back.txid]
    assert [known.hash for known in bench.backend.blocks][-3:-1] == [each.hash for each in dead]


def test_with_a_database_the_blocks_are_corrected_before_the_new_tip() -> None:
    bench = Bench(replace(QUIET, database=True))
    dead = [bench.world.mine(), bench.world.mine()]
    bench.poll()
    built = bench.world.reorg(2)
    corrected, block = bench.poll()
    assert isinstance(corrected, Corrected)
    assert [known.hash for known in corrected.blocks][-2:] == [each.hash for each in built[:2]]
    assert isinstance(block, Delta)
    assert block.block is built[-1]
    assert list(bench.backend.stale) == [each.hash for each in dead]


def test_more_than_sixteen_blocks_at_once_are_skipped_but_for_eight() -> None:
    bench = Bench()
    tx = bench.world.pay(WHALE)
    bench.poll()
    start = bench.world.chain.tip.height
    blocks = [bench.world.mine() for _ in range(17)]
    *told, after = bench.deltas()
    assert [delta.block.height for delta in told if delta.block] == list(range(start + 10, start + 18))
    assert [delta.sequence for delta in told] == list(range(told[0].sequence, told[0].sequence + 8))
    assert tx.txid in blocks[0].txids
    assert after.removed == [tx.txid]


def test_sixteen_blocks_at_once_come_one_by_one() -> None:
    bench = Bench()
    start = bench.world.chain.tip.height
    for _ in range(16):
        bench.world.mine()
    assert [delta.block.height for delta in bench.deltas() if delta.block] == list(range(start + 1, start + 17))


def test_a_lost_node_shows_from_the_fifth_poll_and_freezes_the_sequence() -> None:
    bench = Bench()
    bench.world.pay(WHALE)
    before = bench.deltas()[0].sequence
    assert [bench.backend.fail() for _ in range(4)] == [[], [], [], []]
    assert bench.backend.fail() == [Indicators({"mempool": 99})]
    assert not bench.backend.in_sync
    tx = bench.world.pay(WHALE)
    updates = bench.poll()
    (delta,) = [update for update in updates if isinstance(update, Delta)]
    assert (txids(delta), delta.sequence) == ([tx.txid], before)
    assert updates[-1] == Indicators({})


def test_a_node_that_lost_its_mempool_makes_everything_removed() -> None:
    bench = Bench()
    txs = [bench.world.pay(WHALE) for _ in range(3)]
    bench.poll()
    for tx in txs:
        bench.world.chain.evict(tx.txid)
    (delta,) = bench.deltas()
    assert sorted(delta.removed) == sorted(tx.txid for tx in txs)
    assert delta.replaced == []


def test_prices_are_sent_once_per_interval_and_only_if_known() -> None:
    bench = Bench(replace(QUIET, price_interval=3))
    assert bench.poll() == [Prices(bench.backend.prices)]
    assert bench.backend.prices["USD"] == 65_000
    assert bench.poll() == []


def test_the_price_is_unknown_as_minus_one() -> None:
    backend = Backend(Bench().world.chain, QUIET, NOW, usd=None)
    assert (backend.prices["USD"], backend.prices["time"], len(backend.prices)) == (-1, 0, 34)
    with_database = Backend(Bench().world.chain, replace(QUIET, database=True), NOW, usd=60_000)
    assert len(with_database.prices) == 8


def test_replacements_form_a_tree_whose_root_is_the_last_replacer() -> None:
    bench = Bench()
    first = bench.world.pay(WHALE)
    bench.poll()
    second = bench.world.replace(first.txid)
    bench.poll()
    third = bench.world.replace(second.txid)
    bench.poll()
    tree = bench.backend.rbf.tree(first.txid)
    assert tree is not None
    assert tree["tx"]["txid"] == third.txid
    assert tree["replaces"][0]["tx"]["txid"] == second.txid
    assert tree["replaces"][0]["replaces"][0]["tx"]["txid"] == first.txid
    assert bench.backend.rbf.replaces(third.txid) == [second.txid]
    assert "mined" not in tree
    bench.world.mine()
    bench.poll()
    tree = bench.backend.rbf.tree(first.txid)
    assert tree is not None
    assert tree["mined"] is True


def test_a_package_that_replaces_is_not_named_as_the_replacer() -> None:
    bench = Bench()
    world = bench.world
    old = world.pay(WHALE, rate=10.0)
    bench.deltas()
    parent, child = world.replace_by_package(old.txid)
    (delta,) = bench.deltas()
    assert set(txids(delta)) == {parent.txid, child.txid}
    assert list(delta.removed) == [old.txid]
    assert delta.replaced == []


def test_a_replacements_winner_can_be_replaced_and_the_loser_return() -> None:
    bench = Bench()
    world = bench.world
    old = world.pay(WHALE)
    bench.deltas()
    wide = world.displace(old.txid)
    (first,) = bench.deltas()
    narrow = world.release(wide.txid)
    world.send(old)
    (second,) = bench.deltas()
    assert pairs(first) == [(old.txid, wide.txid)]
    assert set(txids(second)) == {narrow.txid, old.txid}
    assert pairs(second) == [(wide.txid, narrow.txid)]


def test_the_fee_of_a_transaction_first_seen_in_a_block_is_not_rounded() -> None:
    bench = Bench()
    world = bench.world
    txs = [world.pay(WHALE, rate=rate, relay=False) for rate in range(1, 120)]
    block = world.mine(txs)
    bench.deltas()
    lines = {line["txid"]: line for line in msgspec.json.decode(bench.backend.summaries[block.hash])}
    ugly = [tx for tx in txs if lines[tx.txid]["fee"] != tx.fee]
    assert 5 < len(ugly) < 40  # about one fee in eight
    assert all(round(lines[tx.txid]["fee"]) == tx.fee for tx in txs)
    assert all("time" not in line for line in lines.values())


def test_a_summary_is_kept_for_32_blocks() -> None:
    bench = Bench()
    world = bench.world
    block = world.mine([world.pay(WHALE, relay=False)])
    bench.deltas()
    for _ in range(31):
        world.mine()
        bench.deltas()
    assert block.hash in bench.backend.summaries
    world.mine()
    bench.deltas()
    assert block.hash not in bench.backend.summaries


def test_a_backend_that_projects_four_blocks_has_no_fifth() -> None:
    bench = Bench(replace(QUIET, projected_blocks=4, block_weight=20_000))
    world, backend = bench.world, bench.backend
    world.burst(200)
    bench.deltas()
    assert len(backend.projected) == 4
    messages, dialogue = Messages(backend, world), Dialogue()
    assert dialogue.receive(b'{"track-mempool-block":3}', 0.0, messages)
    assert dialogue.receive(b'{"track-mempool-block":4}', 0.0, messages) == {}


def test_a_tree_marks_a_returned_transaction_as_mined() -> None:
    bench = Bench()
    old = bench.world.pay(WHALE, rate=50.0)
    bench.deltas()
    wide = bench.world.displace(old.txid)
    bench.deltas()
    narrow = bench.world.release(wide.txid)
    bench.deltas()
    bench.world.send(old)
    bench.deltas()
    bench.world.mine(only=[old.txid])
    bench.deltas()
    tree = bench.backend.rbf.tree(old.txid)
    assert tree is not None
    assert tree["tx"]["txid"] == narrow.txid
    assert tree["mined"]
    assert "mined" not in tree["tx"]
    ((middle,), inner) = (tree["replaces"], tree["replaces"][0]["replaces"])
    assert "mined" not in middle["tx"]
    assert [each["tx"].get("mined") for each in inner] == [True]
