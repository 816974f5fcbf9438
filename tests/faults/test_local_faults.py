"""Faults of the daemon's own machine: a disk that is full, read-only, slow or failing, and a wrong clock.

No event is lost or repeated. The full disk, and the one that is read-only at the start, are a tmpfs of 40 MiB that the
test mounts, which needs root. `disk.c`, preloaded into the daemon only, makes syncs slow, and makes syncs and writes of
the open database fail. libfaketime (Debian's package `faketime`) changes the daemon's clock; it leaves the monotonic
clock alone, as an NTP step does.
"""

import asyncio
import errno
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from faults.rig import Rig, rigged

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

FAILED = 1
DISK_MIB = 40
SHIM = Path(__file__).with_name("disk.c")


def missing(what: str) -> None:
    """Skip the test because a tool is missing, or fail where it is required (REQUIRE_FAULTS=1)."""
    if os.environ.get("REQUIRE_FAULTS") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system for one test."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "whaled-test", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        missing(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Fill the file system to the last byte."""
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
    """Wait until the daemon ends by itself; return its exit status and its log."""
    assert rig.daemon is not None
    process = rig.daemon
    await process.ended()
    await process.heard_all()
    return await rig.stop(), "\n".join(process.raw)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_full_disk_ends_whaled_and_no_event_is_lost_once_there_is_room(disk: Path, seed: int) -> None:
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
                status, log = await ended(rig)
                assert status == FAILED
                assert "database or disk is full" in log
                # systemd restarts whaled until an operator frees space.
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


async def test_whaled_does_not_start_on_a_read_only_disk_and_resumes_when_it_is_writable(disk: Path) -> None:
    """The daemon is stopped for the remount: the kernel remounts under open files only by itself, after an error."""
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
                status, log = await ended(rig)
                assert status == FAILED
                assert "Read-only file system" in log or "readonly database" in log
        finally:
            remount(disk, "rw")
        await rig.start()
        await rig.go(10)
        await rig.finish()


class Disk:
    """The disk of the event log, as the daemon sees it through disk.c."""

    def __init__(self, directory: Path, shim: Path) -> None:
        self._file = directory / "disk-faults"
        self.env = {"LD_PRELOAD": str(shim), "DISK_FAULTS": str(self._file), "DISK_FAULTS_UNDER": str(directory)}
        self.become()

    def become(self, *, sync_ms: int = 0, sync_errno: int = 0, write_errno: int = 0) -> None:
        """Set the faults from now on; without arguments the disk works."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{sync_ms} {sync_errno} {write_errno}\n")
        new.replace(self._file)


@pytest.fixture
def failing(tmp_path: Path) -> Disk:
    """Return a disk whose faults the test controls."""
    compiler = shutil.which("cc")
    if compiler is None:
        missing("needs a C compiler `cc` (Debian: gcc libc6-dev)")
    shim = tmp_path / "disk.so"
    subprocess.run(
        [str(compiler), "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True
    )
    return Disk(tmp_path, shim)


@pytest.mark.parametrize("seed", [1, 2])
async def test_slow_syncs_delay_events_and_lose_none(tmp_path: Path, failing: Disk, seed: int) -> None:
    async with rigged(tmp_path, "slow fsync", seed=seed) as rig:
        rig.env = failing.env
        await rig.go(10)
        await rig.start()
        for _ in range(20):
            slow_ms = rig.rng.randint(50, 600)
            failing.become(sync_ms=slow_ms)
            await rig.go(3, pace_s=rig.rng.uniform(0, slow_ms / 1000))
        await slow_commits(rig)
        failing.become()
        assert rig.counts.starts == 1
        assert (await rig.metrics()).total("whaled_eventlog_failures_total") == 0
        await rig.finish()


async def slow_commits(rig: Rig) -> None:
    """Wait until the daemon has had five commits that took longer than 50 ms."""

    async def has_slow() -> bool:
        seen = await rig.metrics()
        name = "whaled_eventlog_commit_seconds"
        return seen.get(f"{name}_count") - seen.get(f"{name}_bucket", le="0.05") >= 5

    await rig.until(has_slow)


BROKEN: dict[str, dict[str, int]] = {
    "fsync EIO": {"sync_errno": errno.EIO},
    "fsync ENOSPC": {"sync_errno": errno.ENOSPC},
    "write EIO": {"write_errno": errno.EIO},
    "write EROFS": {"write_errno": errno.EROFS},
    "write EDQUOT": {"write_errno": errno.EDQUOT},
}


@pytest.mark.parametrize("how", BROKEN)
async def test_disk_errors_under_the_open_log_end_whaled_and_lose_no_event(
    tmp_path: Path, failing: Disk, how: str
) -> None:
    async with rigged(tmp_path, f"disk fails, {how}") as rig:
        rig.env = failing.env
        await rig.go(10)
        await rig.start()
        await rig.go(10, pace_s=0.02)
        await rig.settle()
        for _ in range(3):
            is_over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(live(rig, is_over))
                failing.become(**BROKEN[how])
                status, log = await ended(rig)
                assert status == FAILED
                assert re.search("cannot (store|forget|rehearse)[a-z ]*: disk I/O error", log)
                is_over.set()
            failing.become()
            await rig.start()
            await rig.settle()
        await rig.finish()


def hold(database: Path, seconds: float) -> None:
    """Hold the database's write lock."""
    with closing(sqlite3.connect(database, isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        other.execute("ROLLBACK")


async def test_a_lock_held_for_too_long_ends_whaled_and_the_next_start_publishes_what_was_not_stored(
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


def library() -> str:
    """Return the path of libfaketime for programs with threads."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        missing("needs libfaketime (Debian: faketime)")
    return str(found[0])


class Clock:
    """The daemon's clock, with a settable offset to the machine's."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "offset"
        # The monotonic fix is for libraries without pthread_cond_clockwait. Here it would end every timed wait for
        # Python's global lock at once, and threads that compete for it would run 100 times slower.
        self.env = {
            "LD_PRELOAD": library(), "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }  # fmt: skip

    def step(self, seconds: float) -> None:
        """Set the offset, in seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+.1f}\n")
        new.replace(self._file)


@pytest.mark.parametrize("seed", [1, 2])
async def test_clock_steps_neither_lose_nor_repeat_an_event(tmp_path: Path, seed: int) -> None:
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


async def test_a_start_with_a_wrong_clock_removes_no_recent_events(tmp_path: Path) -> None:
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
    """Wait for an event that is stored with the time of the stepped clock."""
    async with asyncio.timeout(60):
        while True:
            await rig.go(pace_s=0.05)
            with closing(sqlite3.connect(f"file:{rig.database}?mode=ro", uri=True)) as db:
                (at,) = db.execute("SELECT at FROM events ORDER BY offset DESC LIMIT 1").fetchone()
            if abs(at - time.time() - seconds) < 3:
                return
