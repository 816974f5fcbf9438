"""Outcomes of whales that left the mempool without an explanation, and the return of whales that were gone."""

import json
from functools import partial
from pathlib import Path

import pytest

from kit.backfill import Front, Rig, watching, world
from kit.whales import BTC
from whaled.backfill import outcomes
from whaled.model import Kind, Status
from whaled.simulator.faults import RestMode
from whaled.simulator.transactions import TxKind

# An interval that lets no periodic mempool comparison interfere.
DAY_S = 86400.0


async def wait(rig: Rig, seconds: float) -> None:
    """Advance the clocks and wait for the requests that become due."""
    await rig.poll(seconds)
    await rig.settled()


async def test_a_whale_replaced_during_an_outage_is_replaced_and_linked_both_ways(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            old = sim.world.pay(150 * BTC).txid
            await rig.settled()
        new = sim.world.replace(old).txid
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(old) == ["replaced"]
            assert rig.statuses(new) == ["alert"]
            by_txid = {event.whale.alert.transaction_id: event for event in rig.events}
            assert by_txid[new].whale.alert.replaces == old
            update = by_txid[old].update
            assert update is not None
            assert update.replaced_by == new


async def test_a_whale_cancelled_by_a_mined_transaction_during_an_outage_is_replaced(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            old = sim.world.transact(TxKind.CONSOLIDATION, 150 * BTC).txid
            await rig.settled()
        by = sim.world.cancel(old)
        assert by.out_sat < 100 * BTC  # else the alert of a whale would reveal the replacement as well
        sim.world.mine()
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            await wait(rig, 5)
            await rig.until(lambda: rig.statuses(old) == ["replaced"])
            assert [event.ref for event in rig.events if event.kind is Kind.REPLACED] == [by.txid]


@pytest.mark.parametrize("mines_first", [True, False])
async def test_a_whale_replaced_by_a_transaction_that_only_a_block_has_does_not_wait_for_drop_after(
    tmp_path: Path, mines_first: bool
) -> None:
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=DAY_S, interval=DAY_S) as rig,
    ):
        whale = sim.world.transact(TxKind.CONSOLIDATION, 150 * BTC)
        old = whale.txid
        sim.world.mine(only=())
        await rig.settled()
        sim.world.chain.evict(old)
        if not mines_first:
            await wait(rig, 5)
            await wait(rig, 40)
            assert rig.statuses(old) == ["alert"]
        by = sim.world.wallets.takeback(whale, 100_000, sim.world.now)  # sent directly to a miner
        sim.world.mine([by])
        await rig.poll()
        await wait(rig, 5)
        await wait(rig, 40)
        await rig.until(lambda: rig.statuses(old) == ["alert", "replaced"])
        assert [event.ref for event in rig.events if event.kind is Kind.REPLACED] == [by.txid]
        assert front.times("block/.*/raw") <= 4


@pytest.mark.slow
async def test_a_block_outside_the_chain_confirms_nothing(tmp_path: Path) -> None:
    """After a reorganisation the backend may name the stale block of a transaction."""
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=60.0) as rig,
    ):
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        place = {"confirmed": True, "block_hash": "cc" * 32, "block_height": sim.world.chain.tip.height}
        front.spoil(f"tx/{tx.txid}/status", 200, json.dumps(place).encode())
        sim.world.chain.evict(tx.txid)
        await wait(rig, 5)
        await wait(rig, 5)
        assert front.times(f"tx/{tx.txid}/status") > 0
        assert rig.statuses(tx.txid) == ["alert"]
        for _ in range(2):
            await wait(rig, 40)
        await rig.until(lambda: rig.statuses(tx.txid) == ["alert", "dropped"])


@pytest.mark.slow
async def test_a_whale_whose_request_must_wait_is_not_due_earlier(tmp_path: Path) -> None:
    """Otherwise rounds of work would follow one another without a pause until the Retry-After has passed."""
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, interval=DAY_S) as rig,
    ):
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        front.spoil(f"tx/{tx.txid}/status", 500, b"", **{"Retry-After": "3600"})
        sim.world.chain.evict(tx.txid)
        await wait(rig, 5)
        await rig.until(lambda: rig.tally.failures.total() > 0)
        await wait(rig, 40)
        due = rig.observer._worker._outcomes.next_due()
        assert due is not None
        assert due > clock() + 3000


