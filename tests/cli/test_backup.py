"""`whaled backup` and `whaled restore`: their reports."""

import asyncio
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit.backups import (
    store,
    write,
)
from whaled.cli.main import main
from whaled.errors import ExitStatus


async def test_the_commands_report_their_results(path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epoch, _ = await store(path, 1, 2)
    capsys.readouterr()
    assert main(["backup", str(file), "--db-path", str(path)]) == ExitStatus.STOPPED
    said = capsys.readouterr()
    assert re.fullmatch(rf"{file}: 2 events, head 2, epoch {epoch}, \d+\.\d MiB, \d+\.\d s\n", said.out)
    assert said.err == ""
    assert main(["backup", str(file), "--db-path", str(path)]) == ExitStatus.CONFIG
    assert "with --force" in capsys.readouterr().err
    assert main(["backup", str(file), "--force", "--db-path", str(path)]) == ExitStatus.STOPPED
    capsys.readouterr()
    assert main(["restore", str(file), "--db-path", str(path)]) == ExitStatus.STOPPED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"the log that was there is now {path}.replaced-")
    assert lines[1] == f"{path}: 2 events, head 2, epoch {epoch}"
    assert lines[2].startswith("epoch kept: ")
    assert main(["restore", "/nowhere", "--db-path", str(path)]) == ExitStatus.CONFIG
    assert main(["backup", str(file), "--force", "--db-path", str(path.parent / "none")]) == ExitStatus.CONFIG
    write(file, b"x" * 5000)
    assert main(["restore", str(file), "--db-path", str(path)]) == ExitStatus.FAILED


@pytest.mark.slow
def test_a_terminal_sees_how_far_the_copy_is(path: Path, file: Path) -> None:
    asyncio.run(store(path, 1))
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        command = [sys.executable, "-m", "whaled", "backup", str(file), "--db-path", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=theirs, timeout=50)
        os.close(theirs)
        shown = screen.read(10_000).decode()
    assert re.search(r"\rcopying .*whaled\.db: +\d+ %", shown)
    assert shown.endswith("\r\x1b[K")
