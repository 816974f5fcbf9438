"""Whatever the daemon's own machine does: disk full, read-only, slow, clock wrong. Nothing is lost, nothing said twice.

A full disk and a read-only one are a tmpfs of 40 MiB mounted for the test (root). A slow disk is another program that
holds SQLite's write lock for some 100 ms again and again: to whoever waits for a commit that is what a slow fsync looks
like. Whether the kernel's own writeback is slow cannot be had without a device of its own. The clock is the daemon's
alone (libfaketime, package `faketime`), the machine's goes on as it does; monotonic time is left as it is, as an NTP
step leaves it.
"""

import asyncio
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from faults.kit import Rig, rigged

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(300)]

FAILED = 1
DISK_MIB = 40
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "whaled-test", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


async def live(rig: Rig, until: asyncio.Event, pace_s: float = 0.05) -> None:
    while not until.is_set():
        await rig.go(pace_s=pace_s)


async def ended(rig: Rig) -> tuple[int, str]:
    """How the daemon ended by itself, and all that it said."""
    assert rig.daemon is not None
    process = rig.daemon
    await process.ended()
    await process.heard_all()
    return await rig.stop(), "\n".join(process.raw)


@pytest.mark.parametrize("seed", [1, 2])
async def test_on_a_full_disk_whaled_ends_and_once_there_is_room_everything_is_told(disk: Path, seed: int) -> None:
    async with rigged(disk, "disk full", seed=seed) as rig:
        await rig.go(10)
        await rig.start()
        await rig.go(10, pace_s=0.02)
        await rig.settle()
        restarts = 0
        for _ in range(2):
            filler = fill(disk)
            is_over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(live(rig, is_over))
                status, said = await ended(rig)
                assert status == FAILED
                assert "database or disk is full" in said
                # What systemd does, until somebody makes room.
                for _ in range(3):
                    await rig.start(wait=False)
                    assert (await ended(rig))[0] == FAILED
                    restarts += 1
                is_over.set()
            filler.unlink()
            await rig.start()
            await rig.settle()
            await rig.go(15, pace_s=0.02)
            await rig.settle()
        await rig.finish(restarts=restarts)


async def test_on_a_disk_that_became_read_only_whaled_does_not_start_and_then_goes_on(disk: Path) -> None:
    """A kernel that remounts after an error does so under open files; by hand that is refused: the daemon is down."""
    async with rigged(disk, "read-only") as rig:
        await rig.go(10)
        await rig.start()
        await rig.go(10)
        await rig.settle()
        await rig.kill()
        remount(disk, "ro")
        try:
            for _ in range(2):
                await rig.go(5)
                await rig.start(wait=False)
                status, said = await ended(rig)
                assert status == FAILED
                assert "Read-only file system" in said or "readonly database" in said
        finally:
            remount(disk, "rw")
        await rig.start()
        await rig.go(10)
        await rig.finish()


def hold(database: Path, seconds: float) -> None:
    """Hold the write lock."""
    with closing(sqlite3.connect(database, isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        other.execute("ROLLBACK")


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_disk_whose_every_write_takes_long_delays_and_loses_nothing(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    async with rigged(tmp_path, "slow commits", seed=seed) as rig:
        await rig.go(10)
        await rig.start()
        is_over = asyncio.Event()
        holds = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(live(rig, is_over))
            for _ in range(40):
                await asyncio.to_thread(hold, rig.database, rng.uniform(0.1, 0.5))
                await asyncio.sleep(rng.uniform(0, 0.05))
                holds += 1
            is_over.set()
        assert rig.counts.starts == 1
        assert (await rig.metrics()).total("whaled_eventlog_failures_total") == 0
        await rig.finish(holds=holds)


async def test_a_lock_held_for_too_long_ends_whaled_and_the_next_start_tells_what_was_not_stored(
    tmp_path: Path,
) -> None:
    async with rigged(tmp_path, "locked", sections={"eventlog": {"busy_timeout": "500ms"}}) as rig:
        await rig.go(10)
        await rig.start()
        await rig.settle()
        for _ in range(2):
            is_over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(live(rig, is_over))
                holding = tasks.create_task(asyncio.to_thread(hold, rig.database, 6.0))
                assert (await ended(rig))[0] == FAILED
                await holding
                is_over.set()
            await rig.start()
            await rig.settle()
        await rig.finish()


STEPS_S = (3_600.0, -3_600.0, 0.4, -0.4, 86_400.0 * 40, -86_400.0 * 40, 7.0, -7.0, 0.0)


class Clock:
    """The daemon's own, as far from the machine's as is said."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "offset"
        self.env = {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    def step(self, seconds: float) -> None:
        """From now on it is off by so much."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+.1f}\n")
        new.replace(self._file)


needs_faketime = pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime (apt: faketime)")


@needs_faketime
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_clock_that_steps_forward_and_back_loses_nothing_and_says_nothing_twice(
    tmp_path: Path, seed: int
) -> None:
    async with rigged(tmp_path, "clock steps", seed=seed) as rig:
        clock = Clock(tmp_path)
        clock.step(0)
        rig.env = clock.env
        await rig.go(10)
        await rig.start()
        await rig.settle()
        steps = list(STEPS_S)
        rig.rng.shuffle(steps)
        for seconds in steps:
            await rig.go(6, pace_s=0.03)
            clock.step(seconds)
            await followed(rig, seconds)
            await rig.go(6, pace_s=0.03)
            await rig.settle()
        clock.step(0)
        await followed(rig, 0)
        await rig.finish(steps=len(steps) + 1)


@needs_faketime
async def test_a_start_in_the_wrong_time_removes_nothing_that_is_young(tmp_path: Path) -> None:
    async with rigged(tmp_path, "started in the wrong time") as rig:
        clock = Clock(tmp_path)
        rig.env = clock.env
        for seconds in (3_600, 0, -3_600, 0):
            clock.step(seconds)
            await rig.go(5)
            await rig.start()
            await rig.go(10, pace_s=0.03)
            await rig.settle()
            await rig.kill()
        await rig.start()
        await rig.finish()


async def followed(rig: Rig, seconds: float) -> None:
    """Wait for an event that is stored with the new time."""
    async with asyncio.timeout(15):
        while True:
            await rig.go(pace_s=0.05)
            with closing(sqlite3.connect(f"file:{rig.database}?mode=ro", uri=True)) as db:
                (at,) = db.execute("SELECT at FROM events ORDER BY offset DESC LIMIT 1").fetchone()
            if abs(at - time.time() - seconds) < 3:
                return
