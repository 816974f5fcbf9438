"""The most urgent requests come first, several run at a time, and a slow one delays no other."""

import asyncio
import json
from hashlib import sha256
from pathlib import Path

import pytest

from kit.backfill import Front, watching, world
from kit.whales import BTC
from whaled.backfill.mempool import Candidate, most_urgent_first
from whaled.backfill.turns import FAILURES_IN_A_ROW, Turns
from whaled.model import SAT_PER_BTC, Kind
from whaled.simulator.scripts import ScriptType
from whaled.simulator.serial import assemble
from whaled.simulator.transactions import Payment, Tx, TxKind

# An interval that lets no periodic mempool comparison interfere.
DAY_S = 86400.0


def test_newest_and_best_paying_candidates_alternate() -> None:
    def candidate(rate: float, first_seen: float) -> Candidate:
        return Candidate(1_000, rate, first_seen, 141.0, is_replacement=None)

    candidates = {
        "old and dear": candidate(90, 1),
        "new": candidate(1, 9),
        "newer": candidate(2, 10),
        "dear": candidate(80, 2),
    }
    assert list(most_urgent_first(candidates, 10)) == ["newer", "old and dear", "new", "dear"]
    assert list(most_urgent_first(candidates, 1)) == ["newer", "old and dear"]
    assert list(most_urgent_first({}, 10)) == []


