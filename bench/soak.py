"""`python -m bench.soak`: the daemon for an hour at 20 times the main network's rate, under faults and churn.

Runs the real daemon on the simulated backend with a routine fault every few seconds, and clients of different kinds. At
the end it compares the log and the clients' events with the ground truth, and memory, descriptors, loop lag and
delivery with their bounds. Needs PYTHONPATH=tests (see `make soak`), which contains the comparison. Exits with 1 if a
bound is missed.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
import yaml
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from bench import machine
from bench.daemon import Ready, daemon
from bench.programs import BrokenError, resident_kib
from bench.report import aims_table, percentile, table
from bench.soak_aims import (
    LIVE,
    Course,
    Received,
    Sample,
    aims,
    blocks_grown_percent,
    by_minute,
    grown,
    mean_ms,
    minutes_of,
    parts,
    warm,
)
from bench.soak_clients import MANNERS, Client
from faults.net import Proxy
from faults.verdict import ClientEvent, Knowable, Verdict, compare, read, state
from whaled.model import SAT_PER_BTC
from whaled.simulator import faults
from whaled.simulator.server import Simulator
from whaled.simulator.settings import MAX_BLOCK_WEIGHT, SimulatorSettings

# 20 times the main network's 7 transactions per second.
RATE = 140.0
WHALE_SHARE = 0.02
POLL_S = 1.0
# 140 transactions a second fill a block of 4 million weight units in 24 s. Blocks come twice as fast and leave MEMPOOL
# transactions, so the mempool keeps its size, except for the arrivals since the last block. Changes of memory that do
# not follow the mempool are then visible.
BLOCK_S = 12.0
MEMPOOL = 4_000
SAMPLE_S = 2.0
# Python's blocks are in /metrics, which the daemon renders for each sample: seldom enough not to be load.
BLOCKS_S = 15.0
SETTLE_S = 180.0
TIMELINE = 20
# The daemon's bounded caches are small here, so that they are full when the measurement begins.
SMALL_CACHES = {"detection": {"seen_limit": 300}}
# Keeps the files of a soak with differences, until the next one.
EVIDENCE = Path("var/soak")


class Soak:
    """The simulated world, the clients, and the disturbances."""

    def __init__(
        self, simulator: Simulator, ready: Ready, gateway: Proxy, rng: random.Random, knowable: Knowable
    ) -> None:
        self.sim = simulator
        self.course = Course()
        self.shown: dict[str, float] = {}
        self._blocks = 0
        self.url = f"ws://127.0.0.1:{ready.port}"
        # Clients whose connections are reset connect through the proxy.
        through = f"ws://{gateway.address}"
        self.clients = [Client(each, through if each.is_killed else self.url) for each in MANNERS]
        self._ready = ready
        self._gateway = gateway
        shown = {block.height for block in simulator.backend.blocks}
        self._at_start = {block.height: block.hash for block in simulator.world.chain.blocks if block.height in shown}
        self._rng = rng
        self._knowable = knowable

    async def live(self) -> None:
        """Advance the world in real time, and record when the backend first has each whale."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + POLL_S, loop.time())
            await asyncio.sleep(due - loop.time())
            await self.poll()

    async def poll(self) -> None:
        """Let the backend poll its node, and record new whales and inputs."""
        before = time.monotonic()
        with suppress(OSError):
            await self.sim.poll()
        truth = self.sim.truth
        for txid in self.sim.backend.mempool:
            if txid not in self.shown and (record := truth.get(txid)) is not None and record.whale:
                self.shown[txid] = before
        chain, inputs = self.sim.world.chain, self._knowable.inputs
        for tx in itertools.chain(
            (entry.tx for entry in chain.mempool.values()), (tx for block in chain.blocks[-3:] for tx in block.txs[1:])
        ):
            if tx.txid not in inputs:
                inputs[tx.txid] = frozenset(coin.outpoint for coin in tx.inputs)

    async def fail(self, every_s: float) -> None:
        """Trigger a routine fault every few seconds."""
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * every_s)
            fault = self._rng.choice(faults.ROUTINE)
            self.course.faults[type(fault).__name__] += 1
            await self.sim.apply(fault)

    async def churn(self) -> None:
        """Open and close short-lived connections, half of them abruptly; sometimes reset those through the proxy."""
        while True:
            await asyncio.sleep(self._rng.uniform(0.05, 0.4))
            with suppress(OSError, TimeoutError, WebSocketException):
                async with asyncio.timeout(5):
                    visitor = await connect(self.url, proxy=None, compression=None)
                    await visitor.recv()
                    self.course.visits += 1
                    if self._rng.random() < 0.5:
                        visitor.transport.abort()
                    await visitor.close()
            if self._rng.random() < 0.02:
                self.course.cuts += 1
                self._gateway.cut()

    async def watch(self) -> None:
        """Sample memory and descriptors regularly."""
        blocks_at = 0.0
        while True:
            if time.monotonic() >= blocks_at:
                self._blocks = int((await self.metrics())["whaled_memory_allocated_blocks"])
                blocks_at = time.monotonic() + BLOCKS_S
            self.course.samples.append(self.look())
            await asyncio.sleep(SAMPLE_S)

    def look(self) -> Sample:
        """Return a sample of memory and descriptors. The number of blocks is the latest one scraped."""
        pid = self._ready.pid
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
        mempool = len(self.sim.backend.mempool)
        return Sample(time.monotonic(), resident_kib(pid) / 1024, descriptors, mempool, self._blocks)

    async def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics."""
        async with aiohttp.ClientSession(trust_env=False) as session, session.get(self._ready.metrics_url) as response:
            lines = (await response.text()).splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    async def run(self, seconds: float, fault_every_s: float) -> None:
        """Run all jobs for `seconds`."""
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(job) for job in (self.live(), self.churn(), self.watch())]
            if fault_every_s:
                jobs.append(tasks.create_task(self.fail(fault_every_s)))
            for third in range(4):
                self.course.thirds.append(await self.metrics())
                if third < 3:
                    await asyncio.sleep(seconds / 3)
            for job in jobs:
                job.cancel()

    async def settle(self, database: Path) -> Verdict:
        """End all faults, stop the world, let the daemon catch up, and compare."""
        self.sim.resume()
        self.sim.find_bitcoind()
        for client in self.clients:
            client.hurry = True
        # A fault from the last moments may still delay something.
        await asyncio.sleep(4)
        await self.poll()
        verdict = Verdict(problems=["never up to date"])
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end:
            await asyncio.sleep(3)
            self._update_first_height()
            chain, known = self.sim.world.chain, self._knowable
            verdict = compare(read(database), self.sim.truth, chain, known, self._clients())
            if verdict.is_clean:
                break
        skipped = (await self.metrics())["whaled_blocks_skipped_total"]
        if skipped:
            verdict.blame("missing", f"{skipped:.0f} blocks were skipped")
        return verdict

    async def keep(self, directory: Path) -> None:
        """Copy the event log, the log, the metrics and both mempools to EVIDENCE, for the analysis of a difference."""
        await asyncio.to_thread(shutil.rmtree, EVIDENCE, ignore_errors=True)
        await asyncio.to_thread(shutil.copytree, directory, EVIDENCE)
        (EVIDENCE / "metrics.json").write_text(json.dumps(await self.metrics(), indent=1), encoding="utf-8")
        mempools = {"node": sorted(self.sim.world.chain.mempool), "backend": sorted(self.sim.backend.mempool)}
        (EVIDENCE / "mempools.json").write_text(json.dumps(mempools), encoding="utf-8")
        print(f"event log, log and mempools are kept in {EVIDENCE}", flush=True)

    def _update_first_height(self) -> None:
        """Update the height from which on every whale must be known.

        A block that replaced one from before the start was mined since. The daemon is not consulted, since it may be
        wrong.
        """
        chain, known = self.sim.world.chain, self._knowable
        for height, block_hash in self._at_start.items():
            there = chain.block_at(height)
            if there is not None and there.hash != block_hash:
                known.first_height = min(known.first_height, height)

    def _clients(self) -> dict[str, tuple[list[ClientEvent], list[str], int]]:
        return {
            f"{number} ({each.manner.name})": (each.events, each.missed, (each.manner.min_btc or 0) * SAT_PER_BTC)
            for number, each in enumerate(self.clients)
        }


# --- results ----------------------------------------------------------------------------------------------------------


def latencies(soak: Soak) -> Received:
    """Return the latencies of the plain clients. Raises BrokenError if a third has none."""
    begin, end = soak.course.samples[0].at, soak.course.samples[-1].at
    each = [
        (at, at - soak.shown[txid])
        for client in soak.clients
        if client.manner == MANNERS[0]
        for at, txid in client.received
        if txid in soak.shown
    ]
    first = [took for at, took in each if at < begin + (end - begin) / 3]
    last = [took for at, took in each if end - (end - begin) / 3 < at <= end]
    if not first or not last:
        raise BrokenError("no whale arrived in one of the thirds")
    return first, last


def report(soak: Soak, verdict: Verdict, minutes: float) -> str:
    """Return the results as text and a table."""
    course, samples = soak.course, soak.course.samples
    warmed, by_the_minute = warm(samples), by_minute(samples)
    third = len(samples) // 3
    first, last = latencies(soak)
    looks = course.thirds
    received = {
        "median": [statistics.median(each) for each in (first, last)],
        "p99": [percentile(each, 0.99) for each in (first, last)],
    }
    rows = [
        ("resident, MiB", *(f"{statistics.mean(s.rss_mib for s in part):.1f}" for part in parts(samples, third))),
        (
            "transactions in the mempool",
            *(f"{statistics.mean(s.mempool for s in part):.0f}" for part in parts(samples, third)),
        ),
        ("Python's blocks", *(f"{statistics.mean(s.blocks for s in part):.0f}" for part in parts(samples, third))),
        ("descriptors", *(f"{statistics.mean(s.descriptors for s in part):.1f}" for part in parts(samples, third))),
        *((f"{name}, mean ms", *(f"{mean_ms(name, *looks[i : i + 2]):.2f}" for i in range(3))) for name in LIVE),
        *(
            (f"shown to received, {name}, ms", f"{1e3 * a:.0f}", "", f"{1e3 * b:.0f}")
            for name, (a, b) in received.items()
        ),
    ]
    facts = (
        f"{minutes:g} minutes: {verdict.whales} whales, {verdict.alerted} alerted ({verdict.sources}), events",
        f"{verdict.kinds}, {verdict.unknowable} unknowable; {verdict.received} to {len(soak.clients)} clients",
        f"faults {dict(course.faults)}; {course.visits} visits, clients reset {course.cuts} times",
        f"memory {grown(warmed):+.2f} MiB, Python's blocks {blocks_grown_percent(warmed):+.2f} %",
        f"in the last {minutes_of(warmed):.0f} minutes; memory along the way, MiB:",
        " ".join(f"{mib:.1f}" for _, mib in by_the_minute[:: max(1, len(by_the_minute) // TIMELINE)]),
    )
    problems = [f"  {problem}" for problem in verdict.problems[:20]]
    return "\n".join((*facts, *problems, "", table(("", "first third", "second", "last"), rows), ""))


async def soaked(options: argparse.Namespace, directory: Path) -> bool:
    """Run the soak and print the results. Return whether all bounds hold."""
    seconds = 60 * options.minutes
    settings = SimulatorSettings(
        port=0, seed=options.seed, manual=True, rate=options.rate, whale_share=WHALE_SHARE, block_interval=BLOCK_S,
        block_weight=MAX_BLOCK_WEIGHT, mempool_floor=MEMPOOL, poll_interval=POLL_S,
        truth_limit=int(50_000 + 2 * options.rate * seconds), keep_blocks=600,
    )  # fmt: skip
    async with Simulator(settings) as simulator, Proxy().serving() as gateway:
        await simulator.poll()
        config = write_config(directory, simulator)
        knowable = Knowable(since=simulator.world.now, first_height=simulator.world.chain.tip.height + 1, inputs={})
        async with daemon(config, log=directory / "whaled.log") as ready:
            gateway.target = ("127.0.0.1", ready.port)
            await has_blocks(directory / "soak.db")
            soak = Soak(simulator, ready, gateway, random.Random(options.seed), knowable)
            async with asyncio.TaskGroup() as tasks:
                followers = [tasks.create_task(client.run()) for client in soak.clients]
                await soak.run(seconds, options.fault_every)
                verdict = await soak.settle(directory / "soak.db")
                if verdict.problems:
                    await soak.keep(directory)
                for follower in followers:
                    follower.cancel()
            await asyncio.sleep(2)
            left = soak.look()
    found = aims(soak.course, verdict, latencies(soak), left)
    print(f"{report(soak, verdict, options.minutes)}\n{aims_table(found)}", flush=True)
    return all(aim.is_met for aim in found)


async def has_blocks(database: Path) -> None:
    """Wait until the daemon has stored the current blocks: from then on it must know the whales of every block."""
    async with asyncio.timeout(SETTLE_S):
        while state(database, "told_blocks") is None:  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.05)


def write_config(directory: Path, simulator: Simulator) -> Path:
    """Write a configuration with the defaults, except loopback, no tokens, and short intervals."""
    config: dict[str, dict[str, object]] = {
        "upstream": {
            "url": simulator.url,
            "rest_url": simulator.rest_url,
            "reconnect_max": "2s",
            "ping_interval": "5s",
            "stale_after": "15s",
        },
        "backfill": {"requests_per_second": 200, "drop_after": "5s", "interval": "10s"},
        "eventlog": {"path": str(directory / "soak.db")},
        "gateway": {"port": 0, "slow_timeout": "10s"},
        "auth": {"enabled": False},
        "http": {"port": 0},
        "log": {"format": "json"},
        **{name: dict(keys) for name, keys in SMALL_CACHES.items()},
    }
    path = directory / "soak.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak. Returns 0 if all bounds hold, 1 if one does not or something is broken."""
    made = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    made.add_argument("--minutes", type=float, default=60, help="duration (%(default)g)")
    made.add_argument("--rate", type=float, default=RATE, help="transactions per second (%(default)g)")
    made.add_argument("--fault-every", type=float, default=10, help="seconds between faults, 0: none (%(default)g)")
    made.add_argument("--seed", type=int, default=1, help="seed of the world and the faults (%(default)s)")
    made.add_argument("--directory", default="/var/tmp", help="directory for the database, on a disk (%(default)s)")
    options = made.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the daemon ends with it
    print(f"{machine.kind()}\nload average before: {machine.busy()}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="whaled-soak-", dir=options.directory) as directory:
            return 0 if asyncio.run(soaked(options, Path(directory))) else 1
    except BrokenError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
