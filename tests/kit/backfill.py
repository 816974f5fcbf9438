"""A simulated backend and whaled, from the backend's socket to the clients, in one process and on one clock."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web

from whaled.backfill.context import Context
from whaled.backfill.coverage import Cover
from whaled.backfill.meters import BackfillMeter
from whaled.backfill.worker import Worker
from whaled.config.sections import BackfillSettings, DetectionSettings, EventLogSettings, UpstreamSettings
from whaled.eventlog.store import EventLog
from whaled.gateway.share import LoopShare
from whaled.metrics import Metrics
from whaled.model import Event, Scan, UpstreamState
from whaled.pipeline import Pipeline
from whaled.registry import Registry
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.source import MempoolChange, StreamMessage
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.dialect import decode
from whaled.sources.mempool_space.feed import Feed
from whaled.sources.mempool_space.http import RestFailure
from whaled.sources.mempool_space.rest import Rest
from whaled.whales.detect import Detector, Rules

# Far longer than any wait of these tests takes: reaching it means that something hangs.
HANG_S = 20.0


class Clock:
    """The wall clock, `ahead_s` seconds ahead."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Tally(BackfillMeter):
    """The metrics of one backfill, with the values that tests compare and wait for."""

    def __init__(self) -> None:
        self._registry = Registry()
        self.reorgs: list[int] = []
        self.changed = asyncio.Event()
        super().__init__(self._registry, RestFailure)

    def worked(self) -> None:
        super().worked()
        self.changed.set()

    def reorganised(self, depth: int) -> None:
        super().reorganised(depth)
        self.reorgs.append(depth)
        assert self._value("reorged_blocks_total") == sum(self.reorgs)

    def _value(self, metric: str, **labels: str) -> int:
        value = self._registry.collectors.get_sample_value(f"whaled_{metric}", labels)
        assert value is not None, metric
        return int(value)

    @property
    def failures(self) -> Counter[str]:
        return +Counter[str]({reason: self._value("backfill_failures_total", reason=reason) for reason in RestFailure})

    @property
    def covers(self) -> Counter[Cover]:
        return +Counter({cover: self._value("block_whales_total", cover=cover) for cover in Cover})

    @property
    def leads(self) -> int:
        """The number of leads observed."""
        return self._value("whale_lead_seconds_count")

    @property
    def snapshots(self) -> int:
        return self._value("mempool_snapshots_total")

    @property
    def unread_whales(self) -> int:
        return self._value("snapshot_whales_unread_total")

    @property
    def skipped_blocks(self) -> int:
        return self._value("blocks_skipped_total")

    @property
    def rounds(self) -> int:
        return self._value("backfill_rounds_total")

    @property
    def open(self) -> dict[str, int]:
        """What is still to be requested, by kind."""
        return {
            what: self._value("backfill_backlog", what=what)
            for what in ("blocks", "block_whales", "whales", "transactions", "fates")
        }


class Clients:
    """A publisher that remembers what clients would receive."""

    def __init__(self, changed: asyncio.Event) -> None:
        self.events: list[Event] = []
        self._changed = changed

    at_once = 1000

    def publish(self, events: Sequence[Event]) -> None:
        self.events.extend(events)
        self._changed.set()

    def rehearse(self, event: Event) -> None:
        raise AssertionError("no canaries here")

    def publish_upstream_state(self, state: UpstreamState) -> None:
        self._changed.set()


class Observer:
    """Passes messages of the feed to the worker and remembers them."""

    def __init__(self, worker: Worker, tally: Tally) -> None:
        self._worker = worker
        self._tally = tally
        # The number of finished rounds of work when the stream announced a transaction, by txid.
        self.rounds: dict[str, int] = {}
        self.messages: list[StreamMessage] = []

    def observe(self, message: StreamMessage) -> None:
        self._worker.observe(message)
        self.messages.append(message)
        if isinstance(message, MempoolChange):
            self.rounds.update((glimpse.txid, self._tally.rounds) for glimpse in message.entered.added)
        self._tally.changed.set()

    def announcements(self, txid: str) -> list[StreamMessage]:
        """Return the messages that announced a transaction."""
        return [
            message
            for message in self.messages
            if isinstance(message, MempoolChange) and txid in {glimpse.txid for glimpse in message.entered.added}
        ]


