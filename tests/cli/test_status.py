"""`whaled status`, `clients`, `disconnect` and `reload` with a real daemon, and without one."""

import asyncio
import json
from pathlib import Path

import pytest

from kit import daemon
from whaled.cli.main import main


@pytest.mark.slow
async def test_the_commands_show_and_change_a_running_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")

    async def whaled(*words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, [*words, "--config", str(config)])
        return status, *capsys.readouterr()

    async with daemon.running(config) as process, process.connect() as client:
        await client.recv()
        status, out, _ = await whaled("status")
        assert status == 0
        assert f"process {process.process.pid}" in out
        _, out, _ = await whaled("clients")
        assert "127.0.0.1" in out
        _, out, _ = await whaled("clients", "--json")
        row = json.loads(out)
        assert (row["delivery"], row["filter"]) == ("live", "everything")
        assert await whaled("reload") == (0, f"reloaded by process {process.process.pid}\n", "")
        await process.logged("admin_act_finished", act="/v1/reload", outcome="done")
        _, out, _ = await whaled("status", "--json")
        assert json.loads(out)["last_reload_at"] is not None
        assert await whaled("disconnect", "--connection", str(row["connection"])) == (0, "closed 1 connection\n", "")
        status, _, err = await whaled("disconnect", "nobody")
        assert status == 1
        assert "no connection of this client is open" in err


@pytest.mark.parametrize("words", [["status"], ["clients"], ["disconnect", "c1"]])
def test_without_a_daemon_the_path_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([*words, "--db-path", str(tmp_path / "whaled.db")]) == 1
    assert f"no whaled listens on {tmp_path}/whaled.admin.sock: start it" in capsys.readouterr().err
