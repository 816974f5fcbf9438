"""A mempool backend in miniature on one port: WebSocket on any path, REST under /api/v1/, control under /simulator.

async with Simulator(SimulatorSettings(port=0, manual=True, rate=0)) as sim:
    sim.world.pay(100 * SAT_PER_BTC)
    await sim.poll()        # whoever listens on sim.url has it now
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
from whaled.simulator.answers import Answers
from whaled.simulator.backend import Backend, Corrected, Update
from whaled.simulator.control import Control
from whaled.simulator.electrs import Electrs
from whaled.simulator.faults import AnyFault, FailRest, Garbage, RestMode
from whaled.simulator.front import CONTROL_PREFIX, Front
from whaled.simulator.life import Life
from whaled.simulator.messages import Messages
from whaled.simulator.rest import ELECTRS_PREFIX, PREFIX, Rest, RestFaults
from whaled.simulator.settings import Mode, SimulatorSettings
from whaled.simulator.truth import Truth
from whaled.simulator.world import World

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A poll in manual mode waits no longer than this for clients to be sent what it gave: some do not read.
FLUSH_WAIT_S = 0.2
# While the node is gone a backend tries, and says so, once a second.
RETRY_S = 1.0
# The indexer slows polling down after a reorganisation with a database: 10 s instead of 1 s were measured.
SLOW_POLLS = 10


class Simulator:
    """The simulated backend as an async context manager; listening from `__aenter__` to `__aexit__`.

    `world` makes things happen, `truth` says what did. With `manual` settings nothing happens by itself but by
    `poll()`; otherwise the settings' rates apply, on the wall clock. Raises ListenError if the port cannot be had.
    """

    def __init__(self, settings: SimulatorSettings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self._clock = clock
        self._now = clock() if settings.start is None else settings.start
        # With a start of its own the world keeps that distance from the clock.
        self._ahead = self._now - clock()
        self.world = World(settings, self._now)
        self.backend = Backend(self.world.chain, settings, self._now, usd=self.world.usd)
        self._life = Life(self.world)
        self._messages = Messages(self.backend, self.world)
        self._answers = Answers(self.world, self.backend, self._messages, self._push)
        self._rest_faults = RestFaults()
        self._running = asyncio.Event()
        self._running.set()
        self._front = Front(settings.host, settings.port, self._running, lambda: self._messages)
        electrs = Electrs(self.world) if settings.mode is Mode.ESPLORA else None
        Rest(lambda: self._answers, electrs, self._rest_faults, self._running).add_to(self._front.app)
        Control(self.world, self.apply, self._catch_up).add_to(self._front.app)
        self._waits_for_subscriber = settings.early_subscriber
        self._node_is_lost = False
        self._late_block = False
        self._restarting = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()
        self._jobs: set[asyncio.Task[None]] = set()

    # --- where it is ---

    @property
    def port(self) -> int:
        """The port in use."""
        return self._front.port

    @property
    def url(self) -> str:
        """Of the stream."""
        return f"ws://{self.settings.host}:{self.port}/api/v1/ws"

    @property
    def rest_url(self) -> str:
        """Of the REST interface."""
        return f"http://{self.settings.host}:{self.port}{PREFIX.rstrip('/')}"

    @property
    def electrs_url(self) -> str:
        """Of electrs' REST interface, in esplora mode."""
        return f"http://{self.settings.host}:{self.port}{ELECTRS_PREFIX.rstrip('/')}"

    @property
    def control_url(self) -> str:
        """Of truth, faults and whales on demand."""
        return f"http://{self.settings.host}:{self.port}{CONTROL_PREFIX}"

    @property
    def truth(self) -> Truth:
        """What was really sent, and what became of it."""
        return self.world.truth

    @property
    def clients(self) -> int:
        """Open connections to the stream."""
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
            # Whatever the body raised is not the task group's: it must not come out wrapped in an exception group.
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
        """Manual mode: let `seconds` (default: a poll interval) go by, poll once, and see everybody served."""
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
        rng = Random(self.settings.seed)  # noqa: S311 -- not the world's, whose course faults must not change
        while True:
            await asyncio.sleep(self.settings.fault_every)
            fault = rng.choice(faults.ROUTINE)
            logger.info("simulated fault", **msgspec.to_builtins(fault))
            await self.apply(fault)

    def _step(self, now: float) -> bool:
        """One poll. True if a reorganisation was noticed and polling slows down."""
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
        """Make a fault happen that is given as a value. ImpossibleError: it cannot happen now."""
        match fault:
            case faults.DropLink():
                self.drop_link()
            case faults.Stall():
                self.stall(fault.seconds)
            case faults.Restart():
                # Its own task: whoever asked for it may be gone before it is over.
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
        """Cut every stream without a close frame."""
        for link in list(self._front.links):
            link.abort()

    def stall(self, seconds: float | None = None) -> None:
        """Freeze, for some seconds or until `resume`: nothing is polled, said or answered, not even pings."""
        self._running.clear()
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.resume)

    def resume(self) -> None:
        """Go on after a stall."""
        self._running.set()

    async def restart(self, *, cache: bool = False, resend: bool = True, down: float = 0.0) -> None:
        """End and begin again, see `faults.Restart`. In manual mode `resend` leaves the first poll to you."""
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
            self._answers = Answers(self.world, self.backend, self._messages, self._push)
            self._waits_for_subscriber = resend and not cache
            if not self._waits_for_subscriber:
                self._read_clock()
                self._step(self._now)
            await self._front.come_up()

    def send_garbage(self, kind: Garbage = Garbage.NOT_JSON) -> None:
        """One bad frame to everybody."""
        opcode = WSMsgType.BINARY if kind is Garbage.BINARY else WSMsgType.TEXT
        for link in list(self._front.links):
            link.send(faults.PAYLOADS[kind], opcode)

    def burst(self, n: int = 2_000) -> None:
        """Many small payments at once; the next poll delivers them in one message."""
        self.world.burst(n)

    def reorg(self, depth: int, *, database: bool | None = None) -> None:
        """Replace `depth` blocks by one more. `database` sets whether the backend has one, from now on."""
        if database is not None:
            self.backend.has_database = database
        self.world.reorg(depth)

    def lose_bitcoind(self, seconds: float | None = None, *, forget: bool = False) -> None:
        """The node is gone, for some seconds or until `find_bitcoind`. With `forget` its mempool is lost."""
        self._node_is_lost = True
        if forget:
            for txid in list(self.world.chain.mempool):
                self.world.chain.evict(txid)
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.find_bitcoind)

    def find_bitcoind(self) -> None:
        """The node answers again."""
        self._node_is_lost = False

    def fail_rest(
        self,
        mode: RestMode = RestMode.STATUS,
        *,
        status: int = 500,
        seconds: float = 5.0,
        times: int = 1,
    ) -> None:
        """The next `times` REST requests fail."""
        self._rest_faults.begin(FailRest(mode=mode, status=status, seconds=seconds, times=times))

    def late_block(self) -> None:
        """A block comes in the midst of the next poll, with all that the poll has just heard of."""
        self._late_block = True