class Rig:
    """A running whaled on a simulated backend."""

    def __init__(self, sim: Any, clock: Clock, log: EventLog, pipeline: Pipeline, tally: Tally) -> None:
        self.sim = sim
        self.clock = clock
        self.log = log
        self.pipeline = pipeline
        self.tally = tally
        self.metrics = Metrics()
        self.clients = Clients(tally.changed)
        self.observer: Observer

    @property
    def events(self) -> list[Event]:
        """The events that clients received."""
        return self.clients.events

    def statuses(self, txid: str) -> list[str]:
        """Return the kinds of the events about a transaction that clients received, in order."""
        return [event.kind.value for event in self.events if event.whale.alert.transaction_id == txid]

    def sources(self) -> dict[str, str]:
        """Return the source of each alert by txid. Fails if a transaction was alerted twice."""
        alerts = [event.whale.alert for event in self.events if event.update is None]
        found = {alert.transaction_id: alert.source.value for alert in alerts}
        assert len(found) == len(alerts)
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        try:
            async with asyncio.timeout(HANG_S):
                while not condition():
                    self.tally.changed.clear()
                    await self.tally.changed.wait()
        except TimeoutError:
            events = [(event.kind.value, event.whale.alert.transaction_id[:8]) for event in self.events]
            raise AssertionError(f"timeout: open {self.tally.open}, {self.tally.failures}, events {events}") from None

    async def inject_delta(self, **parts: object) -> None:
        """Handle a change of the mempool in addition to the messages of the stream."""
        delta = {"sequence": 0, "added": [], "removed": [], "mined": [], "replaced": [], **parts}
        raw = json.dumps({"mempool-transactions": delta})
        now = self.clock()
        message = change_of(decode(raw), received_at=now, received_monotonic=now)
        await self.pipeline.handle(message)
        self.observer.observe(message)

    async def poll(self, seconds: float = 2.0) -> None:
        """Advance all clocks and let the backend poll its node."""
        self.clock.ahead_s += seconds
        await self.sim.poll(seconds)

    async def processed(self) -> None:
        """Wait until everything that the backend has sent is handled and another round of work is finished."""
        mark = self.sim.world.pay(1_000_000).txid
        await self.poll()
        await self.until(lambda: self.tally.rounds > self.observer.rounds.get(mark, self.tally.rounds))

    async def settled(self) -> None:
        """Wait until everything that the backend has sent is handled and no block or whale is left to fetch."""
        for _ in range(2):  # the current round may have begun before the last message
            await self.processed()
            await self.until(lambda: self.tally.open["blocks"] == self.tally.open["whales"] == 0)

    async def scans(self) -> dict[int, Scan]:
        """Return the stored scans by height."""
        return {scan.height: scan for scan in await self.log.scans(0, 10**9)}

    async def no_scan_is_stale(self) -> bool:
        """Return whether each stored scan is of a block of the chain."""
        chain = {block.height: block.hash for block in self.sim.world.chain.blocks}
        return all(chain[height] == scan.hash for height, scan in (await self.scans()).items())

    async def chain_is_scanned(self, first: int) -> bool:
        """Return whether exactly the blocks from a height on have a stored scan."""
        chain = self.sim.world.chain
        expected = {h: block.hash for h in range(first, chain.tip.height + 1) if (block := chain.block_at(h))}
        return {height: scan.hash for height, scan in (await self.scans()).items()} == expected


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[tuple[Simulator, Clock]]:
    """Run a simulated backend in which nothing happens by itself."""
    clock = Clock()
    quiet = {"port": 0, "manual": True, "rate": 0, "block_interval": 0, "fetch_latency": 0, **settings}
    async with Simulator(SimulatorSettings(**quiet), clock) as sim:
        yield sim, clock


