"""Memory: the kernel's numbers read, load shed before they reach the limit, and given up again."""

import asyncio
import gc
import json
import math
import platform
import resource
import signal
import socket
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import pytest
import yaml
from websockets.exceptions import InvalidHandshake, InvalidStatus

from kit import daemon
from kit.daemon import busy_simulator, metric
from kit.gateway import UPGRADE, ask, receive_type, running_gateway, silent_client
from whaled.config.sections import MemorySettings
from whaled.gateway.pages import KEPT_BYTES
from whaled.ops.memory import PAGE_BYTES, Gauge
from whaled.ops.memory_watch import MemoryMeter, MemoryWatch
from whaled.registry import Registry

MIB = 1024**2


class Kernel:
    """A directory that looks like /proc/self and a cgroup of version 2."""

    def __init__(self, root: Path, *, cgroup: bool = True) -> None:
        self.proc = root / "proc"
        self.cgroups = root / "cgroup"
        self._unit = self.cgroups / "system.slice" / "whaled.service"
        self.proc.mkdir()
        (self.proc / "cgroup").write_text("0::/system.slice/whaled.service\n")
        self.resident(60 * MIB)
        if cgroup:
            self._unit.mkdir(parents=True)
            self.limits("max", "max")
            self.charged(0, 0)

    def resident(self, size_bytes: int) -> None:
        (self.proc / "statm").write_text(f"100000 {size_bytes // PAGE_BYTES} 1000 1 0 30000 0\n")

    def limits(self, maximum: str, high: str) -> None:
        (self._unit / "memory.max").write_text(maximum + "\n")
        (self._unit / "memory.high").write_text(high + "\n")

    def charged(self, current: int, inactive_file: int) -> None:
        (self._unit / "memory.current").write_text(f"{current}\n")
        (self._unit / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive_file}\nactive_file 3\n")

    def gauge(self) -> Gauge:
        return Gauge(self.proc, self.cgroups)


LARGE_BLOCKS = """
import sys
import weakref
from pathlib import Path
from whaled.ops.memory import keep_large_apart

def heap():
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    start, end = line.split()[0].split("-")
    return int(end, 16) - int(start, 16)

if sys.argv[1] == "apart":
    keep_large_apart()
bytes(8 << 20)  # freed at once: from now on glibc would put such blocks into the heap
before = heap()
kept = bytes(7 << 20)
print(heap() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc puts large blocks into its heap")
@pytest.mark.parametrize(("how", "is_in_heap"), [("as it is", True), ("apart", False)])
def test_large_blocks_are_kept_out_of_the_heap(how: str, is_in_heap: bool) -> None:
    child = subprocess.run(
        [sys.executable, "-c", LARGE_BLOCKS, how], check=True, capture_output=True, text=True, timeout=30
    )
    assert (int(child.stdout) >= 6 * MIB) is is_in_heap  # the heap may have had a little room


HEAPS = """
import ctypes, os, sys, threading
from whaled.ops.memory import share_heap

if sys.argv[1] == "shared":
    share_heap()
barrier = threading.Barrier(4)

def allocate():
    held = [bytes(1000) for _ in range(100)]  # what Python leaves to the C library: more than 512 bytes
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has heaps by thread")
@pytest.mark.parametrize(("how", "is_one"), [("as it is", False), ("shared", True)])
def test_all_threads_share_one_heap(how: str, is_one: bool) -> None:
    child = subprocess.run([sys.executable, "-c", HEAPS, how], check=True, capture_output=True, text=True, timeout=30)
    assert (child.stdout.count("<heap nr=") == 1) is is_one


COLLECTIONS = """
import gc, sys
import whaled.cli.main
from whaled.ops.memory import set_modules_apart

if sys.argv[1] == "apart":
    set_modules_apart()
gc.collect()
print(len(gc.get_objects()))
"""


