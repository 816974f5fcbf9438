"""`whaled reload` ends as the reload did: it is what `systemctl reload whaled` waits for."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import pytest

from kit import daemon
from whaled.cli.main import main
from whaled.ops import reloads
from whaled.ops.reloads import Outcome


async def reload(*options: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaled", "reload", *options, env={"PATH": os.environ["PATH"], **(env or {})},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
async def test_the_command_ends_as_the_reload_did(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    good = config.read_text()
    async with daemon.running(config) as whaled:
        pid = whaled.process.pid
        config.write_text(good + "detection: {threshold_btc: 20000000}\n")
        assert await reload("--config", str(config)) == (0, f"reloaded by process {pid}\n", "")

        config.write_text(good.replace("port: 0", "port: 1", 1))
        (moved,) = [line for line in config.read_text().splitlines() if "port: 1" in line]
        status, out, err = await reload("--config", str(config))
        section = "gateway" if "gateway" in good.partition("port: 0")[0] else "http"
        assert (status, out) == (78, ""), moved
        assert err == (
            f"whaled: reload refused, the old configuration stays: {section}.port: "
            "cannot change while running: restart whaled to change it\n"
        )

        config.write_text(good.replace("whaled.db", "other.db"))
        status, _, err = await reload("--config", str(config))
        assert status == 78
        assert err == (
            f"whaled: no running whaled has {tmp_path}/other.db open (eventlog.path): is it running, and with this "
            "configuration? A changed eventlog.path requires a restart\n"
        )

        config.write_text(good + "detection: {threshold_btcs: 5}\n")  # by its process, the file is the daemon's to read
        status, _, err = await reload("--db-path", str(tmp_path / "whaled.db"))
        assert status == 78
        assert "reload refused, the old configuration stays: " in err
        assert "did you mean `threshold_btc`?" in err


@pytest.mark.slow
async def test_the_metrics_show_the_outcome_despite_a_long_render_interval(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", http={"render_interval": "10s"})
    good = config.read_text()
    async with daemon.running(config) as whaled, aiohttp.ClientSession(trust_env=False) as session:
        for text, status, value in (good, 0, 1.0), (good + "no: such section\n", 78, 0.0), (good, 0, 1.0):
            config.write_text(text)
            assert (await reload("--db-path", str(tmp_path / "whaled.db")))[0] == status
            async with session.get(whaled.http + "/metrics") as response:
                assert f"whaled_config_last_reload_successful {value}\n" in await response.text()


@pytest.mark.slow
async def test_under_systemd_a_changed_path_of_the_log_is_refused_with_the_daemons_text(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    env = {"STATE_DIRECTORY": str(tmp_path)}
    async with daemon.running(config, env=env) as whaled:
        config.write_text(config.read_text().replace("whaled.db", "other.db"))
        status, _, err = await reload("--pid", str(whaled.process.pid), env=env)
    assert status == 78
    assert err.endswith("eventlog.path: cannot change while running: restart whaled to change it\n")


@pytest.mark.slow
async def test_a_daemon_that_does_not_answer_or_ends_is_a_failure(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as whaled:
        pid = whaled.process.pid
        whaled.signal(signal.SIGSTOP)
        status, _, err = await reload("--config", str(config), "--timeout", "300ms")
        assert (status, err) == (
            1, f"whaled: no response from process {pid} within 0.3 s; its log reports the result of the reload\n",
        )  # fmt: skip
        whaled.signal(signal.SIGKILL)
        whaled.signal(signal.SIGCONT)
        await whaled.ended()
        status, _, err = await reload("--config", str(config))
        assert status == 78
        assert "no running whaled has " in err
        status, _, err = await reload("--pid", str(pid), "--config", str(config))
        assert (status, err) == (1, f"whaled: process {pid} did not reload: there is no such process\n")


async def test_no_signal_is_sent_to_a_process_that_is_not_whaled(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    for words in (["sleep", "60"], [sys.executable, "-c", "input()", "whaled"]):
        other = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.PIPE)
        try:
            status, _, err = await reload("--pid", str(other.pid), "--config", str(config))
            assert status == 78
            shown = " ".join(words)[:100]
            assert err == f"whaled: --pid {other.pid} is not `whaled run` but {shown!r}: no signal was sent\n"
            assert other.returncode is None
        finally:
            other.kill()
            await other.wait()
        assert other.returncode == -signal.SIGKILL


def test_only_the_outcome_of_this_reload_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last-reload.json"
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    sent: list[int] = []

    def kill(_pid: int, number: int) -> None:
        """Earlier reloads, those of other processes and of before a reboot are there; the one asked for comes last."""
        sent.append(number)
        now = time.monotonic()
        others = [Outcome(7, now - 60), Outcome(8, now), Outcome(7, now + 1e6), Outcome(7, now, "no")]
        reloads.write(path, others[min(len(sent), len(others)) - 1])

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr("whaled.cli.reload._require_daemon", lambda _pid: None)
    assert main(["reload", "--pid", "7", "--timeout", "20s"]) == 78
    assert sent == [signal.SIGHUP, 0, 0, 0]


def test_an_outcome_is_private_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    reloads.write(path, Outcome(1, 2.0, "\u00fc" * 1_000_000))
    assert path.stat().st_mode & 0o777 == 0o600
    found = reloads.read(path)
    assert found is not None
    assert found.problem is not None
    assert len(found.problem) == reloads.MAX_PROBLEM_CHARS
    for damaged in (b"", b"{", b'{"pid": "x"}', b"x" * (reloads.MAX_FILE_BYTES + 1)):
        path.write_bytes(damaged)
        assert reloads.read(path) is None


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_path_that_is_not_a_regular_file_is_no_outcome_and_does_not_block(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "o.json"
    reloads.write(tmp_path / "other.json", Outcome(1, 2.0))
    match kind:
        case "link":
            path.symlink_to(tmp_path / "other.json")
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    assert reloads.read(path) is None


def test_a_new_configuration_cannot_move_the_outcome_file() -> None:
    log = Path("/var/lib/x/w.db")
    assert reloads.outcome_path({"STATE_DIRECTORY": "/var/lib/whaled"}, log) == Path("/var/lib/whaled/last-reload.json")
    assert reloads.outcome_path({}, log) == Path("/var/lib/x/w.db.last-reload.json")
