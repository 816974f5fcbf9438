"""A flood against the kernel's own limit: with shedding whaled lives through it, without it the kernel ends it.

The limit is a memory cgroup (version 1) around the real process: where there is none that can be written, this is
skipped. systemd's MemoryMax= is the same limit by version 2, whose files tests/ops/test_memory.py covers.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import daemon
from kit.daemon import metric
from kit.gateway import ask, receive_type, silent_client

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(120)]

MIB = 1024**2
LIMIT_MIB = 256
CLIENTS = 400


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit."""
    found = Path("/sys/fs/cgroup/memory") / f"whaled-test-{os.getpid()}"
    try:
        found.mkdir()
        (found / "memory.limit_in_bytes").write_text(str(LIMIT_MIB * MIB))
    except OSError as error:
        pytest.skip(f"no memory cgroup of version 1 that can be written: {error}")
    yield found
    with contextlib.suppress(OSError):
        found.rmdir()


def greedy_client(url: str) -> socket.socket:
    """Begins a message of almost 1 MiB and never ends it: whaled has to keep what it got."""
    sock = silent_client(url)
    size = MIB - 1
    try:
        sock.sendall(b"\x81" + bytes([0x80 | 127]) + size.to_bytes(8) + bytes(4) + b"x" * (size - 1))
    except OSError:
        sock.close()
        raise
    return sock


def config(directory: Path, **memory: object) -> Path:
    gateway = {"port": 0, "max_connections_per_address": 5000, "max_frame": "1MiB", "ping_interval": "60s"}
    return daemon.write_config(
        directory, "ws://127.0.0.1:1", gateway=gateway, memory=memory, backfill={"enabled": False}
    )


def inside(cgroup: Path) -> list[str]:
    """Puts a command into the cgroup from its start."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs")]


async def flooded(whaled: daemon.Daemon) -> list[socket.socket]:
    flood = []
    for _ in range(CLIENTS):
        try:
            flood.append(greedy_client(whaled.url))
        except OSError:  # refused, or whaled is gone
            break
        await asyncio.sleep(0.01)  # a flood of 100 MiB a second
    return flood


async def test_load_is_shed_before_the_kernel_ends_the_process(tmp_path: Path, cgroup: Path) -> None:
    async with daemon.running(
        config(tmp_path, limit=f"{LIMIT_MIB}MiB", shed_at=0.6), launcher=inside(cgroup)
    ) as whaled:
        async with whaled.connect(max_queue=None) as good:
            await receive_type(good, "welcome")
            flood = await flooded(whaled)
            try:
                await whaled.logged("load_shedding_started")
                for _ in range(20):
                    await ask(good, type="ping")
                    async with asyncio.timeout(10):
                        await receive_type(good, "pong")
                assert await metric(whaled.http, "whaled_memory_shedding") == 1
                assert await metric(whaled.http, "whaled_memory_used_bytes") < LIMIT_MIB * MIB
            finally:
                for sock in flood:
                    sock.close()
        assert whaled.process.returncode is None
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0


async def test_the_same_flood_without_shedding_is_ended_by_the_kernel(tmp_path: Path, cgroup: Path) -> None:
    async with daemon.running(config(tmp_path), launcher=inside(cgroup)) as whaled:
        flood = await flooded(whaled)
        try:
            assert await whaled.ended(within_s=60) == -signal.SIGKILL
        finally:
            for sock in flood:
                sock.close()
