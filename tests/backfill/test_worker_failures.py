"""Failing requests: known events stay, the failure is counted, and the work is done once requests succeed."""

import gc
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import structlog

from kit.backfill import Clock, Front, Rig, watching, world
from kit.whales import BTC
from whaled.config.sections import Basis, DetectionSettings
from whaled.simulator.faults import RestMode
from whaled.simulator.server import Simulator
from whaled.simulator.transactions import Tx
from whaled.source import SnapshotTaken
from whaled.sources.mempool_space.http import RestError, RestFailure


@asynccontextmanager
async def behind(front: Front) -> AsyncIterator[tuple[Simulator, Clock]]:
    """Run a simulated backend with a proxy in front of its REST interface."""
    async with world() as (sim, clock), front.before(sim):
        yield sim, clock


async def later(rig: Rig, times: int = 2) -> None:
    """Let failed requests become due and be repeated."""
    for _ in range(times):
        await rig.poll(70)
        await rig.settled()


async def dropped_whale(rig: Rig) -> Tx:
    """Return a whale that was dropped. `drop_after` must be short."""
    tx: Tx = rig.sim.world.pay(150 * BTC)
    await rig.settled()
    rig.sim.world.chain.evict(tx.txid)
    await later(rig)
    await rig.until(lambda: rig.statuses(tx.txid) == ["alert", "dropped"])
    return tx


GARBAGE = b"<html>502 Bad Gateway</html>"
NESTED = b"[" * 100_000
ANSWERS = {
    "not found": (404, b"", RestFailure.NOT_FOUND),
    "too many": (429, b"", RestFailure.RATE_LIMITED),
    "broken": (500, b"", RestFailure.SERVER_ERROR),
    "not ready": (503, b"", RestFailure.SERVER_ERROR),
    "garbage": (200, GARBAGE, RestFailure.GARBAGE),
    "empty": (200, b"", RestFailure.GARBAGE),
    "null": (200, b"null", RestFailure.GARBAGE),
    "another shape": (200, b'{"txid":7}', RestFailure.GARBAGE),
    "nested": (200, NESTED, RestFailure.GARBAGE),
    "moved": (302, b"", RestFailure.REDIRECTED),
}


@pytest.mark.slow
@pytest.mark.parametrize("answer", ANSWERS)
async def test_invalid_responses_to_all_requests_change_nothing_and_requests_are_repeated(
    tmp_path: Path, answer: str
) -> None:
    status, body, reason = ANSWERS[answer]
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front, drop_after=1.0) as rig:
        mined, gone, kept = (sim.world.pay(150 * BTC).txid for _ in range(3))
        await rig.settled()
        sim.world.mine(only=[mined])
        await rig.settled()
        front.spoil(".*", status, body)
        sim.world.chain.evict(gone)
        hidden = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([hidden], only=())
        await rig.poll()
        await rig.until(lambda: rig.tally.failures.total() > 0)
        for _ in range(3):
            await rig.poll(70)
        assert rig.tally.failures[reason] == rig.tally.failures.total()
        statuses = {txid: rig.statuses(txid) for txid in (mined, gone, kept, hidden.txid)}
        assert statuses == {mined: ["alert", "confirmed"], gone: ["alert"], kept: ["alert"], hidden.txid: []}
        front.restore()
        await later(rig, 3)
        await rig.until(lambda: rig.statuses(gone) == ["alert", "dropped"])
        assert rig.statuses(hidden.txid) == ["alert", "confirmed"]
        assert rig.statuses(mined) == ["alert", "confirmed"]
        assert rig.statuses(kept) == ["alert"]


@pytest.mark.parametrize("path", ["mempool/txids", "replacements"])
async def test_a_snapshot_taken_while_the_previous_one_is_processed_is_processed_too(tmp_path: Path, path: str) -> None:
    """The pending response does not show what happened between the two."""
    front = Front()
    async with (
        behind(front) as (sim, clock),
        watching(sim, clock, tmp_path, front=front, interval=86_400.0) as rig,
    ):
        is_held, release = front.hold(path)
        rig.observer.observe(SnapshotTaken())
        await is_held.wait()
        requested = front.times(path)
        rig.observer.observe(SnapshotTaken())
        release.set()
        await rig.until(lambda: front.times(path) > requested)


@pytest.mark.slow
async def test_a_whale_that_returns_delays_no_other(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock):
        async with watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=86_400.0) as rig:
            tx = await dropped_whale(rig)
        front.spoil("mempool/txids", 503)
        sim.world.send(tx)
        new = {sim.world.pay(150 * BTC).txid for _ in range(200)}
        await sim.poll()
        async with watching(sim, clock, tmp_path, settled=False, front=front, interval=86_400.0) as rig:
            # Several batches: if each waited for the failing request, whose backoff grows, it would take minutes.
            await rig.until(lambda: new <= rig.sources().keys())
            assert rig.tally.failures.total() > 0


