"""`whaled run` as a child process, started as an operator starts it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from websockets.asyncio.client import connect

from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings

# The limit for a process that imports everything and opens a database, while other tests run on the machine.
START_LIMIT_S = 120


class Daemon:
    """A running daemon: its addresses, its log lines and its exit status."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.url = ""
        self.http = ""
        self._changed = asyncio.Condition()
        self._ended = asyncio.Event()

    async def listen(self) -> None:
        """Collect log lines until the process ends."""
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            text = raw.decode().rstrip("\n")
            self.raw.append(text)
            if text.startswith("{"):
                async with self._changed:
                    self.lines.append(json.loads(text))
                    self._changed.notify_all()
        self._ended.set()
        async with self._changed:
            self._changed.notify_all()

    async def heard_all(self) -> None:
        """Wait until the process has ended and all its log lines are read."""
        async with asyncio.timeout(START_LIMIT_S):
            await self._ended.wait()

    async def logged(self, event: str, *, times: int = 1, **fields: Any) -> dict[str, Any]:
        """Wait until a log line has appeared `times` times. Returns the first one."""
        async with asyncio.timeout(START_LIMIT_S), self._changed:
            while True:
                found = [
                    line
                    for line in self.lines
                    if line["event"] == event and all(line.get(key) == value for key, value in fields.items())
                ]
                if len(found) >= times:
                    return found[0]
                if self._ended.is_set():
                    raise AssertionError("whaled ended:\n" + "\n".join(self.raw))
                await self._changed.wait()

    def connect(self, **options: Any) -> connect:
        """Return a client of the `websockets` library."""
        return connect(self.url, proxy=None, compression=None, **options)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def ended(self, within_s: float = START_LIMIT_S) -> int:
        """Wait for the end of the process and return its exit status."""
        async with asyncio.timeout(within_s):
            return await self.process.wait()


def write_config(directory: Path, upstream: str, /, **sections: Mapping[str, object]) -> Path:
    """Write a configuration with all listeners on loopback and port 0; keys in `sections` override it."""
    config: dict[str, dict[str, object]] = {
        "upstream": {"url": upstream, "reconnect_initial": "50ms", "reconnect_max": "200ms"},
        "eventlog": {"path": str(directory / "whaled.db")},
        "gateway": {"port": 0},
        "auth": {"enabled": False},
        "http": {"port": 0, "render_interval": "1ms"},  # a test reads metrics that it has just changed
        "log": {"format": "json"},
    }
    for name, keys in sections.items():
        config.setdefault(name, {}).update(keys)
    path = directory / "whaled.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@asynccontextmanager
async def running(
    config: Path, *arguments: str, env: Mapping[str, str] | None = None, launcher: Sequence[str] = ()
) -> AsyncIterator[Daemon]:
    """Start the daemon and wait until it is ready; kill it on exit if it still runs."""
    async with starting(config, *arguments, env=env, launcher=launcher) as daemon:
        ready = await daemon.logged("daemon_ready")
        daemon.url = ready["listen"]
        daemon.http = ready["metrics"].removesuffix("/metrics") if ready["metrics"] else ""
        yield daemon


@asynccontextmanager
async def starting(
    config: Path, *arguments: str, env: Mapping[str, str] | None = None, launcher: Sequence[str] = ()
) -> AsyncIterator[Daemon]:
    """Start the daemon without waiting for it. `launcher` is a command that executes its arguments."""
    process = await asyncio.create_subprocess_exec(
        *launcher, sys.executable, "-m", "whaled", "run", "--config", str(config), *arguments,
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd=config.parent,
        env={"PATH": os.environ["PATH"], **(env or {})},
    )  # fmt: skip
    daemon = Daemon(process)
    listener = asyncio.create_task(daemon.listen())
    try:
        yield daemon
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await listener


def busy_simulator(**settings: Any) -> Simulator:
    """Return a simulator with whales every few milliseconds."""
    return Simulator(
        SimulatorSettings(
            seed=7, rate=60.0, whale_share=0.5, poll_interval=0.05, block_interval=2.0, port=0, **settings
        )
    )


async def get(url: str) -> str:
    async with aiohttp.ClientSession(trust_env=False) as session, session.get(url) as response:
        return await response.text()


async def metric(http: str, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(http + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


async def command(config: Path, *arguments: str) -> str:
    """Run a command of whaled as a process, which must succeed, and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaled", *arguments, "--config", str(config),
        stdout=asyncio.subprocess.PIPE, cwd=config.parent, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode().strip()