@pytest.mark.slow
async def test_whales_of_the_mempool_do_not_wait_for_blocks(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        async with watching(sim, clock, tmp_path, front=front):
            pass
        for _ in range(20):
            sim.world.mine([sim.world.pay(150 * BTC, relay=False)])
        waiting = [sim.world.pay(150 * BTC).txid for _ in range(30)]
        await sim.poll()
        front.requested.clear()
        async with watching(sim, clock, tmp_path, front=front) as rig:
            assert len(rig.sources()) == 50
            whales = [front.requested.index(f"tx/{txid}") for txid in waiting]
            blocks = [index for index, path in enumerate(front.requested) if path.endswith("/summary")]
            # Blocks are scanned until the snapshot arrives; after that, only in the turns that are left.
            assert len([index for index in blocks if min(whales) < index < max(whales)]) <= 2
            assert len(front.requested) < 50 + 5 * 20 + 20


@pytest.mark.slow
async def test_a_slow_whale_delays_no_other(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        slow, *others = [sim.world.pay(150 * BTC).txid for _ in range(20)]
        block_whales = [sim.world.pay(150 * BTC, relay=False) for _ in range(3)]
        await sim.poll()
        is_held, release = front.hold(f"tx/{slow}")
        async with watching(sim, clock, tmp_path, front=front, settled=False) as rig:
            await is_held.wait()
            sim.world.mine(block_whales, only=())
            await rig.poll()
            await rig.until(lambda: rig.sources().keys() == {*others, *(tx.txid for tx in block_whales)})
            assert rig.tally.open["whales"] == 1
            release.set()
            await rig.until(lambda: slow in rig.sources())


async def test_a_whale_of_a_thousand_inputs_is_fetched_without_a_lookup_of_each_input(tmp_path: Path) -> None:
    """The backend would look up each input in turn, for minutes, and continue after the request was given up."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        wallets, fee = sim.world.wallets, 200_000
        coins = [wallets.mint(BTC, ScriptType.P2WPKH) for _ in range(1_100)]
        payee = wallets._scripts.make(ScriptType.P2WPKH)
        paid = [Payment(1_100 * BTC - fee, payee)]
        whale = sim.world.send(assemble(TxKind.CONSOLIDATION, coins, paid, fee, sent_at=clock()))
        await sim.poll()
        async with watching(sim, clock, tmp_path, front=front) as rig:
            alert = rig.events[0].whale.alert
            assert rig.statuses(whale.txid) == ["alert"]
            assert front.times(f"tx/{whale.txid}") == 0
            assert front.times("prevouts") == 11
            assert (alert.value_sat, alert.fee_sat, alert.input_count) == (whale.out_sat, whale.fee, 1_100)
            assert alert.moved_sat == whale.moved_sat
            assert alert.fee_rate is not None
            assert {output.script.address for output in whale.outputs} <= set(rig.events[0].whale.addresses)


@pytest.mark.slow
async def test_the_backlog_is_reported_while_requests_are_pending(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        for _ in range(200):
            sim.world.pay(150 * BTC)
        await sim.poll()
        is_held, release = front.hold("tx/.*")
        async with watching(sim, clock, tmp_path, front=front, settled=False) as rig:
            await is_held.wait()
            assert rig.tally.rounds <= 2
            assert rig.tally.open["whales"] > 190
            release.set()
            await rig.settled()
            assert rig.tally.open == dict.fromkeys(("blocks", "block_whales", "whales", "transactions", "fates"), 0)


@pytest.mark.slow
async def test_whales_of_a_block_are_fetched_by_page(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim), watching(sim, clock, tmp_path, front=front) as rig:
        whales = [sim.world.pay(150 * BTC, relay=False) for _ in range(300)]
        front.requested.clear()
        sim.world.mine(whales)
        await rig.settled()
        assert rig.sources() == dict.fromkeys((tx.txid for tx in whales), "block")
        assert front.times("block/.*/txs/.*") == 30
        assert front.times("block/.*/summary") == 1


# --- turns ---


@pytest.mark.slow
async def test_several_failures_in_a_row_end_a_turn(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim), watching(sim, clock, tmp_path, front=front) as rig:
        front.spoil("block/.*/txs/.*", 500)
        blocks = [sim.world.mine([sim.world.pay(150 * BTC, relay=False)]) for _ in range(3 * FAILURES_IN_A_ROW)]
        front.requested.clear()
        await rig.poll()
        await rig.until(lambda: rig.tally.failures.total() >= FAILURES_IN_A_ROW)
        assert rig.sources() == {}
        front.restore()
        for _ in range(3):
            await rig.poll(70)
            await rig.settled()
        assert len(rig.sources()) == len(blocks)


@pytest.mark.slow
async def test_a_turn_ends_while_a_request_continues_and_a_key_is_requested_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whaled.backfill.turns.TURN_S", 0.5)
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        worker = rig.observer._worker
        turns = Turns(worker._context, worker._backoff, 2)
        release, is_finished, requested = asyncio.Event(), asyncio.Event(), []

        async def request(key: str) -> None:
            requested.append(key)
            if key == "slow":
                await release.wait()
                is_finished.set()

        assert await turns.take(["slow"], request)
        assert turns.is_running("slow")
        assert await turns.take(["slow", "a", "b"], request)
        assert requested == ["slow", "a", "b"]
        release.set()
        await turns.take(["c"], request)
        assert requested == ["slow", "a", "b", "c"]
        await is_finished.wait()
        assert await turns.take(["slow"], request)
        assert requested[-1] == "slow"


@pytest.mark.slow
async def test_a_failed_key_with_a_running_request_is_not_due(tmp_path: Path) -> None:
    """Otherwise rounds of work would follow one another without a pause until the response, each requesting the tip."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        whale = sim.world.pay(150 * BTC)
        await sim.poll()
        front.spoil(f"tx/{whale.txid}", 500)
        async with watching(sim, clock, tmp_path, front=front, settled=False, interval=DAY_S) as rig:
            worker = rig.observer._worker
            await rig.until(lambda: rig.tally.failures.total() > 0)
            assert worker._mempool.next_due() is not None
            front.restore()
            is_held, release = front.hold(f"tx/{whale.txid}")
            await rig.poll(70)
            await is_held.wait()
            assert worker._mempool.next_due() is None
            release.set()
            await rig.until(lambda: whale.txid in rig.sources())

            front.spoil("block/.*/txs/.*", 500)
            missed = sim.world.pay(150 * BTC, relay=False)
            sim.world.mine([missed])
            failures = rig.tally.failures.total()
            await rig.poll()
            await rig.until(lambda: rig.tally.failures.total() > failures)
            assert worker._blocks.next_due() is not None
            front.restore()
            is_held, release = front.hold("block/.*/txs/.*")
            await rig.poll(70)
            await is_held.wait()
            assert worker._blocks.next_due() is None
            release.set()
            await rig.until(lambda: missed.txid in rig.sources())


# --- replacements that the backend does not report ---


def tree(*chain: tuple[str, int], at: float) -> dict[str, object]:
    """Return an RBF tree as the backend sends it, the last replacement first."""
    node: dict[str, object] = {}
    for txid, value in reversed(chain):
        stripped = {"txid": txid, "fee": 1, "vsize": 141, "value": value, "rate": 5, "time": int(at), "rbf": True}
        node = {"tx": stripped, "time": int(at), "fullRbf": False, "replaces": [node] if node else []}
    return node


async def test_a_whale_that_returned_after_its_replacement_was_replaced_is_not_replaced(tmp_path: Path) -> None:
    """Replacement cycling during an outage: C replaced B, which had replaced A; A has returned."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        back = sim.world.pay(150 * BTC)
        await sim.poll()
        rbf_tree = tree(("cc" * 32, 10 * BTC), ("bb" * 32, 160 * BTC), (back.txid, back.out_sat), at=clock() + 5)
        front.spoil(f"tx/{back.txid}/rbf", 200, json.dumps({"replacements": rbf_tree, "replaces": None}).encode())
        front.spoil("replacements", 200, json.dumps([rbf_tree]).encode())
        async with watching(sim, clock, tmp_path, front=front) as rig:
            await rig.poll(70)
            await rig.settled()
            assert rig.statuses(back.txid) == ["alert"]


@pytest.mark.parametrize("by", ["replace", "replace_by_package"])
async def test_a_whale_that_is_replaced_while_it_is_fetched_replaces_nothing(tmp_path: Path, by: str) -> None:
    """It is alerted after its replacement, which spends the same outputs and is in the mempool."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        old = sim.world.pay(150 * BTC).txid
        await sim.poll()
        is_held, release = front.hold(f"tx/{old}")
        async with watching(sim, clock, tmp_path, front=front, settled=False, interval=DAY_S) as rig:
            await is_held.wait()
            sent = getattr(sim.world, by)(old)
            new = (sent if by == "replace" else sent[0]).txid
            await rig.poll()
            await rig.until(lambda: new in rig.sources())
            release.set()
            await rig.settled()
            assert rig.statuses(new) == ["alert"]
            await rig.until(lambda: rig.statuses(old) == ["alert", "replaced"])
            assert [event.ref for event in rig.events if event.ref] == [new]


@pytest.mark.parametrize("is_mined", [True, False])
async def test_a_whale_that_returned_and_was_mined_before_the_first_start_is_not_alerted(
    tmp_path: Path, *, is_mined: bool
) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        whale = sim.world.pay(150 * BTC)
        await sim.poll()
        if is_mined:
            sim.world.mine([whale])
        else:
            sim.world.chain.evict(whale.txid)
        await sim.poll()
        rbf_tree = tree(("cc" * 32, 10 * BTC), (whale.txid, whale.out_sat), at=clock() + 5)
        front.spoil("replacements", 200, json.dumps([rbf_tree]).encode())
        whole = {"txid": whale.txid, "vin": [], "vout": [{"value": whale.out_sat}], "fee": 5}
        front.spoil(f"tx/{whale.txid}/cached", 200, json.dumps(whole).encode())
        async with watching(sim, clock, tmp_path, front=front) as rig:
            await rig.poll(5)
            await rig.settled()
            assert rig.statuses(whale.txid) == ([] if is_mined else ["alert", "replaced"])


async def test_a_whale_of_the_stream_is_not_dropped_because_another_node_does_not_have_it(tmp_path: Path) -> None:
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=10.0) as rig,
    ):
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        front.spoil("mempool/txids", 200, b"[]")
        front.spoil(f"tx/{whale}(/status)?", 404)
        for _ in range(4):
            await rig.poll(20)
            await rig.settled()
        assert rig.statuses(whale) == ["alert"]
        front.restore()
        sim.world.chain.evict(whale)
        for _ in range(4):
            await rig.poll(20)
            await rig.settled()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "dropped"])