async def test_a_whale_of_a_snapshot_that_leaves_before_the_backend_returns_it_is_counted(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock):
        gone, mined = (sim.world.pay(150 * BTC) for _ in range(2))
        await sim.poll()
        front.spoil("tx/.*", 503)
        async with watching(sim, clock, tmp_path, settled=False, front=front) as rig:
            await rig.until(lambda: rig.tally.open["whales"] == 2)
            sim.world.mine(only=[mined.txid])
            sim.world.chain.evict(gone.txid)
            await rig.poll()
            front.restore()
            await later(rig)
            assert rig.statuses(gone.txid) == []
            assert rig.tally.unread_whales == 1
            assert rig.statuses(mined.txid) == ["alert", "confirmed"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["90000q", "{}", "[1,2]", "null", "9" * 24])
async def test_unreadable_stored_state_does_not_stop_a_start(tmp_path: Path, value: str) -> None:
    async with world() as (sim, clock):
        async with watching(sim, clock, tmp_path) as rig:
            first = sim.world.chain.tip.height + 1
            sim.world.mine()
            await rig.settled()
        with closing(sqlite3.connect(tmp_path / "whaled.db", isolation_level=None)) as db:
            db.execute("UPDATE state SET value = ?, checksum = NULL", (value,))
            db.execute("INSERT OR IGNORE INTO state VALUES ('canary', ?, NULL)", (value,))
        whale = sim.world.pay(150 * BTC).txid
        await sim.poll()
        sim.world.mine()
        await sim.poll()
        async with watching(sim, clock, tmp_path) as rig:
            assert rig.statuses(whale) == ["alert", "confirmed"]
            assert await rig.chain_is_scanned(first)


async def test_one_absurd_tip_height_skips_no_block(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front) as rig:
        first = await rig.log.state("first_block")
        front.spoil("blocks/tip/height", 200, b"4000000000")
        front.spoil("block-height/4000000000", 200, sim.world.chain.tip.hash.encode())
        sim.world.mine()
        await rig.poll()
        await rig.until(lambda: rig.tally.failures[RestFailure.GARBAGE] > 0)
        assert await rig.log.state("first_block") == first
        assert rig.tally.skipped_blocks == 0
        front.restore()
        await later(rig)
        assert rig.tally.open["blocks"] == 0
        assert len(await rig.scans()) == 1


@pytest.mark.slow
async def test_a_failed_request_does_not_cause_rounds_of_work_while_it_waits(tmp_path: Path) -> None:
    front = Front()
    async with (
        behind(front) as (sim, clock),
        watching(sim, clock, tmp_path, front=front, drop_after=100.0) as rig,
    ):
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        front.spoil("mempool/txids", body=GARBAGE)
        sim.world.chain.evict(whale)
        await rig.poll()
        await rig.poll(5)
        await rig.until(lambda: rig.tally.failures.total() > 0)
        rounds, failures = rig.tally.rounds, rig.tally.failures.total()
        await rig.until(lambda: rig.tally.failures.total() > failures)  # one or two seconds later
        assert rig.tally.rounds <= rounds + 3


@pytest.mark.slow
async def test_a_whale_that_returns_while_the_mempool_request_fails_is_pending_once_it_succeeds(
    tmp_path: Path,
) -> None:
    front = Front()
    async with (
        behind(front) as (sim, clock),
        watching(sim, clock, tmp_path, front=front, drop_after=1.0, interval=86_400.0) as rig,
    ):
        tx = await dropped_whale(rig)
        front.spoil("mempool/txids", 503)
        sim.world.send(tx)
        await rig.poll()
        await rig.until(lambda: rig.tally.failures.total() > 0)
        await rig.poll(70)
        assert rig.statuses(tx.txid) == ["alert", "dropped"]
        front.restore()
        await later(rig, 1)
        await rig.until(lambda: rig.statuses(tx.txid) == ["alert", "dropped", "pending"])


