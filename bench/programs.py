"""Child processes that read commands line by line and respond in JSON. They end with their stdin, or are killed."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ANSWER_LIMIT_S = 30.0
# The longest line is the load client's response: two numbers per message.
LINE_LIMIT = 1 << 22


class BrokenError(Exception):
    """The measurement is invalid: a message was lost, a count is wrong, or a process died."""


def compile_c(name: str, directory: Path) -> Path:
    """Compile `bench/<name>.c` into `directory`, unless it is there already. Raises BrokenError without a compiler."""
    program = directory / name
    if program.exists():
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise BrokenError("no C compiler `cc`: the load client is C (Debian: apt install gcc libc6-dev)")
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", program, HERE / f"{name}.c"], check=True, timeout=60)
    return program


class Program:
    """A running child process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    async def ask(self, line: str, within_s: float = ANSWER_LIMIT_S) -> dict[str, Any]:
        """Send a command and wait for its response."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        return await self.answer(within_s)

    async def answer(self, within_s: float = ANSWER_LIMIT_S) -> dict[str, Any]:
        """Read the next response. Raises BrokenError if there is none in time."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(within_s):
                line = await self.process.stdout.readline()
        except TimeoutError:
            raise BrokenError(f"{self.name} did not respond within {within_s:g} s") from None
        if not line:
            raise BrokenError(f"{self.name} ended; its output is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def running(name: str, *command: str | Path) -> AsyncIterator[Program]:
    """Run a child process, and kill it on exit."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_LIMIT
    )
    try:
        yield Program(name, process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise BrokenError(f"process {pid} has ended")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process so far, all threads, from the scheduler's accounting in nanoseconds."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text(encoding="utf-8").split()[0]) for thread in threads) / 1e9