def compact(number: int) -> bytes:
    return bytes([number])


def raw_block(*spenders: tuple[str, int]) -> tuple[bytes, list[str]]:
    """Return a block of transactions that spend one outpoint each, serialised as in BIP 144, and their txids."""
    raw, txids = bytes(80) + compact(len(spenders)), []
    for txid, vout in spenders:
        body = compact(1) + bytes.fromhex(txid)[::-1] + vout.to_bytes(4, "little") + compact(0) + b"\xff" * 4
        body += compact(1) + (SAT_PER_BTC).to_bytes(8, "little") + compact(0)
        raw += b"\x02\0\0\0" + b"\0\x01" + body + compact(1) + compact(2) + b"\x01\x02" + bytes(4)
        txids.append(sha256(sha256(b"\x02\0\0\0" + body + bytes(4)).digest()).digest()[::-1].hex())
    return raw, txids


async def test_a_whale_replaced_by_a_transaction_sent_directly_to_a_miner_is_not_dropped(tmp_path: Path) -> None:
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=30.0) as rig,
    ):
        replaced: Tx = sim.world.pay(150 * BTC)
        dropped: Tx = sim.world.pay(160 * BTC)
        await rig.settled()
        spent = replaced.inputs[0]
        raw, (_, by) = raw_block(("ee" * 32, 0), (spent.txid, spent.vout))
        front.spoil("block/.*/raw", 200, raw)
        for tx in (replaced, dropped):
            sim.world.chain.evict(tx.txid)
        sim.world.mine(only=())
        for _ in range(4):
            await rig.poll(40)
            await rig.settled()
        await rig.until(lambda: rig.statuses(dropped.txid) == ["alert", "dropped"])
        assert rig.statuses(replaced.txid) == ["alert", "replaced"]
        assert [event.ref for event in rig.events if event.ref] == [by]


