"""A rig for fault scenarios.

It has the real daemon as a child process, the simulated backend in this process, proxies between them, three clients
that resume, and a verdict that compares the log and the clients with the simulator's ground truth:

    async with rigged(tmp_path, "reorg", seed=3, block_interval=0) as rig:
        await rig.start()
        await rig.go(20)                  # advance the world by 20 polls of the backend
        rig.upstream.cut()                # cut the link to the backend
        await rig.settle()                # wait until whaled is up to date, and compare
        await rig.kill()                  # kill -9
        await rig.start()
        await rig.finish()                # compare for the last time, print and store the counts

The world does not change between two calls of `go`, so nothing depends on the speed of the machine.
"""

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from faults.followers import Follower, RawFollower
from faults.net import Gate, Proxy
from faults.verdict import Knowable, Row, Verdict, compare, read, state
from kit import daemon
from kit.paths import ROOT
from whaled.model import SAT_PER_BTC
from whaled.simulator.backend import MOST_BLOCKS_AT_ONCE
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.truth import Fate

COUNTS = Path(os.environ.get("WHALED_FAULT_COUNTS", ROOT / "var" / "faults"))
# whaled is stuck if its metrics do not change for STUCK_S (it waits up to a minute for a response), or if it is not up
# to date after WITHIN_S, which allows for a busy machine.
STUCK_S = 75.0
WITHIN_S = 150.0
POLL_S = 0.05
# If two readings of the metrics this far apart are equal, whaled is idle.
QUIET_S = 0.3
MARK_SAT = 123 * SAT_PER_BTC
PICKY_BTC = 250
# A daemon that exceeds this has unbounded memory use. One that has just started uses 60 MB.
MEMORY_LIMIT_MB = 220

# The settings of a busy world: 30 transactions and 6 whales per poll, a block every 8 polls.
WORLD: Mapping[str, Any] = {
    "manual": True, "port": 0, "rate": 30.0, "whale_share": 0.2, "poll_interval": 1.0, "block_interval": 8.0,
    "fetch_latency": 0.0, "keep_blocks": 1000,
}  # fmt: skip
# The settings of a daemon that detects faults and recovers within the duration of a test.
UPSTREAM: Mapping[str, object] = {
    "reconnect_initial": "20ms", "reconnect_max": "100ms", "stable_after": "1s", "connect_timeout": "2s",
    "rest_timeout": "1s", "ping_interval": "500ms", "stale_after": "4s",
}  # fmt: skip
BACKFILL: Mapping[str, object] = {"requests_per_second": 5000, "drop_after": "1s"}


class Counts(Struct):
    """The actions of a scenario, and its result."""

    scenario: str
    seed: int
    verdict: Verdict
    starts: int = 0
    kills: int = 0
    links: int = 0
    cuts: int = 0
    polls: int = 0
    checks: int = 0
    peak_mb: float = 0.0
    seconds: float = 0.0
    more: dict[str, int] = {}

    def line(self) -> str:
        """Return the counts in one line."""
        verdict = self.verdict
        facts = {
            "whales": verdict.whales, "alerts": verdict.alerted, **verdict.sources, "events": verdict.events,
            **{kind: count for kind, count in verdict.kinds.items() if kind != "alert"},
            "unknowable": verdict.unknowable, "missing": verdict.missing, "double": verdict.double,
            "unknown whales": verdict.unknown_whales, "wrong amounts": verdict.wrong_amounts,
            "wrong outcomes": verdict.wrong_outcomes, "inputs unknown": verdict.inputs_unknown,
            "holes": verdict.holes, "to clients": verdict.received, "client faults": verdict.client_faults,
            "starts": self.starts, "kills": self.kills, "links": self.links, "cuts": self.cuts, "polls": self.polls,
            "checks": self.checks, **self.more, "peak MB": round(self.peak_mb), "s": round(self.seconds, 1),
        }  # fmt: skip
        return f"{self.scenario}[{self.seed}]: " + ", ".join(f"{name} {value}" for name, value in facts.items())


