"""Each block since the first start is scanned, and blocks that leave the chain are undone."""

from pathlib import Path

import pytest
import structlog

from kit.backfill import Front, watching, world
from kit.whales import BTC
from whaled.backfill import blocks
from whaled.backfill.coverage import Cover
from whaled.config.sections import DetectionSettings, WatchRule
from whaled.model import Kind, OwnerType, Source
from whaled.simulator.faults import RestMode
from whaled.simulator.scripts import Network
from whaled.simulator.truth import Fate
from whaled.whales.detect import Detector, Rules
from whaled.whales.labels import AddressBook


async def test_a_whale_mined_during_an_outage_is_alerted_from_its_block_and_confirmed(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            first = sim.world.chain.tip.height + 1
            assert rig.events == []
        whale = sim.world.pay(150 * BTC).txid
        await sim.poll()
        block = sim.world.mine()
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(whale) == ["alert", "confirmed"]
            alert, confirmed = (event for event in rig.events if event.whale.alert.transaction_id == whale)
            assert alert.whale.alert.source is Source.BLOCK
            assert alert.whale.alert.status == "confirmed"
            assert alert.whale.alert.predicted_confirmation_block is None
            assert alert.whale.alert.moved_sat == sim.truth[whale].moved_sat
            assert alert.whale.alert.fee_sat == sim.truth[whale].fee_sat
            assert confirmed.update is not None
            assert (confirmed.update.block_height, confirmed.update.block_hash) == (block.height, block.hash)
            assert await rig.chain_is_scanned(first)
            assert rig.tally.covers == {Cover.DOWN: 1}


async def test_a_whale_that_was_never_relayed_is_alerted_from_its_block(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        await rig.poll(5)
        sim.world.mine()
        await rig.poll(5)
        hidden = sim.world.pay(150 * BTC, relay=False)
        block = sim.world.mine([hidden])
        await rig.settled()
        assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
        assert rig.sources() == {hidden.txid: "block"}
        assert rig.tally.covers == {Cover.NEVER_RELAYED: 1}
        scan = (await rig.scans())[block.height]
        assert (scan.seen, scan.late, scan.missed_down, scan.missed_gap, scan.missed_never_relayed) == (0, 0, 0, 0, 1)
        assert scan.lead_s is None


async def test_coverage_counts_whales_alerted_before_their_block_and_their_lead(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        whales = [sim.world.pay(150 * BTC).txid for _ in range(2)]
        await rig.settled()
        for _ in range(5):
            await rig.poll(20)
        block = sim.world.mine(only=whales)
        await rig.settled()
        assert [rig.statuses(whale) for whale in whales] == [["alert", "confirmed"]] * 2
        scan = (await rig.scans())[block.height]
        assert (scan.seen, scan.late, scan.missed_never_relayed) == (2, 0, 0)
        assert scan.lead_s == pytest.approx(106, abs=8)
        assert rig.tally.covers == {Cover.SEEN: 2}
        assert rig.tally.leads == 2


async def test_a_prediction_is_scored_by_the_block_that_came(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        predicted = rig.events[0].whale.alert.predicted_confirmation_block
        assert predicted == sim.world.chain.tip.height + 1
        sim.world.mine(only=())
        sim.world.mine(only=())
        sim.world.mine()
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed"]
        update = rig.events[-1].update
        assert update is not None
        assert update.blocks_off == 2
        assert rig.metrics.registry.collectors.get_sample_value("whaled_prediction_error_blocks_count") == 1


async def test_twenty_blocks_at_once_are_all_scanned(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        first = sim.world.chain.tip.height + 1
        known = [sim.world.pay(150 * BTC).txid for _ in range(2)]
        await rig.settled()
        hidden = []
        for _ in range(20):
            hidden.append(sim.world.pay(150 * BTC, relay=False))
            sim.world.mine([hidden[-1]])
        with structlog.testing.capture_logs() as lines:
            await rig.settled()
            await rig.until(lambda: any(line["event"] == "block_scan_finished" for line in lines))
        (line,) = [line for line in lines if line["event"] == "block_scan_finished"]
        assert (line["blocks"], line["whales"]) == (20, 20)
        for whale in [*known, *(tx.txid for tx in hidden)]:
            assert rig.statuses(whale) == ["alert", "confirmed"]
        assert await rig.chain_is_scanned(first)
        offsets = [event.offset for event in rig.events]
        assert offsets == list(range(1, len(offsets) + 1))


async def test_catching_up_scans_newest_blocks_first_down_to_max_blocks(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path):
            pass
        hidden = []
        for _ in range(12):
            hidden.append(sim.world.pay(150 * BTC, relay=False))
            sim.world.mine([hidden[-1]])
        await sim.poll()
        tip = sim.world.chain.tip.height
        async with watching(sim, clock, tmp_path, max_blocks=8) as rig:
            assert rig.sources().keys() == {tx.txid for tx in hidden[4:]}
            alerts = [event.whale.alert.transaction_id for event in rig.events if event.update is None]
            assert alerts == [tx.txid for tx in reversed(hidden[4:])]
            assert rig.tally.skipped_blocks == 4
            assert await rig.chain_is_scanned(tip - 7)
        async with watching(sim, clock, tmp_path, max_blocks=8) as rig:
            assert rig.tally.skipped_blocks == 0
            assert rig.events == []


@pytest.mark.slow
@pytest.mark.parametrize(("scanned", "page"), [(True, 2_000), (True, 2), (False, 2_000)])
async def test_a_reorganisation_below_skipped_blocks_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: bool, page: int
) -> None:
    """After a long outage, blocks that were scanned or confirmed before it may be stale."""
    monkeypatch.setattr(blocks, "OLD_SCANS_PAGE", page)
    async with world() as (sim, clock):
        whales = []
        async with watching(sim, clock, tmp_path, max_blocks=2) as rig:
            for _ in range(3):
                whales.append(sim.world.pay(150 * BTC).txid)
                await rig.poll()
                if not scanned:
                    sim.fail_rest(status=503, times=1_000)
                sim.world.mine()
                await rig.poll()
                await rig.until(lambda: rig.statuses(whales[-1]) == ["alert", "confirmed"])
                if scanned:
                    await rig.settled()
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        kept = whales[0]
        sim.world.reorg(3, keep=[kept])
        for _ in range(6):
            sim.world.mine(only=())
        await sim.poll()
        async with watching(sim, clock, tmp_path, max_blocks=2) as rig:
            assert rig.tally.skipped_blocks > 0
            await rig.until(lambda: all(rig.statuses(whale) == ["pending"] for whale in whales[1:]))
            await rig.poll(5)
            await rig.until(lambda: rig.statuses(kept) == ["pending", "confirmed"])
            assert [event.ref for event in rig.events if event.kind == "confirmed"] == [sim.truth[kept].block_hash]
            assert await rig.no_scan_is_stale()


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "missing"), [(1, 1), (2, 2), (2, 3)])
async def test_a_reorganisation_below_max_blocks_is_noticed(tmp_path: Path, bound: int, missing: int) -> None:
    """No followed block builds on the stale one, whether or not a block is skipped."""
    async with world() as (sim, clock), watching(sim, clock, tmp_path, max_blocks=bound) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        stale = sim.world.mine()
        await rig.settled()
        sim.fail_rest(status=503, times=1_000)
        sim.world.reorg(1, keep=())
        while sim.world.chain.tip.height < stale.height + missing:
            sim.world.mine(only=())
        await rig.poll()
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        await rig.poll(70)
        await rig.settled()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed", "pending"])
        assert await rig.no_scan_is_stale()


@pytest.mark.slow
async def test_the_request_that_verifies_an_old_block_is_repeated_until_it_succeeds(tmp_path: Path) -> None:
    """Also by the next start, and before a block above it is scanned."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        async with watching(sim, clock, tmp_path, front=front, max_blocks=2) as rig:
            whale = sim.world.pay(150 * BTC).txid
            await rig.settled()
            stale = sim.world.mine()
            await rig.settled()
        sim.world.reorg(1, keep=())
        sim.world.mine(only=())
        await sim.poll()
        front.spoil(f"block-height/{stale.height}", 503)
        async with watching(sim, clock, tmp_path, front=front, max_blocks=2, settled=False) as rig:
            await rig.until(lambda: rig.tally.failures.total() > 0)
        front.restore()
        sim.world.mine(only=())
        await sim.poll()
        async with watching(sim, clock, tmp_path, front=front, max_blocks=2) as rig:
            await rig.until(lambda: rig.statuses(whale) == ["pending"])


async def test_blocks_from_before_a_long_outage_are_verified_once(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        async with watching(sim, clock, tmp_path, front=front, max_blocks=2) as rig:
            sim.world.mine()
            await rig.settled()
            old = sim.world.chain.tip.height
        for _ in range(6):
            sim.world.mine()
        await sim.poll()
        requested = front.times(f"block-height/{old}")
        async with watching(sim, clock, tmp_path, front=front, max_blocks=2) as rig:
            for _ in range(3):
                sim.world.mine()
                await rig.settled()
            assert front.times(f"block-height/{old}") == requested + 1
            assert rig.tally.reorgs == []


async def test_a_block_between_the_first_connection_and_the_first_response_is_scanned(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        hidden = sim.world.pay(150 * BTC, relay=False)
        await sim.poll()
        sim.fail_rest(status=500, times=3)
        async with watching(sim, clock, tmp_path, settled=False) as rig:
            await rig.until(lambda: rig.tally.failures.total() > 0)
            sim.world.mine([hidden])
            await rig.poll()
            await rig.settled()
            await rig.until(lambda: rig.statuses(hidden.txid) == ["alert", "confirmed"])


@pytest.mark.slow
async def test_a_block_between_a_killed_first_start_and_the_next_start_is_scanned(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        hidden = [sim.world.pay(150 * BTC, relay=False) for _ in range(2)]
        first = sim.world.chain.tip.height + 1
        await sim.poll()
        sim.fail_rest(status=503, times=1_000)
        async with watching(sim, clock, tmp_path, settled=False) as rig:
            await rig.until(lambda: rig.tally.failures.total() > 0)
            sim.world.mine(hidden[:1])
            await rig.poll()
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        sim.world.mine(hidden[1:])
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            for tx in hidden:
                assert rig.statuses(tx.txid) == ["alert", "confirmed"]
            assert await rig.chain_is_scanned(first)


async def test_a_first_start_killed_during_its_first_request_has_stored_the_reported_blocks(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        first = sim.world.chain.tip.height + 1
        is_held, release = front.hold(".*")
        async with watching(sim, clock, tmp_path, front=front, settled=False):
            await is_held.wait()
        release.set()
        hidden = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([hidden])
        await sim.poll()
        async with watching(sim, clock, tmp_path, front=front) as rig:
            assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
            assert await rig.chain_is_scanned(first)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
async def test_blocks_that_replace_those_before_the_first_start_are_scanned(tmp_path: Path, is_killed: bool) -> None:
    """They were mined after it. The first block to scan built on blocks that are stale now."""
    async with world() as (sim, clock):
        if is_killed:
            sim.fail_rest(status=503, times=1_000)
            async with watching(sim, clock, tmp_path, settled=False) as rig:
                await rig.until(lambda: rig.tally.failures.total() > 0)
            sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        else:
            async with watching(sim, clock, tmp_path):
                pass
        start, chain = sim.world.chain.tip.height, sim.world.chain
        async with watching(sim, clock, tmp_path, settled=False) as rig:
            known, hidden = (sim.world.pay(150 * BTC, relay=relay) for relay in (True, False))
            await rig.poll()
            await rig.until(lambda: rig.statuses(known.txid) == ["alert"])
            for _ in range(3):
                chain.disconnect()
            sim.world.mine([hidden])
            for _ in range(3):
                sim.world.mine(only=())
            await rig.settled()
            assert rig.statuses(known.txid) == rig.statuses(hidden.txid) == ["alert", "confirmed"]
            assert await rig.chain_is_scanned(start - 2)
            for _ in range(5):  # one block deeper than before
                chain.disconnect()
            for _ in range(6):
                sim.world.mine(only=())
            await rig.settled()
            for tx in (known, hidden):
                assert rig.statuses(tx.txid)[:3] == ["alert", "confirmed", "pending"]
            assert await rig.chain_is_scanned(start - 3)


async def test_the_reported_blocks_from_before_the_first_start_are_verified_against_the_chain(
    tmp_path: Path,
) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        start = sim.world.chain.tip.height
        for _ in range(10):
            sim.world.chain.disconnect()
        for _ in range(12):
            sim.world.mine()
        await rig.settled()
        assert await rig.chain_is_scanned(start - 7)


@pytest.mark.slow
async def test_a_block_that_does_not_build_on_the_tip_of_the_first_start_reveals_a_reorganisation(
    tmp_path: Path,
) -> None:
    """The chain is replaced between the check of the old blocks and the scan."""
    front = Front()
    async with world() as (sim, clock), front.before(sim):
        async with watching(sim, clock, tmp_path, front=front):
            start, chain = sim.world.chain.tip.height, sim.world.chain
        hidden = sim.world.pay(150 * BTC, relay=False)
        stale = [sim.world.mine() for _ in range(2)]
        await sim.poll()
        front.spoil(f"block/{stale[1].hash}.*", 500)
        is_held, release = front.hold(f"block-height/{start}")
        async with watching(sim, clock, tmp_path, front=front, settled=False) as rig:
            await is_held.wait()
            for _ in range(3):
                chain.disconnect()
            sim.world.mine([hidden])
            for _ in range(4):
                sim.world.mine(only=())
            release.set()
            await rig.until(lambda: rig.tally.failures.total() > 0)
            for _ in range(2):
                await rig.poll(70)
                await rig.settled()
            assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
            assert await rig.chain_is_scanned(start)


@pytest.mark.slow
@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 9])
async def test_a_reorganisation_makes_whales_pending_and_confirms_them_in_the_new_branch(
    tmp_path: Path, depth: int, database: bool
) -> None:
    async with world(database=database) as (sim, clock), watching(sim, clock, tmp_path) as rig:
        first = sim.world.chain.tip.height + 1
        whales = []
        for _ in range(depth):
            whales.append(sim.world.pay(150 * BTC).txid)
            await rig.poll()
            sim.world.mine()
            await rig.settled()
        # The simulated backend finds the fork at any depth.
        sim.world.reorg(depth, keep=whales)
        await rig.settled()
        for whale in whales:
            assert rig.statuses(whale) == ["alert", "confirmed", "pending", "confirmed"]
            (latest,) = [event.update for event in rig.events if event.whale.alert.transaction_id == whale][-1:]
            assert latest is not None
            assert latest.block_hash == sim.truth[whale].block_hash
        assert await rig.chain_is_scanned(first)
        assert rig.tally.reorgs == [depth]


async def test_a_whale_missing_in_the_new_branch_is_pending_until_it_is_mined_again(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.poll()
        sim.world.mine()
        await rig.settled()
        sim.world.reorg(1, keep=())
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed", "pending"]
        sim.world.mine()
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed", "pending", "confirmed"]


async def test_a_double_spend_in_the_new_branch_replaces_a_whale(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, drop_after=60.0) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.poll()
        sim.world.mine()
        await rig.settled()
        sim.world.reorg(1, double_spend=[whale], keep=())
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed", "pending", "replaced"]
        assert sim.truth[whale].fate is not Fate.CONFIRMED
        (winner,) = [event.whale.alert for event in rig.events if event.whale.alert.replaces == whale][:1]
        assert [event.ref for event in rig.events if event.kind is Kind.REPLACED] == [winner.transaction_id]


async def test_the_confirmation_in_a_stale_block_that_was_not_scanned_is_undone(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        sim.fail_rest(status=503, times=1_000)
        sim.world.mine()
        await rig.poll()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed"])  # by the stream
        sim.world.reorg(1, keep=())
        await rig.poll()
        sim.fail_rest(RestMode.SLOW, seconds=0.0, times=1)
        await rig.settled()
        await rig.poll(70)
        await rig.settled()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed", "pending"])


async def test_a_block_whose_scan_was_killed_before_its_row_was_stored_is_scanned_again(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            whale = sim.world.pay(150 * BTC).txid
            await rig.settled()
            block = sim.world.mine()
            await rig.settled()
            assert rig.statuses(whale) == ["alert", "confirmed"]
            await rig.log.forget_scan(block.height)  # as if the scan had been killed before
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.events == []
            assert await rig.chain_is_scanned(block.height)
            scan = (await rig.scans())[block.height]
            assert (scan.seen, scan.late) == (1, 0)


async def test_a_stale_block_whose_row_was_not_stored_is_undone_after_a_restart(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            whale = sim.world.pay(150 * BTC).txid
            await rig.settled()
            stale = sim.world.mine()
            await rig.settled()
            await rig.log.forget_scan(stale.height)
            await rig.log.set_state("verified_offset", "0")
        sim.world.reorg(1, keep=())
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            await rig.until(lambda: rig.statuses(whale) == ["pending"])


@pytest.mark.slow
async def test_a_node_that_is_only_behind_undoes_nothing(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        sim.world.mine()
        sim.world.mine()
        await rig.settled()
        disconnected = [sim.world.chain.disconnect() for _ in range(2)]
        sim.drop_link()
        await rig.until(lambda: rig.tally.snapshots == 2)
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed"]
        for block in reversed(disconnected):
            sim.world.chain.connect(block)
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed"]
        assert rig.tally.reorgs == []


async def test_each_switch_between_two_branches_is_published(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        chain = sim.world.chain
        whale = sim.world.pay(150 * BTC)
        await rig.settled()
        there = sim.world.mine(only=[whale.txid])
        await rig.settled()
        chain.disconnect()
        others = [sim.world.mine(only=()) for _ in range(2)]
        await rig.settled()
        assert rig.statuses(whale.txid) == ["alert", "confirmed", "pending"]
        assert [chain.disconnect() for _ in range(2)] == others[::-1]
        chain.connect(there)
        for _ in range(2):
            sim.world.mine(only=())
        await rig.settled()
        assert rig.statuses(whale.txid) == ["alert", "confirmed", "pending", "confirmed"]
        confirmed = [(event.ref, event.repeat) for event in rig.events if event.kind == "confirmed"]
        assert confirmed == [(there.hash, 1), (there.hash, 2)]
        updates = [event.update for event in rig.events if event.kind == "confirmed"]
        assert [update and update.block_hash for update in updates] == [there.hash, there.hash]


async def test_a_whale_alerted_after_its_block_is_late(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        await rig.poll(5)
        sim.late_block()
        whale = sim.world.pay(150 * BTC).txid
        await rig.poll(5)
        await rig.settled()
        assert rig.statuses(whale) == ["alert", "confirmed"]
        assert rig.tally.covers.keys() <= {Cover.LATE, Cover.SEEN}
        assert rig.tally.covers.total() == 1


async def test_a_whale_of_the_block_that_reveals_a_gap_counts_as_missed_in_the_gap(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        hidden = sim.world.pay(150 * BTC, relay=False)
        sim.backend.sequence += 3  # messages that were never sent
        block = sim.world.mine([hidden])
        await rig.settled()
        assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
        assert (await rig.scans())[block.height].missed_gap == 1


async def test_a_whale_sent_and_mined_between_two_polls_is_not_attributed_to_an_earlier_outage(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        sim.drop_link()
        await rig.until(lambda: rig.tally.snapshots == 2)
        await rig.settled()
        await rig.settled()
        block = sim.world.mine([sim.world.pay(150 * BTC, relay=False)])
        await rig.settled()
        row = (await rig.scans())[block.height]
        assert (row.missed_down, row.missed_never_relayed) == (0, 1)


async def test_a_whale_sent_after_a_gap_was_closed_is_not_attributed_to_it(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        await rig.poll(5)
        sim.world.mine()
        await rig.poll(5)
        hidden = sim.world.pay(150 * BTC, relay=False)
        sim.backend.sequence += 3  # messages that were never sent
        await rig.settled()
        assert rig.tally.snapshots == 2  # the gap causes another snapshot
        block = sim.world.mine([hidden])
        await rig.settled()
        assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
        assert (await rig.scans())[block.height].missed_never_relayed == 1


async def test_a_whale_mined_before_an_outage_was_noticed_is_attributed_to_the_outage(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        sim.world.mine()
        await rig.settled()
        sim.stall()
        sim.world.pay(150 * BTC)
        await rig.poll(20)
        block = sim.world.mine()
        await rig.poll(20)
        sim.drop_link()
        sim.resume()
        await sim.poll()  # the backend has announced it before whaled connects again
        await rig.until(lambda: rig.tally.snapshots == 2)
        await rig.settled()
        row = (await rig.scans())[block.height]
        assert (row.missed_down, row.missed_never_relayed) == (1, 0)


@pytest.mark.slow
async def test_stale_blocks_are_undone_while_another_block_cannot_be_scanned(tmp_path: Path) -> None:
    front = Front()
    async with world() as (sim, clock), front.before(sim), watching(sim, clock, tmp_path, front=front) as rig:
        stuck, whale = (sim.world.pay(150 * BTC).txid for _ in range(2))
        await rig.settled()
        front.spoil("block/[0-9a-f]+/summary", 500)
        sim.world.mine(only=[stuck])
        await rig.poll()
        sim.world.mine(only=[whale])
        await rig.poll()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed"])  # by the stream
        sim.world.reorg(1, keep=())
        for _ in range(3):
            await rig.poll(70)
            await rig.processed()
        await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed", "pending"])
        assert rig.statuses(stuck) == ["alert", "confirmed"]


async def test_without_canaries_an_outage_counts_from_the_last_scan(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            sim.world.mine()
            await rig.settled()
            await rig.poll(1000)
            assert await rig.log.state("canary") is None
        whale = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([whale])
        await sim.poll(1000)
        clock.ahead_s += 1000
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.tally.covers == {Cover.DOWN: 1}


async def test_a_block_is_in_the_backlog_while_the_tip_cannot_be_requested(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        sim.fail_rest(status=503, times=1_000)
        sim.world.mine()
        await rig.poll()
        await rig.until(lambda: rig.tally.open["blocks"] == 1)


async def test_the_current_price_is_not_applied_to_a_whale_in_an_old_block(tmp_path: Path) -> None:
    async with world(network=Network.MAINNET, price_interval=600.0) as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.pipeline.market.price is not None
        old = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([old])
        clock.ahead_s += 3 * 3600
        await sim.poll(3 * 3600)
        new = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([new])
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            alerts = {event.whale.alert.transaction_id: event.whale.alert for event in rig.events}
            assert (alerts[old.txid].usd_value, alerts[old.txid].price_timestamp) == (None, None)
            assert alerts[new.txid].usd_value is not None
            assert alerts[new.txid].price_timestamp is not None


async def test_an_unknown_transaction_of_a_watched_owner_is_alerted_from_its_block(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        paid = sim.world.pay(2 * BTC, relay=False)
        other = sim.world.pay(2 * BTC, relay=False)
        address = next(output.script.address for output in paid.outputs if output.script.address)
        assert address not in {output.script.address for output in other.outputs}
        rule = WatchRule(name="mine", types=(OwnerType.OWN,), threshold_btc=0.000_000_01)
        book = AddressBook.parse(f"Mine,{address},own", "book.csv")
        rig.pipeline.detector = Detector(Rules.of(DetectionSettings(watch=(rule,))), book)
        sim.world.mine([paid, other])
        await rig.settled()
        assert rig.statuses(paid.txid) == ["alert", "confirmed"]
        assert rig.statuses(other.txid) == []
        assert rig.events[0].whale.alert.matched_rules == ("watch:mine",)
