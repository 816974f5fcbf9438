"""Clients of a daemon whose log was restored."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from kit import daemon
from kit.backups import (
    store,
    whaled,
)
from kit.gateway import ask, receive_type
from whaled.cli.main import main
from whaled.errors import ExitStatus

NO_UPSTREAM = "ws://127.0.0.1:9/api/v1/ws"


async def resume(config: Path, epoch: str, offset: int) -> tuple[dict[str, Any], daemon.Daemon]:
    """The answer of a daemon to a client that resumes, and the daemon as it was."""
    async with daemon.running(config) as running, running.connect() as client, asyncio.timeout(20):
        await ask(client, type="subscribe", since={"epoch": epoch, "offset": offset})
        return await receive_type(client, "subscribed"), running


@pytest.fixture
async def config(path: Path, tmp_path: Path) -> Path:
    await store(path, 1, 2, 3)
    return daemon.write_config(tmp_path, NO_UPSTREAM, eventlog={"path": str(path), "retention": "3650d"})


@pytest.mark.slow
async def test_a_client_resumes_after_a_restore_that_lost_nothing(config: Path, path: Path, file: Path) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    assert main(["restore", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    answer, _ = await resume(config, epoch, 2)
    assert answer["recovered"] is True
    assert answer["position"] == {"epoch": epoch, "offset": 3}


@pytest.mark.slow
@pytest.mark.parametrize("seen", [2, 3, 4, 5])
async def test_a_client_is_notified_after_a_restore_that_lost_events(
    config: Path, path: Path, file: Path, seen: int, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    await store(path, 4, 5)
    assert main(["restore", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    assert "new epoch: the replaced log continues to offset 5" in capsys.readouterr().out
    await store(path, 6, 7)  # the lost offsets are given again
    answer, _ = await resume(config, epoch, seen)
    assert answer["recovered"] is False
    assert answer["position"]["epoch"] != epoch
    assert answer["position"]["offset"] == 5


@pytest.mark.slow
async def test_a_client_is_notified_after_a_backup_was_copied_into_place(config: Path, path: Path, file: Path) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    shutil.copy(file, path)
    answer, running = await resume(config, epoch, 3)
    assert answer["recovered"] is False
    renewed = answer["position"]["epoch"]
    warning = await running.logged("eventlog_backup_adopted")
    assert (warning["level"], warning["epoch"], warning["head"]) == ("warning", renewed, 3)
    answer, running = await resume(config, renewed, 3)
    assert answer["recovered"] is True
    assert not any(line["event"] == "eventlog_backup_adopted" for line in running.lines)


@pytest.mark.slow
async def test_a_running_daemon_is_backed_up_and_cannot_be_restored(config: Path, path: Path, file: Path) -> None:
    async with daemon.running(config):
        done = await asyncio.to_thread(whaled, "backup", file, "--config", config)
        assert (done.returncode, done.stderr) == (ExitStatus.STOPPED, "")
        refused = await asyncio.to_thread(whaled, "restore", file, "--config", config)
        assert refused.returncode == ExitStatus.FAILED
        assert "has this event log open. Stop it" in refused.stderr
    assert await store(path, 4)
