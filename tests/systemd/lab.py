"""A systemd that lab.sh boots in namespaces, and its interface for tests."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PROJECT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "lab.sh"
IMPOSSIBLE = 77
# The interval between two checks of a condition. Each check starts a process in the lab, which takes some 10 ms.
LOOK_EVERY_S = 0.05


class LabImpossibleError(Exception):
    """This machine cannot boot a lab; the message states the reason."""


class Lab:
    """A running lab. Paths are those inside the lab; `project` is the path of this project inside it."""

    def __init__(self, pid: str, project: Path) -> None:
        self.pid = pid
        self.project = project

    def path(self, inside: str) -> Path:
        """Return the path of a lab's file outside the lab. The path must not contain an absolute symbolic link."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def command(self, *argv: str) -> list[str]:
        """Return the command that runs `argv` inside the lab."""
        return [str(SCRIPT), "run", self.pid, *argv]

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as root. With `check`, a status other than 0 fails the test and shows the output.

        After `timeout` seconds timeout(1) inside the lab ends the program: killing nsenter would leave it running.
        """
        done = subprocess.run(
            self.command("timeout", "--kill-after=2", str(timeout), *argv),
            input=stdin, capture_output=True, text=True, check=False, timeout=timeout + 10,
        )  # fmt: skip
        if done.returncode == 124:
            raise AssertionError(f"not done after {timeout} s: {argv}\n{done.stdout}{done.stderr}")
        if check and done.returncode != 0:
            raise AssertionError(f"status {done.returncode}: {argv}\n{done.stdout}{done.stderr}")
        return done

    def sh(self, script: str, *args: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a shell script as root, with `args` as $1, $2, ..."""
        return self.run("bash", "-euo", "pipefail", "-c", script, "bash", *args, check=check, timeout=timeout)

    def until(self, condition: Callable[[], T], timeout: float = 30, what: str = "") -> T:
        """Wait until a condition returns a true value, and return that."""
        deadline = time.monotonic() + timeout
        while True:
            found = condition()
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"not after {timeout} s: {what or condition}")
            time.sleep(LOOK_EVERY_S)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file, and create its directories."""
        self.run("install", "-D", "-m", f"{mode:o}", "/dev/stdin", path, stdin=text)

    def systemctl(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run systemctl."""
        return self.run("systemctl", *argv, check=check, timeout=timeout)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        lines = self.systemctl("show", unit, "--property", ",".join(properties)).stdout.splitlines()
        return dict(line.split("=", maxsplit=1) for line in lines)

    def journal(self, unit: str, *args: str) -> list[dict[str, Any]]:
        """Return the log entries of a unit, and systemd's about it; `args` are passed to journalctl."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--unit", unit, "--output", "json", "--all", *args, check=False).stdout
        return [json.loads(line) for line in lines.splitlines()]

    def moment(self) -> str:
        """Return the current time as an argument for `journal`. After a cursor, systemd 252 skips the first match."""
        return f"--since=@{time.time():.6f}"


@contextmanager
def booted(directory: Path) -> Iterator[Lab]:
    """Boot a lab, and power it off on exit or when this process dies. Raises LabImpossibleError."""
    server = subprocess.Popen(
        [str(SCRIPT), "serve"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LAB_DIR": str(directory), "LAB_PROJECT": str(PROJECT)},
    )  # fmt: skip
    assert server.stdout is not None
    pid = server.stdout.readline().strip()
    if not pid:
        _, output = server.communicate()
        if server.returncode == IMPOSSIBLE:
            raise LabImpossibleError(output.strip())
        raise AssertionError(f"the lab did not boot (status {server.returncode}):\n{output}")
    try:
        yield Lab(pid, PROJECT)
    finally:
        _, output = server.communicate()  # lab.sh powers the lab off when its standard input is closed
    assert server.returncode == 0, output