async def test_a_transaction_that_spends_the_same_output_as_a_missing_whale_has_replaced_it(tmp_path: Path) -> None:
    """The two are in different messages, and the backend does not report them as a replacement."""
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=600.0) as rig:
        whale: Tx = sim.world.pay(150 * BTC)
        await rig.settled()
        await rig.inject_delta(removed=[whale.txid])
        await rig.poll(5)
        await rig.settled()
        spent = whale.inputs[0]
        small = {
            "txid": "dd" * 32,
            "vin": [{"txid": spent.txid, "vout": spent.vout, "sequence": 0, "prevout": None}],
            "vout": [{"value": 5, "scriptpubkey": "51"}],
        }
        await rig.inject_delta(added=[small])
        await rig.until(lambda: rig.statuses(whale.txid) == ["alert", "replaced"])
        assert [event.ref for event in rig.events if event.ref] == ["dd" * 32]


@pytest.mark.slow
async def test_a_response_about_a_block_that_left_the_chain_meanwhile_confirms_nothing(tmp_path: Path) -> None:
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, interval=DAY_S) as rig,
    ):
        missed = sim.world.pay(150 * BTC, relay=False)
        is_held, release = front.hold("block/.*/txs/.*")
        stale = sim.world.mine([missed])
        await rig.poll()
        await is_held.wait()
        sim.world.reorg(1, keep=())
        await rig.poll()
        tip = sim.world.chain.tip
        assert tip.hash != stale.hash
        await rig.until(lambda: rig.tally.open["blocks"] == 0)
        release.set()
        await rig.until(lambda: not rig.observer._worker._blocks._scanner._turns._tasks)
        confirmed = [event.ref for event in rig.events if event.kind is Kind.CONFIRMED]
        assert stale.hash not in confirmed
        assert await rig.no_scan_is_stale()