@pytest.mark.parametrize(
    "answer",
    [
        "another shape",
        "nested",
        *(pytest.param(answer, marks=pytest.mark.slow) for answer in ("broken", "garbage", "null")),
    ],
)
@pytest.mark.parametrize(
    "path", ["tx/[0-9a-f]+", "tx/[0-9a-f]+/rbf", "tx/[0-9a-f]+/status", "mempool/txids", "replacements"]
)
async def test_one_failing_call_does_not_delay_the_others(tmp_path: Path, path: str, answer: str) -> None:
    status, body, _ = ANSWERS[answer]
    front = Front()
    async with behind(front) as (sim, clock):
        there = sim.world.pay(150 * BTC).txid
        await sim.poll()
        front.spoil(path, status, body)
        async with watching(sim, clock, tmp_path, settled=False, front=front) as rig:
            await rig.until(lambda: rig.tally.snapshots == 1)
            known, left = (sim.world.pay(150 * BTC).txid for _ in range(2))
            await rig.poll()
            await rig.until(lambda: {known, left} <= rig.sources().keys())
            sim.world.chain.evict(left)
            block = sim.world.mine(only=[known])
            for _ in range(3):
                await rig.poll(70)
                await rig.processed()
            await rig.until(lambda: rig.statuses(known) == ["alert", "confirmed"])
            await rig.until(lambda: rig.tally.covers.total() == 1)
            assert block.height in await rig.scans()
            await rig.until(lambda: rig.tally.failures.total() > 0)
            front.restore()
            await later(rig, 4)
            assert rig.statuses(known) == ["alert", "confirmed"]
            assert rig.statuses(there) == ["alert"]


@pytest.mark.slow
async def test_a_whale_that_cannot_be_fetched_does_not_delay_the_others(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock):
        stuck = sim.world.pay(150 * BTC, rate=400.0).txid
        others = [sim.world.pay(150 * BTC).txid for _ in range(5)]
        await sim.poll()
        front.spoil(f"tx/{stuck}", 500)
        async with watching(sim, clock, tmp_path, settled=False, front=front) as rig:
            await rig.until(lambda: rig.sources().keys() == set(others))
            await rig.until(lambda: rig.tally.open["whales"] == 1)
            hidden = sim.world.pay(150 * BTC, relay=False)
            sim.world.mine([hidden], only=())
            await rig.poll()
            await rig.until(lambda: rig.statuses(hidden.txid) == ["alert", "confirmed"])
            front.restore()
            await later(rig)
            assert rig.statuses(stuck) == ["alert"]


@pytest.mark.slow
async def test_a_block_that_cannot_be_read_does_not_delay_the_others(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock):
        async with watching(sim, clock, tmp_path, front=front):
            pass
        blocks = []
        whales = []
        for _ in range(9):
            whales.append(sim.world.pay(150 * BTC, relay=False))
            blocks.append(sim.world.mine([whales[-1]]))
        await sim.poll()
        for place in (8, 7, 6, 3):
            front.spoil(f"block/{blocks[place].hash}/summary", 500)
        async with watching(sim, clock, tmp_path, settled=False, front=front) as rig:
            await rig.until(lambda: rig.tally.open["blocks"] == 4)
            assert rig.sources().keys() == {whales[place].txid for place in (0, 1, 2, 4, 5)}
            front.restore()
            await later(rig)
            assert rig.sources().keys() == {tx.txid for tx in whales}
            assert await rig.chain_is_scanned(blocks[0].height)


async def test_a_whale_of_a_block_that_the_backend_does_not_find_is_requested_until_it_does(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front) as rig:
        hidden = [sim.world.pay(150 * BTC, relay=False) for _ in range(2)]
        known = sim.world.pay(150 * BTC).txid
        await rig.settled()
        front.spoil("block/[0-9a-f]+/txs/.*", 200, b"[]")
        front.spoil(f"tx/{hidden[0].txid}", 404)
        block = sim.world.mine(hidden)
        await rig.poll()
        await rig.until(lambda: rig.statuses(hidden[1].txid) == ["alert", "confirmed"])
        assert rig.statuses(known) == ["alert", "confirmed"]
        await rig.until(lambda: rig.tally.failures[RestFailure.INCOMPLETE] > 0)
        assert block.height not in await rig.scans()
        front.restore()
        await later(rig)
        assert rig.statuses(hidden[0].txid) == ["alert", "confirmed"]
        assert block.height in await rig.scans()


async def test_a_failed_response_and_its_error_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front) as rig:
        block = sim.world.mine([sim.world.pay(150 * BTC, relay=False)])
        front.spoil(f"block/{block.hash}/txs/.*", 200, GARBAGE)
        gc.collect()
        gc.disable()
        try:
            await rig.poll()
            await rig.until(lambda: rig.tally.failures[RestFailure.GARBAGE] > 0)
            assert [each for each in gc.get_objects() if isinstance(each, RestError)] == []
        finally:
            gc.enable()