async def test_a_whale_is_dropped_by_a_response_that_took_longer_than_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a backend that is always slow would keep whales from being dropped."""
    monkeypatch.setattr("whaled.backfill.turns.TURN_S", 0.1)
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=DAY_S) as rig,
    ):
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        is_held, release = front.hold(f"tx/{tx.txid}/rbf")
        sim.world.chain.evict(tx.txid)
        await wait(rig, 5)
        await wait(rig, 5)
        await is_held.wait()
        outcomes = rig.observer._worker._outcomes
        assert outcomes._turns.is_running(tx.txid)
        release.set()
        await rig.until(lambda: rig.statuses(tx.txid) == ["alert", "dropped"])
        assert front.times(f"tx/{tx.txid}/status") == 1


@pytest.mark.slow
async def test_the_search_of_blocks_for_a_replacement_delays_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whaled.backfill.turns.TURN_S", 0.1)
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=DAY_S) as rig,
    ):
        gone = sim.world.pay(150 * BTC)
        sim.world.mine(only=())
        await rig.settled()
        is_held, release = front.hold("block/.*/raw")
        sim.world.chain.evict(gone.txid)
        await wait(rig, 5)
        await wait(rig, 5)
        await is_held.wait()
        missed = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([missed])
        await rig.poll()
        await rig.until(lambda: missed.txid in rig.sources())
        assert rig.statuses(gone.txid) == ["alert"]
        release.set()
        await rig.until(lambda: rig.statuses(gone.txid) == ["alert", "dropped"])


def is_dropped(rig: Rig, txid: str) -> bool:
    return rig.statuses(txid) == ["alert", "dropped"]


async def test_the_most_recently_dropped_whales_are_watched_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whaled.backfill.outcomes.WATCHED_LIMIT", 1)
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path, drop_after=1.0, interval=DAY_S) as rig:
            whales = [sim.world.pay(150 * BTC).txid for _ in range(2)]
            await rig.settled()
            for txid in whales:
                sim.world.chain.evict(txid)
                for _ in range(2):
                    await wait(rig, 5)
                await rig.until(partial(is_dropped, rig, txid))
            assert set(rig.observer._worker._outcomes._watched.values()) == {whales[1]}
        async with watching(sim, clock, tmp_path) as rig:
            assert set(rig.observer._worker._outcomes._watched.values()) == {whales[1]}


async def test_whales_announced_and_replaced_during_an_outage_are_published(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path):
            pass
        first = sim.world.pay(150 * BTC).txid
        await sim.poll()
        second = sim.world.replace(first).txid
        await sim.poll()
        third = sim.world.replace(second).txid
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert [rig.statuses(txid) for txid in (first, second, third)] == [
                ["alert", "replaced"],
                ["alert", "replaced"],
                ["alert"],
            ]
            assert rig.sources() == dict.fromkeys((first, second, third), "snapshot")
            replaces = {
                event.whale.alert.transaction_id: event.whale.alert.replaces
                for event in rig.events
                if event.kind is Kind.ALERT
            }
            assert replaces == {first: None, second: first, third: second}
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.events == []


async def test_a_whale_announced_and_cancelled_during_an_outage_is_published(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path):
            pass
        whale = sim.world.pay(150 * BTC).txid
        await sim.poll()
        by = sim.world.cancel(whale).txid
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(whale) == ["alert", "replaced"]
            (update,) = [event.update for event in rig.events if event.kind is Kind.REPLACED]
            assert update is not None
            assert update.replaced_by == by


async def test_a_whale_replaced_before_the_first_start_is_not_alerted(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        old = sim.world.pay(150 * BTC).txid
        await sim.poll(100)
        clock.ahead_s += 100
        new = sim.world.replace(old).txid
        await sim.poll(100)
        clock.ahead_s += 100
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.sources() == {new: "snapshot"}


@pytest.mark.parametrize("is_started_between", [True, False])
async def test_a_clock_ahead_at_the_first_start_hides_no_whale_replaced_since(
    tmp_path: Path, is_started_between: bool
) -> None:
    async with world() as (sim, clock):
        clock.ahead_s += 40 * 86_400
        async with watching(sim, clock, tmp_path):
            pass
        if is_started_between:
            clock.ahead_s -= 40 * 86_400
            async with watching(sim, clock, tmp_path):
                pass
        else:
            clock.ahead_s -= 40 * 86_400
        old = sim.world.pay(150 * BTC).txid
        await sim.poll()
        new = sim.world.replace(old).txid
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(old) == ["alert", "replaced"]
            assert rig.statuses(new) == ["alert"]


@pytest.mark.slow
async def test_a_whale_is_dropped_only_after_its_grace_period_and_a_response_of_the_backend(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=100.0) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        sim.world.chain.evict(whale)
        await wait(rig, 5)
        assert rig.statuses(whale) == ["alert"]
        assert rig.tally.open["fates"] == 1
        await wait(rig, 40)
        assert rig.statuses(whale) == ["alert"]
        sim.fail_rest(status=503, times=6)
        await wait(rig, 60)
        await wait(rig, 70)
        await wait(rig, 70)
        await rig.until(lambda: rig.statuses(whale) == ["alert", "dropped"])
        assert rig.tally.open["fates"] == 0


@pytest.mark.slow
async def test_a_whale_that_returns_during_a_request_is_not_dropped(tmp_path: Path) -> None:
    front = Front()
    async with (
        world() as (sim, clock),
        front.before(sim),
        watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=DAY_S) as rig,
    ):
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        # The mempool was returned without it; the next response is pending.
        is_held, release = front.hold(f"tx/{tx.txid}/status")
        sim.world.chain.evict(tx.txid)
        await rig.poll()
        await rig.poll(5)
        await is_held.wait()
        sim.world.send(tx)
        await rig.poll()
        await rig.until(lambda: len(rig.observer.announcements(tx.txid)) == 2)
        release.set()
        await rig.settled()
        assert rig.statuses(tx.txid) == ["alert"]


async def test_a_whale_that_returned_and_left_again_gets_a_full_grace_period(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=100.0, interval=DAY_S) as rig:
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        sim.world.chain.evict(tx.txid)
        await wait(rig, 5)
        sim.fail_rest(status=503, times=100_000)  # no request can find out whether it returned
        sim.world.send(tx)
        await rig.poll(90)
        sim.world.chain.evict(tx.txid)
        await rig.poll(2)
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        await wait(rig, 60)
        assert rig.statuses(tx.txid) == ["alert"]
        await wait(rig, 60)
        await wait(rig, 30)
        await rig.until(lambda: rig.statuses(tx.txid) == ["alert", "dropped"])


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_replacement_reported_after_the_confirming_block_was_scanned_does_not_prevail(
    tmp_path: Path, is_killed: bool
) -> None:
    """A message may wait for the inputs of earlier whales while REST already has the block."""
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            whale = sim.world.pay(150 * BTC).txid
            await rig.settled()
            sim.world.mine()
            await rig.settled()
            output = {"value": 150 * BTC, "scriptpubkey": ""}
            by = {"txid": "bb" * 32, "version": 2, "vin": [], "vout": [output]}
            await rig.inject_delta(removed=[whale], replaced=[{"replaced": whale, "by": by}])
            assert rig.statuses(whale) == ["alert", "confirmed"]
            if not is_killed:
                await wait(rig, 5)
                assert rig.statuses(whale) == ["alert", "confirmed"]
        if is_killed:
            async with watching(sim, clock, tmp_path) as rig:
                await wait(rig, 5)
                assert rig.statuses(whale) == []


async def test_a_stream_behind_its_node_does_not_undo_the_confirmation_of_a_returned_whale(tmp_path: Path) -> None:
    """Replacement cycling: the whale is replaced, returns and is mined; the stream reports this after the scan."""
    async with world() as (sim, clock), watching(sim, clock, tmp_path, interval=DAY_S) as rig:
        whale = sim.world.pay(150 * BTC)
        wide = sim.world.displace(whale.txid)
        sim.world.release(wide.txid)
        sim.world.send(whale)
        sim.world.mine([whale], only=())
        await rig.settled()
        assert rig.statuses(whale.txid)[-1] == "confirmed"
        output = {"value": 150 * BTC, "scriptpubkey": ""}
        by = {"txid": wide.txid, "version": 2, "vin": [], "vout": [output]}
        await rig.inject_delta(removed=[whale.txid], replaced=[{"replaced": whale.txid, "by": by}])
        await rig.inject_delta(added=[{"txid": whale.txid, "version": 2, "vin": [], "vout": [output]}])
        await wait(rig, 5)
        assert rig.statuses(whale.txid)[-1] == "confirmed"


@pytest.mark.slow
async def test_a_whale_alerted_in_a_stale_block_that_was_not_scanned_gets_an_outcome(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            await rig.poll(5)
            sim.fail_rest(status=503, times=100_000)
            sim.late_block()
            tx = sim.world.pay(150 * BTC)
            await rig.poll(5)
            await rig.until(lambda: rig.statuses(tx.txid) != [])
            assert rig.events[0].whale.alert.status is Status.CONFIRMED
            assert rig.statuses(tx.txid) == ["alert"]
        sim.world.reorg(1, keep=())
        sim.world.chain.evict(tx.txid)
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        await sim.poll()
        async with watching(sim, clock, tmp_path, drop_after=5.0, interval=1.0) as rig:
            for _ in range(3):
                await wait(rig, 70)
            assert rig.statuses(tx.txid) == ["dropped"]


async def test_a_dropped_whale_that_returns_is_pending_again(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=10.0) as rig:
        tx = sim.world.pay(150 * BTC)
        for _ in range(2):
            await rig.settled()
            sim.world.chain.evict(tx.txid)
            await wait(rig, 5)
            await wait(rig, 20)
            await rig.until(lambda: rig.statuses(tx.txid)[-1] == "dropped")
            sim.world.send(tx)
            await rig.settled()
            await rig.until(lambda: rig.statuses(tx.txid)[-1] == "pending")
        assert rig.statuses(tx.txid) == ["alert", "dropped", "pending", "dropped", "pending"]
        dropped = [(event.ref, event.repeat) for event in rig.events if event.kind is Kind.DROPPED]
        assert dropped == [("", 1), ("", 2)]


async def test_a_dropped_whale_that_returned_during_an_outage_is_pending_again(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path, drop_after=10.0) as rig:
            tx = sim.world.pay(150 * BTC)
            await rig.settled()
            sim.world.chain.evict(tx.txid)
            await wait(rig, 5)
            await wait(rig, 20)
            assert rig.statuses(tx.txid) == ["alert", "dropped"]
        sim.world.send(tx)
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(tx.txid) == ["pending"]


async def test_an_old_message_of_the_stream_does_not_prove_that_a_whale_returned(tmp_path: Path) -> None:
    """A whale's announcement is processed after REST has reported its replacement.

    A round of work may be long, and the message about the replacement was missed.
    """
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        old = sim.world.pay(150 * BTC).txid
        await rig.settled()
        (announcement,) = rig.observer.announcements(old)
        sim.world.replace(old)
        await rig.settled()
        rig.observer.observe(announcement)
        await rig.settled()
        assert rig.statuses(old) == ["alert", "replaced"]


async def test_a_whale_that_left_during_an_outage_is_followed(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            whales = [sim.world.pay(150 * BTC).txid for _ in range(2)]
            await rig.settled()
        sim.world.chain.evict(whales[0])
        sim.world.mine()
        await sim.poll()
        async with watching(sim, clock, tmp_path, drop_after=10.0) as rig:
            await wait(rig, 5)
            await wait(rig, 20)
            await rig.until(lambda: rig.statuses(whales[0]) == ["dropped"])
            assert rig.statuses(whales[1]) == ["confirmed"]


@pytest.mark.parametrize("forget", [False, True])
async def test_a_node_that_loses_its_mempool_drops_no_whale(tmp_path: Path, forget: bool) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=100.0) as rig:
        tx = sim.world.pay(150 * BTC)
        await rig.settled()
        sim.lose_bitcoind(forget=forget)
        for _ in range(6):
            await rig.poll(2)
        sim.find_bitcoind()
        await rig.settled()
        if forget:
            sim.world.send(tx)
        await rig.settled()
        await wait(rig, 200)
        await wait(rig, 200)
        assert rig.statuses(tx.txid) == ["alert"]


@pytest.mark.slow
async def test_missing_whales_beyond_the_limit_are_followed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MISSING_LIMIT", 2)
    monkeypatch.setattr(outcomes, "FIRST_CHECK_S", 0.01)
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=0.01, interval=0.5) as rig:
        whales = [sim.world.pay(150 * BTC).txid for _ in range(5)]
        await rig.settled()
        for txid in whales:
            sim.world.chain.evict(txid)
        await rig.poll()
        most = 0

        def all_dropped() -> bool:
            nonlocal most
            most = max(most, rig.tally.open["fates"])
            return all(rig.statuses(txid) == ["alert", "dropped"] for txid in whales)

        await rig.until(all_dropped)
        assert 0 < most <= 2