FULL_COLLECTIONS = """
import gc, sys
from whaled.ops.memory import collect_all_seldom

if sys.argv[1] == "seldom":
    collect_all_seldom()
before = gc.get_stats()[2]["collections"]
kept = [[] for _ in range(300_000)]
print(gc.get_stats()[2]["collections"] - before, gc.get_stats()[1]["collections"] > 0)
"""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="it collects a part at a time")
@pytest.mark.parametrize(("how", "is_full"), [("as it is", True), ("seldom", False)])
def test_growth_triggers_no_full_garbage_collection(how: str, is_full: bool) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL_COLLECTIONS, how], check=True, capture_output=True, text=True, timeout=30
    )
    full, young = child.stdout.split()
    assert (int(full) > 0) is is_full
    assert young == "True"


def test_a_garbage_collection_skips_modules() -> None:
    looked_at = {}
    for how in ("as it is", "apart"):
        child = subprocess.run(
            [sys.executable, "-c", COLLECTIONS, how], check=True, capture_output=True, text=True, timeout=60
        )
        looked_at[how] = int(child.stdout)
    assert looked_at["apart"] < looked_at["as it is"] / 20


def test_without_a_limit_resident_memory_is_what_is_used(tmp_path: Path) -> None:
    found = Kernel(tmp_path).gauge().read(None)
    assert (found.used_bytes, found.limit_bytes) == (60 * MIB, math.inf)


def test_a_limit_of_the_configuration_counts_resident_memory(tmp_path: Path) -> None:
    found = Kernel(tmp_path, cgroup=False).gauge().read(500 * MIB)
    assert (found.used_bytes, found.limit_bytes) == (60 * MIB, 500 * MIB)


def test_a_limited_cgroup_counts_its_memory_without_droppable_file_pages(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.limits(str(1024 * MIB), str(768 * MIB))
    kernel.charged(400 * MIB, 100 * MIB)
    found = kernel.gauge().read(None)
    assert (found.used_bytes, found.limit_bytes) == (300 * MIB, 768 * MIB)  # beyond `high` the process is slowed down
    assert kernel.gauge().read(256 * MIB).limit_bytes == 256 * MIB
    assert kernel.gauge().read(2048 * MIB).limit_bytes == 768 * MIB


def test_this_process_has_a_size() -> None:
    found = Gauge().read(None)
    assert 10 * MIB < found.used_bytes < 10_000 * MIB


def test_pages_of_files_are_no_anonymous_memory(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    assert kernel.gauge().read(None).anonymous_bytes == 60 * MIB - 1000 * PAGE_BYTES
    (kernel.proc / "statm").write_text("")  # unreadable
    assert kernel.gauge().read(None).anonymous_bytes == 0


def test_blocks_and_anonymous_memory_are_metrics_so_that_a_leak_can_be_told_from_fragmentation(tmp_path: Path) -> None:
    registry = Registry()
    meter = MemoryMeter(registry)
    value = registry.collectors.get_sample_value
    meter.observed(Kernel(tmp_path).gauge().read(None), is_shedding=False)
    assert value("whaled_memory_anonymous_bytes") == 60 * MIB - 1000 * PAGE_BYTES
    before = value("whaled_memory_allocated_blocks")
    assert before is not None
    held = [bytes(100) for _ in range(20_000)]
    after = value("whaled_memory_allocated_blocks")
    assert after is not None
    assert after - before >= 0.9 * len(held)


class Seen(MemoryMeter):
    """The metrics of memory, with the value that tests compare."""

    def __init__(self) -> None:
        self._registry = Registry()
        super().__init__(self._registry)

    @property
    def is_shedding(self) -> bool:
        return self._registry.collectors.get_sample_value("whaled_memory_shedding") == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to return memory")
async def test_free_memory_is_returned_to_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.ops.memory_watch.LOOK_S", 0.01)
    monkeypatch.setattr("whaled.ops.memory_watch.GIVE_BACK_S", 0.01)
    blocks = [bytes(20_000) for _ in range(4_000)]
    for block in range(4_000):
        if block % 8:
            blocks[block] = b""  # holes, which keep the heap as large as it is
    held = Gauge().read(None).used_bytes
    async with running_gateway(tmp_path) as rig:
        watch = MemoryWatch(MemorySettings(), rig.gateway, Seen(), Gauge())
        running = asyncio.create_task(watch.run())
        async with asyncio.timeout(20):
            while Gauge().read(None).used_bytes > held - 40 * MIB:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.01)
        running.cancel()
    assert len(blocks) == 4_000


@pytest.mark.slow
async def test_garbage_is_collected_before_load_is_shed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path) as rig:
        seen = Seen()
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.5), rig.gateway, seen, kernel.gauge())
        kernel.resident(101 * MIB)
        garbage = Cycle()
        gc.collect()  # it is among the oldest now
        weakref.finalize(garbage, kernel.resident, 90 * MIB)
        del garbage
        monkeypatch.setattr("whaled.ops.memory_watch.COLLECT_AGAIN_S", 0.0)
        watch.look()
        assert not seen.is_shedding
        kernel.resident(101 * MIB)
        monkeypatch.setattr("whaled.ops.memory_watch.COLLECT_AGAIN_S", 60.0)
        watch.look()
        assert seen.is_shedding


