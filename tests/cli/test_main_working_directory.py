"""Commands in a working directory that is gone, or that the user may not enter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit.daemon import write_config
from whaled.auth import keys

# `cd` into a directory, remove it, become the command.
IN_NOTHING = 'mkdir "$1" && cd "$1" && rmdir "$1" && shift && exec "$@"'


def run(directory: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", IN_NOTHING, "sh", str(directory / "gone"), sys.executable, "-m", "whaled", *arguments],
        capture_output=True, text=True, check=False, timeout=timeout_s, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    keys.generate(tmp_path / "keys.json", 1_800_000_000.0)
    return write_config(tmp_path, "ws://127.0.0.1:9/", auth={"enabled": True, "key_ring": str(tmp_path / "keys.json")})


@pytest.mark.slow
def test_commands_with_absolute_paths_work_without_a_working_directory(tmp_path: Path, config: Path) -> None:
    for arguments in (
        ("check-config", str(config)),
        ("token", "issue", "--config", str(config), "--client", "a"),
        ("keys", "list", "--config", str(config)),
    ):
        found = run(tmp_path, *arguments)
        assert (found.returncode, "Traceback" in found.stderr) == (0, False), found.stderr


@pytest.mark.slow
def test_the_daemon_starts_reloads_and_stops_without_a_working_directory(tmp_path: Path, config: Path) -> None:
    command = ["sh", "-c", IN_NOTHING, "sh", str(tmp_path / "gone"), sys.executable, "-m", "whaled", "run", "--config"]
    with subprocess.Popen(
        [*command, str(config)], stderr=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]}
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"event": "daemon_ready"' in line:
                process.send_signal(signal.SIGHUP)
            if '"event": "reload_' in line and '"reload_started"' not in line:
                process.terminate()
    assert process.returncode == 0, "".join(lines)
    assert any('"event": "reload_finished"' in line for line in lines)
    assert not any("Traceback" in line for line in lines)


NOTE = "whaled: note: the working directory is gone, so relative paths cannot be resolved: use absolute paths"


@pytest.mark.slow
def test_a_relative_path_is_named_without_a_working_directory(tmp_path: Path, config: Path) -> None:
    config.write_text(config.read_text().replace(str(tmp_path / "whaled.db"), "whaled.db"))
    line = next(number for number, text in enumerate(config.read_text().splitlines(), 1) if "whaled.db" in text)
    problem = "the working directory is gone, and this path is relative to it: use an absolute path"
    for command in (("check-config",), ("run", "--config")):
        found = run(tmp_path, *command, str(config))
        assert found.returncode == 78
        assert found.stderr.splitlines()[-2:] == [
            f"whaled: {config}:{line}: eventlog.path: found 'whaled.db': {problem}",
            NOTE,
        ]
    config.write_text("detection: {address_book: [/a.csv, b.csv]}\n")
    found = run(tmp_path, "check-config", str(config))
    assert found.stderr.splitlines() == [f"whaled: {config}:1: detection.address_book: found 'b.csv': {problem}", NOTE]
    found = run(tmp_path, "run", "--config", "whaled.yaml")
    assert found.returncode == 78
    assert found.stderr.splitlines() == [
        "whaled: whaled.yaml: cannot read it: there is no such file",
        NOTE,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "generate", "--key-ring", "keys.json"),
        ("backup", "backup.db"),
        ("check", "--db-path", "whaled.db"),
        ("token", "issue", "--client", "a", "--key-ring", "keys.json"),
        ("token", "issue", "--client", "a", "--output", "a.token"),
    ],
)
def test_no_command_with_a_relative_path_ends_in_a_traceback(
    tmp_path: Path, config: Path, arguments: tuple[str, ...]
) -> None:
    found = run(tmp_path, *arguments, "--config", str(config))
    assert found.returncode == 78, found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1] == NOTE


@pytest.mark.slow
def test_an_error_that_is_about_no_file_has_no_note(tmp_path: Path, config: Path) -> None:
    config.write_text("detection: {min_btc: -1}\n")
    found = run(tmp_path, "check-config", str(config))
    assert found.returncode == 78
    assert [line for line in found.stderr.splitlines() if "working directory" in line] == []