class Metrics(Struct, frozen=True):
    """One reading of /metrics."""

    values: dict[str, float]

    def get(self, name: str, **labels: str) -> float:
        """Return a sample, 0 if it is absent."""
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return self.values.get(f"{name}{{{inner}}}" if inner else name, 0.0)

    def total(self, name: str) -> float:
        """Return the sum over all labels."""
        return sum(value for key, value in self.values.items() if key.partition("{")[0] == name)

    @property
    def backlog(self) -> float:
        return self.total("whaled_backfill_backlog")

    @property
    def work(self) -> tuple[float, ...]:
        """The counters that change while whaled has work in progress."""
        return (
            self.total("whaled_upstream_deltas_total"),  # not all frames: responses to pings always arrive
            self.total("whaled_mempool_snapshots_total"),
            self.total("whaled_rest_requests_total"),
            self.total("whaled_eventlog_events_total"),
            self.total("whaled_backfill_failures_total"),
            self.links,
        )

    @property
    def links(self) -> float:
        """A counter that changes when a link may have missed events."""
        return self.total("whaled_upstream_reconnects_total") + sum(
            self.get("whaled_upstream_deltas_total", continuity=each) for each in ("gap", "restarted")
        )


_SAMPLE = re.compile(r"^(\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)


class Rig:
    """The rig that the module describes. `upstream` proxies the stream, `rest` REST requests, `gateway` the clients."""

    def __init__(
        self, name: str, seed: int, directory: Path, sim: Simulator, proxies: tuple[Proxy, Gate, Proxy],
        sections: Mapping[str, Mapping[str, object]],
    ) -> None:  # fmt: skip
        self.sim = sim
        self.upstream, self.rest, self.gateway = proxies
        self.directory = directory
        self.database = directory / "whaled.db"
        self.rng = random.Random(seed)
        self.config = daemon.write_config(
            directory, f"ws://{self.upstream.address}/api/v1/ws", **self._sections(sections)
        )
        self.env: dict[str, str] = {}
        self.daemon: daemon.Daemon | None = None
        self.plain = Follower(f"ws://{self.gateway.address}")
        self.picky = Follower(f"ws://{self.gateway.address}", PICKY_BTC)
        self.raw = RawFollower(f"ws://{self.gateway.address}")
        self.inputs: dict[str, frozenset[tuple[str, int]]] = {}
        self.max_blocks: int | None = None
        self.knowable: Knowable | None = None
        self.counts = Counts(scenario=name, seed=seed, verdict=Verdict())
        self._began = time.monotonic()
        self._stack = AsyncExitStack()
        self._complaints: list[str] = []
        # REST failed or was slow: the inputs of many alerts may be unknown.
        self.is_rest_spoiled = False
        self._shown: set[str] = set()
        self._announced: set[str] = set()
        self._stale = 0
        self._passed_over = False
        # The hashes of the newest blocks when whaled first received any, by height.
        self._at_start: dict[int, str] | None = None
        self._links: tuple[int, float] | None = None

    def _sections(self, sections: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
        base: dict[str, Mapping[str, object]] = {
            "upstream": {**UPSTREAM, "rest_url": self.rest.url},
            "backfill": BACKFILL,
            "eventlog": {"path": str(self.database)},
            "gateway": {"port": 0, "drain_window": "200ms"},
        }
        return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}

    # --- the daemon ---

    async def start(self, *, wait: bool = True) -> daemon.Daemon:
        """Start whaled; with `wait` until it listens."""
        assert self.daemon is None, "one at a time"
        self._stack = AsyncExitStack()
        self.daemon = await self._stack.enter_async_context(daemon.starting(self.config, env=self.env))
        self.counts.starts += 1
        self._links = None
        if wait:
            await self.ready()
            if self._at_start is None:
                await self.until(self._has_begun)
                self._begin()
        return self.daemon

    async def ready(self) -> None:
        """Wait until whaled listens, and let the clients connect."""
        assert self.daemon is not None
        line = await self.daemon.logged("daemon_ready")
        self.daemon.url, self.daemon.http = line["listen"], line["metrics"].removesuffix("/metrics")
        host, port = self.daemon.url.removeprefix("ws://").split(":")
        self.gateway.target = (host, int(port))
        if self.knowable is None:
            height = self.sim.world.chain.tip.height + 1  # `_begin` corrects it if an earlier start was killed
            self.knowable = Knowable(since=self.sim.world.now, first_height=height, inputs=self.inputs)

    async def _has_begun(self) -> bool:
        """Return whether the daemon has stored the first blocks it received: later blocks must not be missing."""
        return state(self.database, "told_blocks") is not None or state(self.database, "first_block") is not None

    def _begin(self) -> None:
        """Set the first height from which whaled must know every whale.

        A daemon that was killed may have received blocks at an earlier start; then the height is counted from those.
        """
        assert self.knowable is not None
        # From the chain, not the backend: a backend without a database keeps listing blocks that left the chain.
        shown = {block.height for block in self.sim.backend.blocks}
        self._at_start = {block.height: block.hash for block in self.sim.world.chain.blocks if block.height in shown}
        stored = json.loads(state(self.database, "told_blocks") or "[]")
        heights = [self.sim.world.chain.tip.height, *(block["height"] for block in stored[-1:])]
        self.knowable.first_height = min(heights) + 1

    async def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.counts.kills += 1
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self.daemon is not None
        self._measure_memory()
        self.gateway.target = None
        if self.daemon.process.returncode is None:
            self.daemon.signal(number)
        status = await self.daemon.ended()
        await self._stack.aclose()
        if status in (0, -number):  # if it ended by itself, the scenario checks the logged reason
            self._complaints += complaints(self.daemon.raw)
        self.daemon = None
        return status

    def _measure_memory(self) -> None:
        """Record the peak resident memory (VmHWM of proc(5))."""
        assert self.daemon is not None
        with suppress(OSError):
            text = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
            found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
            if found is not None:
                self.counts.peak_mb = max(self.counts.peak_mb, int(found[1]) / 1024)

    async def metrics(self) -> Metrics:
        """Read /metrics."""
        assert self.daemon is not None
        url = self.daemon.http + "/metrics"
        async with aiohttp.ClientSession(trust_env=False) as session, session.get(url) as response:
            text = await response.text()
        return Metrics({found[1]: float(found[2]) for found in _SAMPLE.finditer(text)})

    # --- the world ---

    async def go(self, polls: int = 1, *, pace_s: float = 0.0) -> None:
        """Advance the world by `polls` polls of the backend, with a pause of `pace_s` after each."""
        chain = self.sim.world.chain
        for _ in range(polls):
            height = self.sim.backend.blocks[-1].height if self.sim.backend.blocks else 0
            await self.sim.poll()
            # The backend skips the contents of blocks on a new branch below the old tip, and of too many at once.
            if len(chain.stale) > self._stale or chain.tip.height - height > MOST_BLOCKS_AT_ONCE:
                self._passed_over = True
            self._stale = len(chain.stale)
            self.counts.polls += 1
            self.is_rest_spoiled |= bool(self.rest.troubles)
            self._shown.update(self._watched())
            self._note_inputs()
            await asyncio.sleep(pace_s)

    def _note_inputs(self) -> None:
        chain = self.sim.world.chain
        self._announced.update(txid for txid, seen in self.sim.backend.mempool.items() if seen.block is None)
        txs = [seen.tx for seen in self.sim.backend.mempool.values()]
        txs += [entry.tx for entry in chain.mempool.values()]
        txs += [tx for block in chain.blocks[-3:] for tx in block.txs[1:]]
        for tx in txs:
            if tx.txid not in self.inputs:
                self.inputs[tx.txid] = frozenset(coin.outpoint for coin in tx.inputs)

    def waiting_whales(self) -> list[str]:
        """Return the whales in the node's mempool."""
        truth = self.sim.truth
        return [txid for txid in self.sim.world.chain.mempool if (known := truth.get(txid)) is not None and known.whale]

    def _watched(self) -> list[str]:
        truth = self.sim.truth
        return [txid for txid in self.sim.backend.mempool if (record := truth.get(txid)) is not None and record.whale]

    async def settle(self, *, outcomes: bool = True, within_s: float = WITHIN_S) -> Verdict:
        """Wait until whaled is up to date with a world that does not change, and compare. Fails on any difference.

        With `outcomes` False, the outcomes of whales that left the mempool may still be undetermined.
        """
        mark = await self._mark()
        verdict = Verdict(problems=["never up to date"])
        seen: Metrics | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within_s), asyncio.timeout(STUCK_S) as progress:
                while True:
                    before, seen = seen, await self.metrics()
                    if before is None or before.work != seen.work:
                        progress.reschedule(loop.time() + STUCK_S)
                    if before is not None and before.work == seen.work and self._is_idle(seen, outcomes=outcomes):
                        rows = read(self.database)
                        if any(row.txid == mark for row in rows):
                            await self._know(seen, outcomes=outcomes)
                            verdict = self.verdict(rows, outcomes=outcomes)
                            if verdict.is_clean:
                                break
                    await asyncio.sleep(QUIET_S)
        except TimeoutError:
            self._fail(verdict, seen)
        self.counts.checks += 1
        self.counts.verdict = verdict
        return verdict

    async def _mark(self) -> str:
        """Send a whale after all others. Repeated if a transaction in a block happens to spend its coins."""
        while True:
            mark = self.sim.world.pay(MARK_SAT, rate=20.0).txid
            await self.go()
            if self.sim.truth[mark].fate in (Fate.PENDING, Fate.CONFIRMED):
                return mark

    def _is_idle(self, seen: Metrics, *, outcomes: bool) -> bool:
        open_outcomes = 0 if outcomes else seen.get("whaled_backfill_backlog", what="fates")
        return (
            seen.get("whaled_upstream_state", state="connected") == 1
            and seen.total("whaled_mempool_snapshots_total") >= 1
            and seen.backlog - open_outcomes == 0
        )

    def _was_reported(self, txid: str) -> bool:
        """Return whether the whale was replaced and the stream reported it.

        The stream reports no replacement in blocks that the backend skips, nor one whose replacer was mined before the
        backend had fetched it: the replacer's fee is then unknown, and the backend matches nothing.
        """
        whale = self.sim.truth[txid]
        by = self.sim.truth.get(whale.replaced_by or "")
        if whale.fate is not Fate.REPLACED or by is None:
            return False
        return not self._passed_over if by.via_block else by.txid in self._announced

    async def _know(self, seen: Metrics, *, outcomes: bool) -> None:
        """Record what whaled must know from now on, since it is up to date.

        That is everything that exists now, and what the stream contained if the link held.
        """
        assert self.knowable is not None
        assert self.daemon is not None
        self._reckon(seen)
        links = (self.daemon.process.pid, seen.links)
        if links == self._links:
            self.knowable.must |= self._shown
            if outcomes:
                self.knowable.reported.update(filter(self._was_reported, self._shown))
        self._links = links
        self.knowable.must.update(self._watched())
        self.knowable.must.update(
            record.txid
            for record in self.sim.truth.whales()
            if record.fate is Fate.CONFIRMED and (record.height or 0) >= self.knowable.first_height
        )
        self._shown = set(self._watched())
        self._passed_over = False

    def _reckon(self, seen: Metrics) -> None:
        """Update the first height from which whaled must know every whale.

        It is derived from the chain, since the daemon's own value may be wrong.
        """
        assert self.knowable is not None
        chain, first = self.sim.world.chain, self.knowable.first_height
        # A block that replaced one that existed at the start was mined after the start.
        for height, block_hash in (self._at_start or {}).items():
            there = chain.block_at(height)
            if there is not None and there.hash != block_hash:
                first = min(first, height)
        if self.max_blocks is not None:
            first = max(first, chain.tip.height - self.max_blocks + 1)
        else:
            skipped = seen.total("whaled_blocks_skipped_total")
            assert skipped == 0, f"{skipped:.0f} blocks were skipped"
        self.knowable.first_height = first

    def verdict(self, rows: list[Row], *, outcomes: bool = True) -> Verdict:
        """Compare the rows and the clients with the ground truth."""
        assert self.knowable is not None
        clients = {
            name: (client.received, client.missed, client.least_sat)
            for name, client in (("plain", self.plain), ("picky", self.picky))
        }
        world = self.sim.world
        return compare(
            rows, self.sim.truth, world.chain, self.knowable, clients, frames=self.raw.frames, outcomes=outcomes
        )

    def _fail(self, verdict: Verdict, seen: Metrics | None) -> None:
        assert self.daemon is not None
        log = [
            json.dumps(line) for line in self.daemon.lines if line["event"] not in ("whale_detected", "whale_updated")
        ]
        telling = ("whaled_backfill", "whaled_upstream", "whaled_rest_requests", "whaled_mempool", "whaled_blocks")
        moved = (
            {}
            if seen is None
            else {k: v for k, v in seen.values.items() if v and k.startswith(telling) and "_seconds" not in k}
        )
        raise AssertionError(
            f"{self.counts.scenario}[{self.counts.seed}] after {self.counts.polls} polls:\n"
            + "\n".join([*verdict.problems[:20], f"{moved}", f"{self.rest.asked[-20:]}", *log[-25:]])
        )

    async def until(self, is_so: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
        """Poll a condition that another process determines, until it is true."""
        async with asyncio.timeout(within_s):
            while not await is_so():  # noqa: ASYNC110 - there is no event to wait on
                await asyncio.sleep(POLL_S)

    async def finish(self, **more: int) -> Counts:
        """Compare, stop whaled, compare again, and store the counts."""
        await self.settle()
        assert self.daemon is not None
        links = (await self.metrics()).total("whaled_upstream_connects_total")
        assert await self.stop() == 0
        assert not self._complaints, self._complaints
        verdict = self.verdict(read(self.database))
        assert verdict.is_clean, verdict.problems
        if not self.is_rest_spoiled:
            assert verdict.are_inputs_known, f"{verdict.inputs_unknown} of {verdict.alerted} alerts without inputs"
        counts = self.counts
        counts.verdict, counts.links, counts.cuts, counts.more = verdict, int(links), self.upstream.cut_count, more
        counts.links = max(counts.links, self.upstream.connections)
        counts.seconds = time.monotonic() - self._began
        assert counts.peak_mb < MEMORY_LIMIT_MB, f"{counts.peak_mb:.0f} MB"
        record(counts)
        return counts


def complaints(lines: Sequence[str]) -> list[str]:
    """Return the errors and tracebacks among log lines: a daemon that is killed or stopped must not log any."""
    return [text for text in lines if "Traceback" in text or _level(text) in ("error", "critical")]


def _level(text: str) -> object:
    return json.loads(text).get("level") if text.startswith("{") else None


def record(counts: Counts) -> None:
    """Print the counts in a line, and store them for the table."""
    print(counts.line())
    COUNTS.mkdir(parents=True, exist_ok=True)
    (COUNTS / f"{counts.scenario}-{counts.seed}.json").write_bytes(msgspec.json.encode(counts))


@asynccontextmanager
async def rigged(
    directory: Path,
    name: str,
    *,
    seed: int = 1,
    sections: Mapping[str, Mapping[str, object]] | None = None,
    max_blocks: int | None = None,
    **world: Any,
) -> AsyncIterator[Rig]:
    """Run a rig whose backend is up and whose clients wait; `start` starts whaled.

    `sections` override the configuration, `world` the settings of the simulator. With `max_blocks` whaled may skip
    older blocks; without it, a skipped block fails the scenario.
    """
    if max_blocks is not None:
        sections = {**(sections or {}), "backfill": {**(sections or {}).get("backfill", {}), "max_blocks": max_blocks}}
    directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - nothing runs yet
    async with AsyncExitStack() as stack:
        sim = await stack.enter_async_context(Simulator(SimulatorSettings(**{**WORLD, "seed": seed, **world})))
        upstream = await stack.enter_async_context(Proxy(("127.0.0.1", sim.port)).serving())
        rest = await stack.enter_async_context(Gate(sim.rest_url).serving())
        gateway = await stack.enter_async_context(Proxy().serving())
        rig = Rig(name, seed, directory, sim, (upstream, rest, gateway), sections or {})
        rig.max_blocks = max_blocks
        try:
            for client in (rig.plain, rig.picky, rig.raw):
                client.begin()
            yield rig
        finally:
            for client in (rig.plain, rig.picky, rig.raw):
                await client.end()
            if rig.daemon is not None:
                await rig.kill()
    # The event loop closes the sockets in its next iterations.
    await asyncio.sleep(POLL_S)
