"""Where the rules are, and Debian's Prometheus and Alertmanager as processes on loopback."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.paths import ROOT

DEPLOY = ROOT / "deploy" / "prometheus"
RECORDINGS = DEPLOY / "whaled.recording.rules.yml"
ALERTS = DEPLOY / "whaled.alerts.rules.yml"
# From the start of a process to its listening; they take a tenth of a second.
START_LIMIT_S = 20
# What Debian calls it, and what its makers do.
NAMES = {"alertmanager": ("prometheus-alertmanager", "alertmanager")}
PACKAGES = {"alertmanager": "prometheus-alertmanager", "amtool": "prometheus-alertmanager"}


def needed(tool: str) -> str:
    """Return the path of a tool; without it the test is skipped, or fails under REQUIRE_PROMETHEUS=1."""
    for name in NAMES.get(tool, (tool,)):
        path = shutil.which(name)
        if path is not None:
            return path
    reason = f"{tool} is not installed (Debian: apt-get install {PACKAGES.get(tool, 'prometheus')})"
    if os.environ.get("REQUIRE_PROMETHEUS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def rules_of(path: Path) -> list[dict[str, Any]]:
    """Return the rules of a file, in its order."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def free_port() -> int:
    """Return a port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def process(tool: str, *arguments: str, ready: str) -> AsyncIterator[None]:
    """Run a process until left, entered once it has logged `ready`."""
    started = await asyncio.create_subprocess_exec(
        needed(tool), *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said: list[str] = []
    is_ready = asyncio.Event()

    async def listen() -> None:
        assert started.stderr is not None
        async for line in started.stderr:
            said.append(line.decode())
            if ready in said[-1]:
                is_ready.set()
        is_ready.set()

    listener = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(START_LIMIT_S):
            await is_ready.wait()
        assert any(ready in line for line in said), "".join(said)
        yield
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await listener


@asynccontextmanager
async def alertmanager(directory: Path, config: dict[str, Any]) -> AsyncIterator[str]:
    """Run an Alertmanager on its own, and give its address."""
    path = directory / "alertmanager.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    arguments = (
        f"--config.file={path}", f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address={address}", "--cluster.listen-address=",
    )  # fmt: skip
    async with process("alertmanager", *arguments, ready="Listening on"):
        yield address


@asynccontextmanager
async def prometheus(directory: Path, config: dict[str, Any]) -> AsyncIterator[str]:
    """Run a Prometheus with an empty store, and give its address. Paths in `config` are relative to `directory`."""
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    arguments = (
        f"--config.file={path}", f"--storage.tsdb.path={directory / 'prometheus'}",
        f"--web.listen-address={address}", "--rules.alert.resend-delay=1s",
    )  # fmt: skip
    async with process("prometheus", *arguments, ready="Server is ready to receive web requests"):
        yield address
