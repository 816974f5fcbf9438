"""Closes the gaps of the stream: asks the backend for what it did not tell, in the order of what matters most.

Everything here is idempotent: the event log takes an alert once for each transaction, and a fate once. So a step that
fails, or is cut short by a kill, is simply done again.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from whaled.config.sections import Backfill
from whaled.model import UpstreamState
from whaled.reconcile.blocks import Blocks
from whaled.reconcile.coverage import Spans
from whaled.reconcile.fates import Fates
from whaled.reconcile.mempool import BEGAN_KEY, Mempool
from whaled.reconcile.tools import Committer, Log, ReconcileMeter, Tools
from whaled.upstream.continuity import Continuity
from whaled.upstream.http import RestError
from whaled.upstream.news import FeedMessage, Lost, Received, SnapshotTaken, StateChanged
from whaled.upstream.questions import Questions

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# After a question that failed; the REST client has tried several times by then.
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
# Between two rounds, at least.
LEAST_REST_S = 0.05
# Transactions that left the mempool and were not looked at yet: an hour of mainnet while the backend cannot be asked.
LEFT_LIMIT = 100_000
# When the daemon last was alive, as its canary wrote it down.
ALIVE_KEY = "canary"


class Reconciler:
    """Hears what the feed brings (`hear`), and works in the background (`run`)."""

    def __init__(
        self,
        *,
        settings: Backfill,
        questions: Questions,
        log_: Log,
        committer: Committer,
        meter: ReconcileMeter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._meter = meter
        self._tools = Tools(
            settings=settings, questions=questions, log_=log_, committer=committer, meter=meter, clock=clock
        )
        self._spans = Spans()
        self._mempool = Mempool(self._tools)
        self._fates = Fates(self._tools)
        self._blocks = Blocks(self._tools, self._spans)
        self._left: dict[str, None] = {}
        self._news = asyncio.Event()
        self._blocks_due = asyncio.Event()
        self._sweep_due = False
        self._sweep_at = clock() + settings.interval
        self._is_connected = False

    # --- what the feed brings: plain defs, nothing waits here ---

    def hear(self, message: FeedMessage) -> None:
        """Take note of a message, after it was handled."""
        now = self._clock()
        match message:
            case Received():
                self._received(message, now)
            case SnapshotTaken():
                self._meter.snapshot()
                self._sweep_due = True
            case StateChanged(state=UpstreamState.CONNECTED):
                self._spans.connected(now)
                self._is_connected = True
                self._blocks_due.set()
            case StateChanged():
                self._is_connected = False
                self._spans.lost(now)
            case Lost():
                self._spans.lost(now)
            case _:
                return
        self._news.set()

    def _received(self, message: Received, now: float) -> None:
        frame = message.frame
        if message.continuity in {Continuity.GAP, Continuity.RESTARTED}:
            self._spans.gap(now)
        if frame.snapshot is not None:
            self._mempool.snapshot(frame.snapshot)
        if frame.delta is not None:
            self._mempool.streamed(frame.delta)
            self._left.update(dict.fromkeys(frame.delta.removed))
            if len(self._left) > LEFT_LIMIT:
                self._left.clear()
                self._sweep_due = True  # finds them too
        if frame.block is not None:
            self._blocks.heard(frame.block, now)
            self._blocks_due.set()
        elif frame.blocks is not None:
            self._blocks_due.set()

    # --- the work ---

    async def run(self) -> None:
        """Work until cancelled."""
        await self._begin()
        retry_s = RETRY_FIRST_S
        while True:
            try:
                is_done = await self._work()
                retry_s = RETRY_FIRST_S
            except RestError as error:
                self._meter.failed(error.reason)
                log.warning("the backend cannot be asked, gaps stay open", problem=str(error), again_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
                continue
            finally:
                self._measure()
            if is_done:
                await self._rest()

    async def _begin(self) -> None:
        log_ = self._tools.log
        if await log_.state(BEGAN_KEY) is None:
            await log_.set_state(BEGAN_KEY, str(self._clock()))
        alive = await log_.state(ALIVE_KEY)
        if alive is not None:
            self._spans.was_down(float(alive), self._clock())
        self._spans.lost(self._clock())

    async def _work(self) -> bool:
        """One round: the newest first. False if there is more to do at once."""
        self._news.clear()
        if not self._is_connected:
            return True
        left, self._left = self._left, {}
        if left:
            await self._fates.left(left)
        if self._blocks_due.is_set() and not await self._catch_up():
            return False
        if not await self._mempool.ask_for_candidates():
            return False
        await self._fates.look()
        if self._sweep_due:
            await self._sweep()
        return await self._mempool.ask_for_tail()

    async def _catch_up(self) -> bool:
        """As long as this fails it stays due."""
        is_done = False
        try:
            is_done = await self._blocks.catch_up(self._blocks_due)
        finally:
            if not is_done:
                self._blocks_due.set()
        return is_done

    async def _sweep(self) -> None:
        mempool = await self._tools.questions.mempool()
        self._mempool.sweep(mempool)
        await self._mempool.revive(await self._fates.compare(set(mempool)))
        self._sweep_due = False

    async def _rest(self) -> None:
        """Until there is news, a fate is due, or it is time for a sweep."""
        now = self._clock()
        dues = [self._sweep_at]
        if self._is_connected:
            dues += [due for due in (self._fates.next_due(), self._mempool.next_due()) if due is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(LEAST_REST_S, min(dues) - now)):
                await self._news.wait()
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + self._tools.settings.interval
            self._sweep_due = True
            self._blocks_due.set()

    def _measure(self) -> None:
        self._meter.backlog(
            blocks=self._blocks.behind,
            candidates=self._mempool.candidates,
            tail=self._mempool.tail,
            fates=self._fates.unresolved,
        )
