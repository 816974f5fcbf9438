"""Whales of the mempool are found, whether or not the stream announced them."""

from pathlib import Path

import pytest

from kit.backfill import Front, watching, world
from kit.whales import BTC
from whaled.backfill import mempool


async def test_whales_in_the_mempool_at_the_first_start_are_alerted_once(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        whales = [sim.world.pay(150 * BTC).txid for _ in range(3)]
        sim.world.pay(99 * BTC)
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.sources() == dict.fromkeys(whales, "snapshot")
            assert all(event.whale.alert.status == "pending" for event in rig.events)
            assert all(event.whale.alert.moved_sat is not None for event in rig.events)
            sim.drop_link()
            await rig.until(lambda: rig.tally.snapshots == 2)
            await rig.settled()
        async with watching(sim, clock, tmp_path) as again:
            assert again.events == []


async def test_whales_in_the_mempool_at_the_first_start_are_not_alerted_without_first_mempool(tmp_path: Path) -> None:
    async with world(start=1_700_000_000.0) as (sim, clock):
        clock.ahead_s = 1_700_000_000.0 - clock()
        old = sim.world.pay(150 * BTC).txid
        await sim.poll()
        clock.ahead_s += 10
        async with watching(sim, clock, tmp_path, first_mempool=False) as rig:
            assert rig.events == []
            await rig.poll(5)
            new = sim.world.pay(150 * BTC).txid
            await rig.settled()
            assert rig.sources() == {new: "live"}
        missed = sim.world.pay(150 * BTC).txid
        await sim.poll(20)
        clock.ahead_s += 20
        async with watching(sim, clock, tmp_path, first_mempool=False) as rig:
            assert rig.sources() == {missed: "snapshot"}
            assert old not in rig.sources()


async def test_whales_after_a_first_start_with_a_clock_ahead_are_alerted(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        clock.ahead_s += 40 * 86_400
        async with watching(sim, clock, tmp_path, first_mempool=False):
            pass
        clock.ahead_s -= 40 * 86_400
        missed = sim.world.pay(150 * BTC).txid
        await sim.poll()
        async with watching(sim, clock, tmp_path, first_mempool=False) as rig:
            assert rig.sources() == {missed: "snapshot"}


async def test_whales_that_arrive_during_the_mempool_snapshot_are_alerted_exactly_once(tmp_path: Path) -> None:
    async with world(block_weight=20_000) as (sim, clock):
        before = [sim.world.pay(150 * BTC).txid for _ in range(40)]
        await sim.poll()
        async with watching(sim, clock, tmp_path, settled=False) as rig:
            during = []
            while rig.tally.snapshots == 0:
                received = len(rig.observer.messages)
                await rig.until(lambda received=received: len(rig.observer.messages) > received)  # type: ignore[misc]
                during.append(sim.world.pay(150 * BTC).txid)
                await rig.poll(0.1)
            await rig.settled()
            assert rig.sources().keys() == {*before, *during}
            offsets = [event.offset for event in rig.events]
            assert offsets == list(range(1, len(offsets) + 1))


async def test_a_whale_in_no_projected_block_is_found(tmp_path: Path) -> None:
    async with world(block_weight=20_000) as (sim, clock):
        for _ in range(8 * 36):
            sim.world.pay(BTC, rate=50.0)
        cheap = [sim.world.pay(150 * BTC, rate=1.0).txid for _ in range(3)]
        await sim.poll()
        async with watching(sim, clock, tmp_path, interval=60.0) as rig:
            projected = sim.backend.projected
            assert not {seen.tx.txid for block in projected[:7] for seen in block.txs} & set(cheap)
            await rig.poll(11)
            await rig.settled()
            await rig.until(lambda: set(cheap) <= rig.sources().keys())
            assert rig.sources() == dict.fromkeys(cheap, "snapshot")
            await rig.until(lambda: rig.tally.open["transactions"] == 0)


async def test_transactions_that_left_the_mempool_are_no_longer_fetched_even_while_requests_fail(
    tmp_path: Path,
) -> None:
    front = Front()
    async with world(block_weight=20_000) as (sim, clock), front.before(sim):
        for _ in range(8 * 36):
            sim.world.pay(BTC, rate=50.0)
        cheap = [sim.world.pay(BTC, rate=1.0).txid for _ in range(6)]
        await sim.poll()
        front.spoil("tx/.*/hex", 503)
        async with watching(sim, clock, tmp_path, front=front, interval=60.0) as rig:
            await rig.until(lambda: rig.tally.open["transactions"] >= 6)
            held = rig.tally.open["transactions"]
            pair = {"replaced": cheap[3], "by": {"txid": "ab" * 32, "vin": [], "vout": [], "fee": 1, "vsize": 100}}
            await rig.inject_delta(removed=[cheap[0], cheap[1], cheap[3]], mined=[cheap[2]], replaced=[pair])
            # The backend keeps replaced transactions for a day, and returns them.
            assert rig.tally.open["transactions"] == held - 3
            requested_before = len(front.requested)
            front.restore()
            await rig.poll(11)
            await rig.until(lambda: rig.tally.open["transactions"] == 0)
            requested = {path.split("/")[1] for path in front.requested[requested_before:] if path.endswith("/hex")}
            assert requested & set(cheap) == set(cheap[3:])


async def test_a_whale_mined_before_it_was_fetched_is_found_in_its_block_only(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        await sim.poll()
        front.spoil("tx/[0-9a-f]*", 503)
        async with watching(sim, clock, tmp_path, front=front, settled=False) as rig:
            await rig.until(lambda: rig.tally.snapshots == 1)
            whale = sim.world.pay(150 * BTC).txid
            sim.drop_link()
            await rig.poll()
            await rig.until(lambda: rig.tally.open["whales"] == 1)
            sim.world.mine()
            await rig.poll()
            await rig.until(lambda: rig.tally.open["whales"] == 0)
            front.restore()
            await rig.settled()
            assert rig.sources() == {whale: "block"}
            assert rig.statuses(whale) == ["alert", "confirmed"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [50.0, 1.0])
async def test_a_transaction_that_the_backend_does_not_return_is_fetched_again_while_in_the_mempool(
    tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in a projected block, which shows its value, and in none."""
    monkeypatch.setattr(mempool, "UNVALUED_AFTER_S", 1.0)
    front = Front()
    async with world(block_weight=20_000) as (sim, clock), front.before(sim):
        for _ in range(8 * 36):
            sim.world.pay(BTC, rate=20.0)
        whale = sim.world.pay(150 * BTC, rate=rate).txid
        await sim.poll()
        front.spoil(f".*{whale}.*", 404)
        async with watching(sim, clock, tmp_path, front=front, interval=5.0) as rig:
            await rig.poll(11)
            await rig.until(lambda: front.times(f".*{whale}.*") > 0 and rig.tally.open["transactions"] == 0)
            assert rig.sources() == {}
            front.restore()
            for _ in range(3):
                await rig.poll(11)
            await rig.until(lambda: rig.sources() == {whale: "snapshot"})