async def test_invalid_block_hashes_undo_nothing(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front) as rig:
        whale = sim.world.pay(150 * BTC).txid
        await rig.settled()
        sim.world.mine()
        await rig.settled()
        for status, body in ((404, b""), (200, GARBAGE), (200, b""), (204, b""), (200, b"00")):
            front.restore()
            front.spoil("block-height/.*", status, body)
            sim.world.mine()
            await rig.poll(70)
            before = rig.tally.failures.total()
            await rig.poll(70)
            await rig.until(lambda before=before: rig.tally.failures.total() > before)  # type: ignore[misc]
        assert rig.statuses(whale) == ["alert", "confirmed"]
        assert rig.tally.reorgs == []


async def test_a_backend_without_these_calls_is_logged_once_and_requested_at_intervals(tmp_path: Path) -> None:
    """As in esplora mode at the backend's own port: electrs has those routes."""
    front = Front()
    front.spoil("mempool/.*|tx/[0-9a-f]+(/status)?|block-height/.*|block/[0-9a-f]+/txs.*|blocks/tip/hash", 404)
    async with behind(front) as (sim, clock):
        there = sim.world.pay(150 * BTC).txid
        await sim.poll()
        with structlog.testing.capture_logs() as lines:
            async with watching(sim, clock, tmp_path, settled=False, front=front) as rig:
                await rig.until(lambda: rig.tally.snapshots == 1)
                whale = sim.world.pay(150 * BTC).txid
                await rig.poll()
                for _ in range(50):
                    await rig.processed()
                sim.world.mine()
                await rig.poll()
                await rig.until(lambda: rig.statuses(whale) == ["alert", "confirmed"])
                assert rig.statuses(there) == []
                assert rig.tally.failures.keys() == {RestFailure.NOT_FOUND}
                assert front.times("block-height/.*") < 10
                # The block with the whale is still to be scanned: nothing is given up.
                assert (rig.tally.open["whales"], rig.tally.open["blocks"]) == (0, 1)
        warnings = [line for line in lines if line["event"] == "backfill_request_failed"]
        assert len(warnings) == 1
        assert "block-height" in warnings[0]["problem"]


async def test_a_retry_after_of_the_server_is_honoured(tmp_path: Path) -> None:
    front = Front()
    async with behind(front) as (sim, clock), watching(sim, clock, tmp_path, front=front) as rig:
        front.spoil(".*", 429, b"", **{"Retry-After": "300"})
        sim.world.mine()
        await rig.poll()
        await rig.until(lambda: rig.tally.failures[RestFailure.RATE_LIMITED] == 1)
        requested = len(front.requested)
        for _ in range(4):
            await rig.poll(70)
        assert len(front.requested) == requested
        front.restore()
        await later(rig)
        assert rig.tally.open["blocks"] == 0
        assert len(await rig.scans()) == 1


async def test_invalid_txids_in_the_stream_do_no_harm(tmp_path: Path) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path) as rig:
        strange = "../" * 21 + "%"
        added = {"txid": strange, "version": 2, "vin": [], "vout": [{"value": 150 * BTC, "scriptpubkey": ""}]}
        await rig.inject_delta(removed=[strange], mined=[strange], added=[added])
        await rig.settled()
        await later(rig)
        assert rig.statuses(strange) == ["alert"]


async def test_with_the_basis_moved_a_snapshot_alerts_the_same_whales_as_the_stream(tmp_path: Path) -> None:
    async with world() as (sim, clock):
        whale = sim.world.pay(150 * BTC).txid
        await sim.poll()
        moved = sim.truth[whale].moved_sat
        detection = DetectionSettings(basis=Basis.MOVED, threshold_btc=moved / BTC)
        async with watching(sim, clock, tmp_path, detection=detection) as rig:
            assert rig.statuses(whale) == ["alert"]
        detection = DetectionSettings(basis=Basis.MOVED, threshold_btc=(moved + 1) / BTC)
        async with watching(sim, clock, tmp_path / "..", detection=detection) as rig:
            assert rig.statuses(whale) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", [RestMode.TIMEOUT, RestMode.SLOW])
async def test_a_request_that_times_out_is_repeated(tmp_path: Path, mode: RestMode) -> None:
    async with world() as (sim, clock), watching(sim, clock, tmp_path, rest_timeout=0.3) as rig:
        known = sim.world.pay(150 * BTC).txid
        await rig.settled()
        sim.fail_rest(mode, seconds=1.0, times=2)
        hidden = sim.world.pay(150 * BTC, relay=False)
        sim.world.mine([hidden])
        await rig.poll()
        await rig.until(lambda: rig.tally.failures[RestFailure.TIMEOUT] > 0)
        assert rig.statuses(hidden.txid) == []
        await later(rig, 3)
        await rig.until(lambda: rig.statuses(hidden.txid) == ["alert", "confirmed"])
        assert rig.statuses(known) == ["alert", "confirmed"]