async def test_shedding_begins_at_its_share_of_the_limit_and_ends_below_it(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path) as rig, rig.connect() as early:
        seen = Seen()
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.5), rig.gateway, seen, kernel.gauge())
        told = []
        for size in (99, 101, 99, 97):
            kernel.resident(size * MIB)
            watch.look()
            told.append(seen.is_shedding)
            if seen.is_shedding:
                with pytest.raises(InvalidStatus) as refused:
                    await rig.connect()
                assert refused.value.response.status_code == 503
                assert refused.value.response.headers["Retry-After"]
        assert told == [False, True, True, False]
        async with rig.connect() as late:
            for client in (early, late):
                await receive_type(client, "welcome")
        assert rig.value("whaled_connections_refused_total", reason="memory") == 2
        assert rig.value("whaled_connections_shed_total") == 0


async def test_a_lower_share_applies_below_the_maximum_of_an_earlier_shedding(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path) as rig:
        seen = Seen()
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.7), rig.gateway, seen, kernel.gauge())
        shed = []
        for size, share in ((141, 0.7), (120, 0.7), (120, 0.7), (120, 0.5), (120, 0.5), (120, 0.7)):
            kernel.resident(size * MIB)
            watch.reconfigure(MemorySettings(limit=200 * MIB, shed_at=share))
            watch.look()
            shed.append(seen.is_shedding)
        assert shed == [True, False, False, True, True, False]


async def test_the_client_with_the_most_unsent_bytes_is_cut_off_first_and_loses_nothing(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path, max_unsent=4 * MIB) as rig, rig.connect(max_queue=None) as good:
        greedy = silent_client(rig.url, receive_buffer=4096)
        while not rig.gateway.roster.unsent_bytes:
            await rig.alerts(*range(rig.log.head + 1, rig.log.head + 201))
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.5), rig.gateway, Seen(), kernel.gauge())
        kernel.resident(101 * MIB)
        watch.look()
        assert rig.gateway.roster.unsent_bytes == 0
        assert rig.value("whaled_connections_shed_total") == 1
        kernel.resident(90 * MIB)
        watch.look()
        await ask(good, type="ping")
        await receive_type(good, "pong")
        greedy.close()
        async with rig.connect(max_queue=None) as again:
            await ask(again, type="subscribe", since={"last": rig.log.head})
            assert (await receive_type(again, "subscribed"))["recovered"] is True


async def test_urgent_shedding_closes_the_newest_clients_in_parts(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path) as rig:
        clients = [await rig.connect() for _ in range(40)]
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.5), rig.gateway, Seen(), kernel.gauge())
        kernel.resident(160 * MIB)
        watch.look()
        watch.look()
        async with asyncio.timeout(10):
            for client in clients[-4:]:
                await client.wait_closed()
        assert [client.close_code for client in clients[-4:]] == [1013] * 4
        await ask(clients[0], type="ping")
        await receive_type(clients[0], "pong")
        for client in clients:
            await client.close()


# It goes on. What the daemon keeps of it makes a flood of a thousand felt.
LARGE_REQUEST = UPGRADE.removesuffix(b"\r\n") + b"X-Long: " + bytes(b"x" * 12_000)


