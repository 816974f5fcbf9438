"""A planned restart is told from a crash, over restarts, restores and a log that cannot be written."""

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from kit import daemon
from whaled.cli.main import main
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog.schema import STARTS_MARK
from whaled.metrics import Metrics
from whaled.ops.starts import Starts


class Memory:
    """The state of a log, without a log."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.is_full = False

    async def state(self, key: str) -> str | None:
        return self.kept.get(key)

    async def set_state(self, key: str, value: str) -> None:
        if self.is_full:
            raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)
        self.kept[key] = value


def counts(metrics: Metrics) -> tuple[float | None, float | None]:
    """Starts after a clean end, and after another."""
    clean, unclean = (
        metrics.registry.collectors.get_sample_value("whaled_starts_total", {"after": after})
        for after in ("clean", "unclean")
    )
    return clean, unclean


async def run(memory: Memory, *, ends: bool = True) -> tuple[float | None, float | None]:
    """One run of the daemon; what its metrics say once it is ready."""
    metrics = Metrics()
    starts = await Starts.recalled(memory, metrics.starts)
    await starts.began()
    if ends:
        await starts.ended()
    return counts(metrics)


async def test_starts_are_counted_by_how_the_run_before_ended() -> None:
    memory = Memory()
    assert await run(memory) == (1, 0)
    assert await run(memory, ends=False) == (2, 0)
    assert await run(memory, ends=False) == (2, 1)
    assert await run(memory) == (2, 2)
    assert await run(memory) == (3, 2)


async def test_counts_of_earlier_runs_are_there_before_this_one_is_ready() -> None:
    """A scrape in between must not see 0 and then all of them at once."""
    memory = Memory()
    await run(memory)
    await run(memory, ends=False)
    metrics = Metrics()
    await Starts.recalled(memory, metrics.starts)
    assert counts(metrics) == (2, 0)


async def test_a_log_that_cannot_be_written_does_not_prevent_a_run() -> None:
    memory = Memory()
    await run(memory)
    memory.is_full = True
    assert await run(memory) == (2, 0)


@pytest.mark.parametrize("damaged", ["", "{", '{"clean": "many"}', "[]"])
async def test_an_unreadable_record_counts_as_empty(damaged: str) -> None:
    memory = Memory()
    memory.kept[STARTS_MARK] = damaged
    assert await run(memory) == (1, 0)


@pytest.mark.slow
async def test_starts_are_counted_after_a_stop_a_kill_and_a_restore(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    backup = tmp_path / "backup.db"

    async def started(end: signal.Signals) -> list[str]:
        async with (
            daemon.running(config) as whaled,
            aiohttp.ClientSession(trust_env=False) as session,
            session.get(f"{whaled.http}/metrics") as response,
        ):
            text = await response.text()
            if not backup.exists():
                assert main(["backup", str(backup), "--config", str(config)]) == 0
            whaled.signal(end)
            await whaled.ended()
        return [line.partition(" ")[2] for line in text.splitlines() if line.startswith("whaled_starts_total{")]

    assert await started(signal.SIGTERM) == ["1.0", "0.0"]
    assert await started(signal.SIGKILL) == ["2.0", "0.0"]
    assert await started(signal.SIGTERM) == ["2.0", "1.0"]
    with closing(sqlite3.connect(backup)) as db:  # made while whaled ran
        assert db.execute("SELECT 1 FROM state WHERE key = ?", (STARTS_MARK,)).fetchone() is None
    assert main(["restore", str(backup), "--config", str(config)]) == 0
    assert await started(signal.SIGTERM) == ["1.0", "0.0"]
