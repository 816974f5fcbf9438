"""The pure parts of the backfill, and the queries of the event log that it uses."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from kit.whales import NOW, alert_draft, txid, whale
from whaled.backfill import seen_txids
from whaled.backfill.coverage import INTERRUPTIONS_LIMIT, Cover, Interruptions, Sighting, covers, scan_of
from whaled.backfill.first_run import (
    BEGAN_KEY,
    BLOCKS_LIMIT,
    FIRST_KEY,
    FirstRun,
    began_at,
    blocks_at_start,
    chain_below,
)
from whaled.backfill.mempool import Candidate
from whaled.backfill.seen_txids import SeenTxids
from whaled.backoff import INITIAL_S, MAX_RETRY_AFTER_S, MAX_S, Backoff
from whaled.config.sections import EventLogSettings
from whaled.errors import EventLogError
from whaled.eventlog.store import EventLog
from whaled.model import Block, Kind, Scan, Transaction, Whale
from whaled.ops.metrics import Metrics
from whaled.sources.mempool_space.dialect import Stripped
from whaled.sources.mempool_space.rbf import Tree, relatives
from whaled.whales import lifecycle
from whaled.whales.lifecycle import Origin, Step, next_event

A, B = "aa" * 32, "bb" * 32


def block(block_hash: str, height: int = 800_000) -> Block:
    return Block(height=height, hash=block_hash, previous_hash="00" * 32, timestamp=int(NOW))


def ids(whales: Iterable[Whale]) -> list[str]:
    return [each.alert.transaction_id for each in whales]


class Time:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- backoff ---


def test_a_failing_key_waits_longer_each_time_up_to_a_maximum() -> None:
    time = Time()
    backoff = Backoff(time)
    waits = [backoff.failed("x") for _ in range(10)]
    assert waits[:3] == [INITIAL_S, 2 * INITIAL_S, 4 * INITIAL_S]
    assert waits[-1] == MAX_S
    assert not backoff.is_due("x")
    assert backoff.is_due("y")
    assert backoff.next_due() == time.now + MAX_S
    time.now += MAX_S
    assert backoff.is_due("x")


def test_a_retry_after_is_honoured_up_to_a_maximum() -> None:
    backoff = Backoff(Time())
    assert backoff.failed("x", 30.0) == 30.0
    assert backoff.failed("x", 1e9) == MAX_RETRY_AFTER_S
    assert backoff.failed("y", 0.0) == INITIAL_S


def test_keys_that_succeeded_or_are_no_longer_wanted_are_forgotten() -> None:
    backoff = Backoff(Time())
    for key in "xyz":
        backoff.failed(key)
    assert backoff.forget("x")
    assert not backoff.forget("x")
    backoff.retain(["z", "w"])
    assert backoff.is_due("y")
    assert not backoff.is_due("z")
    backoff.retain([])
    assert backoff.next_due() is None
    assert backoff.failed("z") == INITIAL_S


# --- coverage ---


def test_a_missed_whale_is_attributed_to_an_outage_first_and_to_a_gap_second() -> None:
    interruptions = Interruptions()
    interruptions.was_down(100.0, 200.0)
    interruptions.gap(300.0)
    assert interruptions.why_missed(150.0, 160.0) is Cover.DOWN
    assert interruptions.why_missed(50.0, 100.0) is Cover.DOWN
    assert interruptions.why_missed(200.0, 350.0) is Cover.DOWN
    assert interruptions.why_missed(201.0, 350.0) is Cover.GAP
    assert interruptions.why_missed(301.0, 350.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(201.0, 299.0) is Cover.NEVER_RELAYED


def test_an_outage_lasts_until_the_link_is_up_however_often_it_is_reported() -> None:
    interruptions = Interruptions()
    interruptions.connected(5.0)  # nothing was lost
    interruptions.lost(10.0)
    interruptions.lost(20.0)
    assert interruptions.why_missed(0.0, 9.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(0.0, 10.0) is Cover.DOWN
    assert interruptions.why_missed(1000.0, 1001.0) is Cover.DOWN
    interruptions.connected(30.0)
    assert interruptions.why_missed(15.0, 16.0) is Cover.DOWN
    assert interruptions.why_missed(31.0, 32.0) is Cover.NEVER_RELAYED


def test_outages_and_gaps_are_remembered_within_bounds() -> None:
    interruptions = Interruptions()
    for number in range(INTERRUPTIONS_LIMIT + 1):
        interruptions.was_down(10.0 * number, 10.0 * number + 1)
        interruptions.gap(10.0 * number + 5)
    assert interruptions.why_missed(0.0, 5.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(10.0, 10.0) is Cover.DOWN
    assert interruptions.why_missed(15.0, 15.0) is Cover.GAP


def test_the_row_of_a_block_counts_its_whales_and_gives_the_median_lead() -> None:
    sightings = [Sighting(lead) for lead in (10.0, 30.0, 20.0, -3.0, 0.0, None)]
    assert covers(sightings, Cover.GAP) == [Cover.SEEN] * 3 + [Cover.LATE] * 2 + [Cover.GAP]
    row = scan_of(7, A, NOW, NOW + 1, sightings, Cover.GAP)
    assert row == Scan(
        height=7, hash=A, mined_at=NOW, scanned_at=NOW + 1, seen=3, late=2, missed_down=0, missed_gap=1,
        missed_never_relayed=0, lead_s=20.0,
    )  # fmt: skip
    assert scan_of(7, A, NOW, NOW, [], Cover.DOWN).lead_s is None
    assert scan_of(7, A, NOW, NOW, [Sighting(None)], Cover.DOWN).missed_down == 1
    assert scan_of(7, A, NOW, NOW, [Sighting(None)], Cover.NEVER_RELAYED).missed_never_relayed == 1


# --- the mempool ---


def test_a_comparison_finds_unexamined_transactions_and_forgets_those_that_left() -> None:
    seen = SeenTxids()
    seen.add(txid(n) for n in range(4))
    assert seen.compare(txid(n) for n in range(2, 6)) == [txid(4), txid(5)]
    assert [n for n in range(6) if txid(n) in seen] == [2, 3]
    seen.discard([txid(2), txid(7)])
    assert seen.compare([txid(2), txid(3)]) == [txid(2)]
    assert len(seen) == 1


def test_examined_transactions_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_txids, "SEEN_LIMIT", 100)
    seen = SeenTxids()
    for n in range(1_000):
        seen.add([txid(n)])
        assert len(seen) <= 100


def test_seen_txids_give_memory_back_when_the_mempool_empties() -> None:
    seen = SeenTxids()
    seen.add(txid(n) for n in range(20_000))
    full = seen.table_bytes
    seen.discard(txid(n) for n in range(1_000, 20_000))
    assert len(seen) == 1_000
    assert seen.table_bytes < full / 8
    seen.add(txid(n) for n in range(20_000))
    seen.compare([txid(1)])
    assert seen.table_bytes < full / 100


@pytest.mark.parametrize(("snapshot", "fee"), [(0.0, 192), (-1.0, 192), (None, 192), (190.0, 190)])
def test_a_fee_of_zero_in_a_snapshot_does_not_override_that_of_the_transaction(
    snapshot: float | None, fee: int
) -> None:
    stripped = Stripped(txid=A, fee=snapshot, vsize=192.0, value=150 * 10**8)
    fetched = Transaction(txid=A, inputs=(), outputs=(), fee_sat=192, vsize=192.0)
    assert Candidate.of(stripped).completing(fetched).fee_sat == fee


# --- RBF trees ---


def test_an_rbf_tree_is_read_from_its_root() -> None:
    raw = {
        "tx": {"txid": txid(1), "value": 5, "time": None},
        "time": 30,
        "replaces": [
            {"tx": {"txid": txid(2), "value": 4, "time": 20}, "time": 21, "replaces": []},
            {"tx": {"txid": txid(3)}, "time": 10, "replaces": [{"tx": {"txid": txid(4), "value": 3}, "replaces": []}]},
        ],
    }
    found = {each.txid: (each.value, each.seen, each.replaced_by) for each in relatives(msgspec.convert(raw, Tree))}
    assert found == {
        txid(1): (5, 30, None),
        txid(2): (4, 20, txid(1)),
        txid(3): (None, 10, txid(1)),
        txid(4): (3, None, txid(3)),
    }


def test_a_transaction_below_itself_in_an_rbf_tree_is_not_replaced_by_itself() -> None:
    raw = {"tx": {"txid": txid(1)}, "replaces": [{"tx": {"txid": txid(1)}, "replaces": [{"tx": {"txid": txid(2)}}]}]}
    replaced = [(each.txid, each.replaced_by) for each in relatives(msgspec.convert(raw, Tree))]
    assert replaced == [(txid(1), None), (txid(1), None), (txid(2), txid(1))]


# --- the event log ---


async def test_the_log_returns_histories_and_confirmed_gone_and_scanned(tmp_path: Path) -> None:
    settings = EventLogSettings(path=str(tmp_path / "w.db"))
    async with EventLog.open(settings, Metrics().eventlog) as log:
        await log.append([alert_draft(number, at=NOW) for number in range(4)])
        await log.append(
            [
                lifecycle.confirmed(whale(0), block(A), NOW + 1),
                lifecycle.replaced(whale(1), txid(9), NOW + 2),
                lifecycle.dropped(whale(2), NOW + 3),
            ]
        )
        histories = await log.histories([txid(0), txid(3), txid(7)])
        assert histories == {txid(0): [Step(Kind.ALERT), Step(Kind.CONFIRMED, A)], txid(3): [Step(Kind.ALERT)]}

        assert ids(await log.confirmed_in(A)) == [txid(0)]
        assert ids(await log.confirmed_in(B)) == []
        assert list((await log.gone_since(NOW, 10)).items()) == [(txid(2), 2), (txid(1), 2)]
        assert await log.gone_since(NOW + 3, 10) == {txid(2): 2}
        assert await log.gone_since(NOW, 1) == {txid(2): 2}
        await log.append(
            [lifecycle.pending_again(whale(0), A, NOW + 4), lifecycle.pending_again(whale(2), "", NOW + 4)]
        )
        assert ids(await log.confirmed_in(A)) == []
        assert await log.gone_since(NOW, 10) == {txid(1): 2}
        history = (await log.histories([txid(0)]))[txid(0)]
        again = next_event(lifecycle.confirmed(whale(0), block(A), NOW), history, Origin.POLLED)
        assert again is not None
        await log.append([again])
        assert (await log.histories([txid(0)]))[txid(0)] == [*history, Step(Kind.CONFIRMED, A, 2)]
        assert ids(await log.confirmed_in(A)) == [txid(0)]
        rows = [scan_of(height, f"{height:064x}", NOW, NOW, [Sighting(1.5)], Cover.GAP) for height in (3, 1, 2)]
        for row in rows:
            await log.put_scan(row)
        assert await log.scans(1, 2) == [rows[1], rows[2]]
        await log.put_scan(scan_of(2, A, NOW, NOW, [], Cover.GAP))
        await log.forget_scan(1)
        await log.forget_scan(1)
        assert [(scan.height, scan.hash) for scan in await log.scans(0, 9)] == [(2, A), (3, rows[0].hash)]
        assert (await log.scans(3, 3))[0].lead_s == 1.5
    with pytest.raises(EventLogError):
        await log.scans(0, 1)


async def test_a_first_start_in_the_future_is_corrected_to_the_tip_of_that_time(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), Metrics().eventlog) as log:
        assert await began_at(log, NOW) == 0
        await log.set_state(BEGAN_KEY, str(NOW + 40 * 86_400))
        first_run = FirstRun(log)
        await first_run.store()
        first_run.observe([block(A, 800_001), block(B)])
        await first_run.store()
        assert await began_at(log, NOW + 41 * 86_400) == NOW + 40 * 86_400  # in the past: not corrected
        assert await began_at(log, NOW + 600) == NOW
        assert await began_at(log, NOW + 41 * 86_400) == NOW
        assert await began_at(log, NOW - 600) == NOW  # this clock is behind


async def test_a_first_start_in_the_future_is_corrected_to_now_if_no_tip_was_stored(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), Metrics().eventlog) as log:
        await log.set_state(BEGAN_KEY, str(NOW + 40 * 86_400))
        assert await began_at(log, NOW) == NOW
        assert await began_at(log, NOW + 60) == NOW


async def test_the_blocks_of_the_first_start_are_stored_once_and_in_order(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), Metrics().eventlog) as log:
        reported = [block(f"{height:064x}", height) for height in range(20)]
        for blocks in (reported[::-1], reported[:3]):
            first_run = FirstRun(log)
            first_run.observe(blocks)
            first_run.observe(reported[:1])
            await first_run.store()
            assert await blocks_at_start(log) == reported[-BLOCKS_LIMIT:]
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "old.db")), Metrics().eventlog) as log:
        await log.set_state(FIRST_KEY, "7")  # a version that did not store the blocks had its first start
        first_run = FirstRun(log)
        first_run.observe(reported)
        await first_run.store()
        assert await blocks_at_start(log) == []


def test_the_chain_below_a_height_ends_at_the_first_gap() -> None:
    reported = [block(f"{height:064x}", height) for height in (3, 5, 6, 7, 8)]
    assert list(chain_below(reported, 8)) == [7, 6, 5]
    assert chain_below(reported, 10) == {}
    assert chain_below([block("", 7)], 8) == {}
