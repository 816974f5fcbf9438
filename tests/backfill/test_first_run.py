"""The first run: when it began, and the blocks that were there."""

from pathlib import Path

from kit.whales import NOW
from whaled.backfill.first_run import (
    BLOCKS_LIMIT,
    FirstRun,
    began_at,
    blocks_at_start,
    chain_below,
)
from whaled.bookmarks import BEGAN_AT, FIRST_BLOCK
from whaled.config.sections import EventLogSettings
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.model import Block
from whaled.registry import Registry

A, B = "aa" * 32, "bb" * 32


def block(block_hash: str, height: int = 800_000) -> Block:
    return Block(height=height, hash=block_hash, previous_hash="00" * 32, timestamp=int(NOW))


async def test_a_first_start_in_the_future_is_corrected_to_the_tip_of_that_time(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), EventLogMeter(Registry())) as log:
        assert await began_at(log, NOW) == 0
        await log.keep(BEGAN_AT, NOW + 40 * 86_400)
        first_run = FirstRun(log)
        await first_run.store()
        first_run.observe([block(A, 800_001), block(B)])
        await first_run.store()
        assert await began_at(log, NOW + 41 * 86_400) == NOW + 40 * 86_400  # in the past: not corrected
        assert await began_at(log, NOW + 600) == NOW
        assert await began_at(log, NOW + 41 * 86_400) == NOW
        assert await began_at(log, NOW - 600) == NOW  # this clock is behind


async def test_a_first_start_in_the_future_is_corrected_to_now_if_no_tip_was_stored(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), EventLogMeter(Registry())) as log:
        await log.keep(BEGAN_AT, NOW + 40 * 86_400)
        assert await began_at(log, NOW) == NOW
        assert await began_at(log, NOW + 60) == NOW


async def test_the_blocks_of_the_first_start_are_stored_once_and_in_order(tmp_path: Path) -> None:
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "w.db")), EventLogMeter(Registry())) as log:
        reported = [block(f"{height:064x}", height) for height in range(20)]
        for blocks in (reported[::-1], reported[:3]):
            first_run = FirstRun(log)
            first_run.observe(blocks)
            first_run.observe(reported[:1])
            await first_run.store()
            assert await blocks_at_start(log) == reported[-BLOCKS_LIMIT:]
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "old.db")), EventLogMeter(Registry())) as log:
        await log.keep(FIRST_BLOCK, 7)  # a version that did not store the blocks had its first start
        first_run = FirstRun(log)
        first_run.observe(reported)
        await first_run.store()
        assert await blocks_at_start(log) == []


def test_the_chain_below_a_height_ends_at_the_first_gap() -> None:
    reported = [block(f"{height:064x}", height) for height in (3, 5, 6, 7, 8)]
    assert list(chain_below(reported, 8)) == [7, 6, 5]
    assert chain_below(reported, 10) == {}
    assert chain_below([block("", 7)], 8) == {}