class Front:
    """A proxy in front of the backend's REST interface that responds to some paths itself (`spoil`)."""

    def __init__(self) -> None:
        self.url = ""
        self.requested: list[str] = []
        self._spoiled: list[tuple[re.Pattern[str], int, bytes, dict[str, str]]] = []
        self._held: tuple[re.Pattern[str], asyncio.Event, asyncio.Event] | None = None

    def spoil(self, path: str, status: int = 200, body: bytes = b"", **headers: str) -> None:
        """Respond like this to every path that matches from now on."""
        self._spoiled.append((re.compile(path), status, body, headers))

    def hold(self, path: str) -> tuple[asyncio.Event, asyncio.Event]:
        """Hold back the next response for a path. Returns the event that is set then, and the one that releases it."""
        self._held = (re.compile(path), asyncio.Event(), asyncio.Event())
        return self._held[1:]

    def restore(self) -> None:
        """Respond as the backend does to all paths again."""
        self._spoiled.clear()

    def times(self, path: str) -> int:
        """Return the number of requests for paths that match."""
        return sum(re.fullmatch(path, requested) is not None for requested in self.requested)

    @asynccontextmanager
    async def before(self, sim: Simulator) -> AsyncIterator[Self]:
        """Listen in front of a simulated backend."""

        async def respond(request: web.Request) -> web.StreamResponse:
            path = request.raw_path.removeprefix("/api/v1/")
            self.requested.append(path)
            for pattern, status, body, headers in self._spoiled:
                if pattern.fullmatch(path):
                    return web.Response(status=status, body=body, headers=headers)
            url = f"{sim.rest_url}/{path}"
            async with session.request(request.method, url, data=await request.read()) as real:
                body = await real.read()
            held = self._held
            if held is not None and held[0].fullmatch(path):
                self._held = None
                held[1].set()
                await held[2].wait()
            return web.Response(status=real.status, body=body, content_type=real.content_type)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", respond)
        runner = web.AppRunner(app)
        async with aiohttp.ClientSession() as session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/v1/"
                yield self
            finally:
                await runner.cleanup()


@asynccontextmanager
async def watching(
    sim: Any,
    clock: Clock,
    directory: Path,
    *,
    settled: bool = True,
    front: Front | None = None,
    detection: DetectionSettings | None = None,
    rest_timeout: float = 5.0,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Run whaled, and end it like a kill; the log stays in the directory.

    `sim` is a Simulator, or anything that listens at its `url`. Tests about timeouts set a short `rest_timeout`.
    """
    backfill = BackfillSettings(**{"requests_per_second": 2000.0, **settings})
    upstream = UpstreamSettings(
        url=sim.url,
        rest_url=None if front is None else front.url,
        rest_timeout=rest_timeout,
        reconnect_initial=0.02,
        reconnect_max=0.02,
    )
    metrics = Metrics()
    tally = Tally()
    async with (
        EventLog.open(EventLogSettings(path=str(directory / "whaled.db")), metrics.eventlog) as log,
        Rest.open(upstream, metrics.rest) as rest,
        asyncio.TaskGroup() as tasks,
    ):
        rules = detection or DetectionSettings()
        clients = Clients(tally.changed)
        pipeline = Pipeline(
            detector=Detector(Rules.of(rules)),
            event_log=log,
            publisher=clients,
            priority=LoopShare(metrics.gateway.worked),
            meter=metrics.detection,
            inputs=rest,
            inputs_wait_s=2.0,
            clock=clock,
        )
        worker = Worker(
            Context(
                settings=backfill,
                backend=Backend(rest, backfill.requests_per_second),
                event_log=log,
                committer=pipeline,
                meter=tally,
                clock=clock,
                monotonic=clock,
            )
        )
        rig = Rig(sim, clock, log, pipeline, tally)
        rig.clients, rig.metrics = clients, metrics
        rig.observer = pipeline.observer = Observer(worker, tally)
        working = [
            tasks.create_task(pipeline.run(Feed(upstream, metrics.feed, clock))),
            tasks.create_task(worker.run()),
        ]
        try:
            if settled:
                await rig.until(lambda: tally.snapshots == 1)
                await rig.settled()
            yield rig
        finally:
            for task in working:
                task.cancel()
