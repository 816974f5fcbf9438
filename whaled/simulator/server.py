"""The simulated backend on one port: WebSocket on any path, REST under /api/v1/, control under /simulator.

async with Simulator(SimulatorSettings(port=0, manual=True, rate=0)) as sim:
    sim.world.pay(100 * SAT_PER_BTC)
    await sim.poll()        # the clients of sim.url have received it now
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from random import Random
from types import TracebackType
from typing import Self

import msgspec
import structlog
from aiohttp import WSMsgType

from whaled.simulator import faults
from whaled.simulator.backend import Backend, Corrected, Update
from whaled.simulator.control import Control
from whaled.simulator.electrs import Electrs
from whaled.simulator.faults import AnyFault, FailRest, Garbage, RestMode
from whaled.simulator.front import CONTROL_PREFIX, Front
from whaled.simulator.life import Life
from whaled.simulator.messages import Messages
from whaled.simulator.responses import Responses
from whaled.simulator.rest import ELECTRS_PREFIX, PREFIX, Rest, RestFaults
from whaled.simulator.settings import Mode, SimulatorSettings
from whaled.simulator.truth import Truth
from whaled.simulator.world import World

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# In manual mode a poll waits at most this long until its frames are sent: some clients do not read.
FLUSH_WAIT_S = 0.2
# While the node is unreachable, a backend retries once a second and reports it.
RETRY_S = 1.0
# After a reorganisation, a backend with a database polls more slowly, because its indexer runs: 10 s instead of 1 s
# were measured.
SLOW_POLLS = 10


class Simulator:
    """The simulated backend as an async context manager. It listens from `__aenter__` to `__aexit__`.

    `world` has methods that cause events, `truth` records them. With `manual` settings time passes only in `poll()`;
    otherwise the settings' rates apply to the wall clock. Raises ListenError if the port is not available.
    """

    def __init__(self, settings: SimulatorSettings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self._clock = clock
        self._now = clock() if settings.start is None else settings.start
        # With `start` the world's time differs from the clock by a constant.
        self._ahead = self._now - clock()
        self.world = World(settings, self._now)
        self.backend = Backend(self.world.chain, settings, self._now, usd=self.world.usd)
        self._life = Life(self.world)
        self._messages = Messages(self.backend, self.world)
        self._responses = Responses(self.world, self.backend, self._messages, self._push)
        self._rest_faults = RestFaults()
        self._running = asyncio.Event()
        self._running.set()
        self._front = Front(settings.host, settings.port, self._running, lambda: self._messages)
        electrs = Electrs(self.world) if settings.mode is Mode.ESPLORA else None
        Rest(lambda: self._responses, electrs, self._rest_faults, self._running).add_to(self._front.app)
        Control(self.world, self.apply, self._catch_up).add_to(self._front.app)
        self._waits_for_subscriber = settings.early_subscriber
        self._node_is_lost = False
        self._late_block = False
        self._restarting = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()
        self._jobs: set[asyncio.Task[None]] = set()

    # --- addresses ---

    @property
    def port(self) -> int:
        """Return the port in use."""
        return self._front.port

    @property
    def url(self) -> str:
        """Return the URL of the stream."""
        return f"ws://{self.settings.host}:{self.port}/api/v1/ws"

    @property
    def rest_url(self) -> str:
        """Return the URL of the REST API."""
        return f"http://{self.settings.host}:{self.port}{PREFIX.rstrip('/')}"

    @property
    def electrs_url(self) -> str:
        """Return the URL of electrs's REST API in esplora mode."""
        return f"http://{self.settings.host}:{self.port}{ELECTRS_PREFIX.rstrip('/')}"

    @property
    def control_url(self) -> str:
        """Return the URL of the control interface."""
        return f"http://{self.settings.host}:{self.port}{CONTROL_PREFIX}"

    @property
    def truth(self) -> Truth:
        """Return the ground truth of all transactions."""
        return self.world.truth

    @property
    def clients(self) -> int:
        """Return the number of open connections to the stream."""
        return len(self._front.links)

    # --- life ---

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._front.close)
            if not self._waits_for_subscriber:
                self._step(self._now)
            await self._front.come_up()
            await stack.enter_async_context(self._tasks)
            stack.callback(self._cancel_jobs)
            if not self.settings.manual:
                self._begin(self._poll_for_ever())
                if self.settings.fault_every:
                    self._begin(self._fail_for_ever())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            await self._stack.__aexit__(kind, error, trace)
        else:
            # Hide the body's exception from the task group, which would wrap it in an exception group.
            await self._stack.__aexit__(None, None, None)

    def _begin(self, job: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    def _cancel_jobs(self) -> None:
        for task in self._jobs:
            task.cancel()

    async def poll(self, seconds: float | None = None) -> None:
        """In manual mode: advance by `seconds` (default: a poll interval), poll, and wait until all frames are sent."""
        self._now += self.settings.poll_interval if seconds is None else seconds
        if self._running.is_set():
            self._step(self._now)
        else:
            self._life.advance(self._now)
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WAIT_S):
                for link in list(self._front.links):
                    await link.idle.wait()

    async def _poll_for_ever(self) -> None:
        while True:
            await self._running.wait()
            if self._waits_for_subscriber:
                await self._front.subscribed.wait()
                self._waits_for_subscriber = False
            self._read_clock()
            corrected = self._step(self._now)
            pause = self.settings.poll_interval * (SLOW_POLLS if corrected else 1)
            await asyncio.sleep(min(pause, RETRY_S) if self._node_is_lost else pause)

    async def _fail_for_ever(self) -> None:
        rng = Random(self.settings.seed)  # noqa: S311 -- separate from the world's, whose course must not depend on faults
        while True:
            await asyncio.sleep(self.settings.fault_every)
            fault = rng.choice(faults.ROUTINE)
            logger.info("simulator_fault_applied", **msgspec.to_builtins(fault))
            await self.apply(fault)

    def _step(self, now: float) -> bool:
        """Poll once. Return True if the backend detected a reorganisation, after which it polls more slowly."""
        corrected = False
        if self._node_is_lost:
            self._life.advance(now)
            for update in self.backend.fail():
                self._front.broadcast(update)
            return False
        self._life.advance(now - self.settings.fetch_latency)
        for update in self.backend.poll(now, usd=self.world.usd, meanwhile=self._meanwhile):
            corrected = corrected or isinstance(update, Corrected)
            self._front.broadcast(update)
        self._messages.changed()
        return corrected

    def _read_clock(self) -> None:
        if not self.settings.manual:
            self._now = self._clock() + self._ahead

    def _catch_up(self) -> None:
        self._read_clock()
        self._life.advance(self._now)

    def _push(self, update: Update) -> None:
        self._front.broadcast(update)

    def _meanwhile(self) -> None:
        if self._late_block:
            self._late_block = False
            self.world.mine()
        self._life.advance(self._now)

    # --- faults ---

    async def apply(self, fault: AnyFault) -> None:
        """Trigger a fault. Raises ImpossibleError if it cannot happen now."""
        match fault:
            case faults.DropLink():
                self.drop_link()
            case faults.Stall():
                self.stall(fault.seconds)
            case faults.Restart():
                # It runs in a separate task: the requesting connection may end before the restart does.
                restart = self.restart(cache=fault.cache, resend=fault.resend, down=fault.down)
                await asyncio.shield(self._begin(restart))
            case faults.SendGarbage():
                self.send_garbage(fault.kind)
            case faults.Burst():
                self.burst(fault.n)
            case faults.Reorg():
                self.reorg(fault.depth, database=fault.database)
            case faults.LoseBitcoind():
                self.lose_bitcoind(fault.seconds, forget=fault.forget)
            case faults.FailRest():
                self._rest_faults.begin(fault)
            case faults.LateBlock():
                self.late_block()

    def drop_link(self) -> None:
        """Abort every stream without a close frame."""
        for link in list(self._front.links):
            link.abort()

    def stall(self, seconds: float | None = None) -> None:
        """Freeze for `seconds` or until `resume`: no polls, no frames, no REST responses, no pongs."""
        self._running.clear()
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.resume)

    def resume(self) -> None:
        """Continue after a stall."""
        self._running.set()

    async def restart(self, *, cache: bool = False, resend: bool = True, down: float = 0.0) -> None:
        """Restart the backend, see `faults.Restart`. In manual mode with `resend`, the caller does the first poll."""
        async with self._restarting:
            old = self.backend
            await self._front.go_down()
            await asyncio.sleep(down)
            # Without a database the price is unknown until the next update.
            usd = self.world.usd if self.settings.database else None
            self.backend = Backend(self.world.chain, self.settings, self._now, usd=usd)
            if cache:
                self.backend.load_cache(old)
            self._messages = Messages(self.backend, self.world)
            self._responses = Responses(self.world, self.backend, self._messages, self._push)
            self._waits_for_subscriber = resend and not cache
            if not self._waits_for_subscriber:
                self._read_clock()
                self._step(self._now)
            await self._front.come_up()

    def send_garbage(self, kind: Garbage = Garbage.NOT_JSON) -> None:
        """Send an invalid frame to every client."""
        opcode = WSMsgType.BINARY if kind is Garbage.BINARY else WSMsgType.TEXT
        for link in list(self._front.links):
            link.send(faults.PAYLOADS[kind], opcode)

    def burst(self, n: int = 2_000) -> None:
        """Send `n` small payments at once; the next poll reports them in one message."""
        self.world.burst(n)

    def reorg(self, depth: int, *, database: bool | None = None) -> None:
        """Replace `depth` blocks by `depth` + 1 others. `database` sets whether the backend has one from now on."""
        if database is not None:
            self.backend.has_database = database
        self.world.reorg(depth)

    def lose_bitcoind(self, seconds: float | None = None, *, forget: bool = False) -> None:
        """Make the node unreachable for `seconds` or until `find_bitcoind`. With `forget` its mempool is lost."""
        self._node_is_lost = True
        if forget:
            for txid in list(self.world.chain.mempool):
                self.world.chain.evict(txid)
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.find_bitcoind)

    def find_bitcoind(self) -> None:
        """Make the node reachable again."""
        self._node_is_lost = False

    def fail_rest(
        self,
        mode: RestMode = RestMode.STATUS,
        *,
        status: int = 500,
        seconds: float = 5.0,
        times: int = 1,
    ) -> None:
        """Make the next `times` REST requests fail."""
        self._rest_faults.begin(FailRest(mode=mode, status=status, seconds=seconds, times=times))

    def late_block(self) -> None:
        """Mine a block during the next poll, after the backend has read the txids of the mempool."""
        self._late_block = True