async def is_let_in(whaled: daemon.Daemon) -> bool:
    try:
        async with whaled.connect() as late:
            return bool(await receive_type(late, "welcome"))
    except (OSError, EOFError, InvalidHandshake):
        return False


@pytest.mark.slow
async def test_a_flood_of_connections_is_refused_while_existing_clients_go_on(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    limits = {
        "port": 0, "max_connections": 8000, "max_connections_per_address": 8000, "max_unauthenticated": 8000,
        "max_failed_connects": 8000,
    }  # fmt: skip
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url, gateway=limits)
        async with daemon.running(config) as whaled, whaled.connect(max_queue=None) as client:
            await receive_type(client, "whale_alert")
            resident = await metric(whaled.http, "process_resident_memory_bytes")
            start_mib = resident / MIB + 12
            settings = yaml.safe_load(config.read_text())
            settings["memory"] = {"limit": "256MiB", "shed_at": round(start_mib / 256, 4)}
            config.write_text(yaml.safe_dump(settings))
            whaled.signal(signal.SIGHUP)
            await whaled.logged("reload_finished")
            flood: list[socket.socket] = []
            try:
                async with asyncio.timeout(40):
                    while not await metric(whaled.http, "whaled_memory_shedding"):
                        # Only when the last ones are in: no more may come than can be accepted, or they are reset.
                        if await metric(whaled.http, "whaled_connections_unauthenticated") >= len(flood):
                            flood += [silent_client(whaled.url, request=LARGE_REQUEST) for _ in range(100)]
                assert await metric(whaled.http, "whaled_memory_used_bytes") < 1.3 * start_mib * MIB
                await receive_type(client, "whale_alert")  # what had queued up ...
                before = (await receive_type(client, "whale_alert"))["position"]["offset"]
                async with asyncio.timeout(10):
                    while (await receive_type(client, "whale_alert"))["position"]["offset"] < before + 20:
                        pass  # ... and what comes now
            finally:
                for sock in flood:
                    sock.close()
            await whaled.logged("load_shedding_ended")
            async with asyncio.timeout(20):
                while not await is_let_in(whaled):  # what the flood left in the listener's queue may come first
                    pass
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_memory_that_stays_high_after_a_flood_has_left_refuses_no_client(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await receive_type(client, "welcome")
        flood = [await rig.connect() for _ in range(20)]
        seen = Seen()
        watch = MemoryWatch(MemorySettings(limit=200 * MIB, shed_at=0.5), rig.gateway, seen, kernel.gauge())

        def shedding_at(size_mib: int) -> bool:
            kernel.resident(size_mib * MIB)
            watch.look()
            return seen.is_shedding

        assert shedding_at(110)
        for stranger in flood:
            await stranger.close()
        assert not shedding_at(109)
        assert not shedding_at(111)  # what the flood left is filled again
        assert shedding_at(113)  # it grows
        async with asyncio.timeout(5):
            await ask(client, type="ping")
            await receive_type(client, "pong")


@pytest.mark.slow
async def test_a_slow_replay_uses_memory_only_for_its_unsent_bytes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, slow_timeout=60.0) as rig:
        await rig.alerts(*range(12_000))  # more than the kernel takes for one who reads nothing
        question = json.dumps({"type": "subscribe", "since": {"last": 12_000}}).encode()
        clients = []
        for _ in range(4):
            sock = silent_client(rig.url, receive_buffer=4096)
            sock.sendall(b"\x81" + bytes([0x80 | len(question)]) + bytes(4) + question)  # masked with zeros
            clients.append(sock)
        tracemalloc.start()
        try:
            async with asyncio.timeout(40):
                # Nothing tells that a kernel's buffer is full.
                while sum(connection.unsent > 0 for connection in rig.gateway.roster.all()) < 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0] - rig.gateway.roster.unsent_bytes
        finally:
            tracemalloc.stop()
        assert rig.gateway.subscriptions.replaying == 4
        kept = rig.gateway.subscriptions._pages.kept_bytes
        assert kept <= KEPT_BYTES  # pages are kept for all clients together, not for each
        assert (held - kept) / 4 < 100 * 1024  # the slice that was written is 256 KiB, its page 2 MiB
        for sock in clients:
            sock.close()
