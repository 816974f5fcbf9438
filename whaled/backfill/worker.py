"""Closes the gaps of the stream: asks the backend for what it did not tell, in the order of what matters most.

Everything here is idempotent: the event log takes an alert once for each transaction, and a fate once. So a step that
fails, or is cut short by a kill, is simply done again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from whaled.backfill.blocks import Blocks
from whaled.backfill.coverage import Spans
from whaled.backfill.first_run import BEGAN_KEY, FirstRun
from whaled.backfill.mempool import Mempool
from whaled.backfill.outcomes import Outcomes
from whaled.backfill.replacements import Replacements
from whaled.backfill.tools import GENERAL, BackfillMeter, Committer, Log, Tools
from whaled.backoff import FIRST_S, Backoff
from whaled.config.sections import Backfill
from whaled.model import UpstreamState
from whaled.upstream.backend import Backend
from whaled.upstream.continuity import Continuity
from whaled.upstream.http import RestError
from whaled.upstream.messages import FeedMessage, Lost, Received, SnapshotTaken, StateChanged

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Between two rounds, at least.
LEAST_REST_S = 0.05
# The key of what concerns every question, beside those of single steps.
BACKEND = "backend"
# Transactions that left the mempool and were not looked at yet: an hour of mainnet while the backend cannot be asked.
LEFT_LIMIT = 100_000
# The block scanned last is one of so many: catching up begins with the highest.
SIGNS = 1_000
# When the daemon last was alive, as its canary wrote it down.
ALIVE_KEY = "canary"


class Worker:
    """Hears what the feed brings (`hear`), and works in the background (`run`)."""

    def __init__(
        self,
        *,
        settings: Backfill,
        backend: Backend,
        event_log: Log,
        committer: Committer,
        meter: BackfillMeter,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._meter = meter
        self._tools = Tools(
            settings=settings,
            backend=backend,
            event_log=event_log,
            committer=committer,
            meter=meter,
            clock=clock,
            monotonic=monotonic,
        )
        self._spans = Spans()
        # An outage is noticed some time after it began: nothing was heard since the last message.
        self._received_at = clock()
        self._spans.lost(self._received_at)
        self._replacements = Replacements(self._tools)
        self._mempool = Mempool(self._tools, self._replacements)
        self._outcomes = Outcomes(self._tools)
        self._first_run = FirstRun(event_log)
        self._blocks = Blocks(self._tools, self._first_run, self._spans, self._replacements)
        self._backoff = Backoff(monotonic)
        self._answered = 0
        # Each has its turn and lets the next one have its own; one that fails waits.
        # What perishes is first: a replacement is listed until 25 others have followed it, a whale of the mempool is
        # there until it leaves. Blocks stay.
        self._steps: tuple[tuple[str, Callable[[], Awaitable[bool]]], ...] = (
            ("tip", self._reach),
            ("replacements", self._replacements.look),
            ("candidates", self._mempool.ask_for_candidates),
            ("blocks", self._catch_up),
            ("recheck_gone", self._mempool.recheck_gone),
            ("fates", self._outcomes.look),
            ("sweep", self._sweep),
            ("tail", self._mempool.ask_for_tail),
        )
        self._left: dict[str, None] = {}
        self._news = asyncio.Event()
        self._blocks_due = False
        self._sweep_due = False
        self._sweep_at = monotonic() + settings.interval
        self._is_connected = False

    # --- what the feed brings: plain defs, nothing waits here ---

    def observe(self, message: FeedMessage) -> None:
        """Take note of a message, after it was handled."""
        now = self._clock()
        match message:
            case Received():
                self._received(message, now)
            case SnapshotTaken():
                self._meter.snapshot()
                self._replacements.ask()
                self._sweep_due = True
            case StateChanged(state=UpstreamState.CONNECTED):
                self._spans.connected(now)
                self._is_connected = True
                self._blocks_due = True
                self._backoff.forget(BACKEND)
            case StateChanged():
                self._is_connected = False
                self._interrupted()
            case Lost():
                self._interrupted()
            case _:
                return
        self._changed()

    def _interrupted(self) -> None:
        self._spans.lost(self._received_at)
        self._mempool.interrupted()

    def _changed(self) -> None:
        """There is more to ask, or less."""
        self._measure()
        self._news.set()

    def _received(self, message: Received, now: float) -> None:
        self._received_at = now
        frame = message.frame
        if message.continuity in {Continuity.GAP, Continuity.RESTARTED}:
            self._spans.gap(now)
            self._mempool.interrupted()
        if frame.snapshot is not None:
            self._mempool.snapshot(frame.snapshot)
        if frame.delta is not None:
            self._mempool.streamed(frame.delta)
            self._outcomes.streamed(frame.delta)
            self._outcomes.returned(glance.txid for glance in frame.delta.added)
            self._left.update(dict.fromkeys(frame.delta.removed))
            self._left.update(dict.fromkeys(pair.replaced for pair in frame.delta.replaced))
            if len(self._left) > LEFT_LIMIT:
                self._left.clear()
                self._sweep_due = True  # finds them too
        if frame.is_ready and frame.blocks:
            self._first_run.observe(frame.blocks)
        if frame.block is not None and self._is_connected:
            self._blocks.observe(frame.block, now)
        if frame.block is not None or frame.blocks is not None:
            self._blocks_due = True

    # --- the work ---

    async def run(self) -> None:
        """Work until cancelled. Raises EventLogError."""
        await self._begin()
        async with self._tools.background.running(self._changed):
            while True:
                try:
                    is_done = await self._work()
                finally:
                    self._measure()
                    self._meter.worked()
                if is_done:
                    await self._rest()

    async def _begin(self) -> None:
        event_log = self._tools.log
        if await event_log.state(BEGAN_KEY) is None:
            await event_log.set_state(BEGAN_KEY, str(self._clock()))
        alive = await event_log.state(ALIVE_KEY)
        # Canaries may be off: then the last block that was scanned is the last sign of life.
        signs = [float(alive)] if alive else [scan.scanned_at for scan in await event_log.newest_scans(SIGNS)]
        if signs:
            self._spans.was_down(max(signs), self._clock())
        await self._outcomes.begin()

    async def _work(self) -> bool:
        """One round. False if there is more to do at once."""
        self._news.clear()
        await self._first_run.keep()
        if not self._is_connected or not self._backoff.is_due(BACKEND):
            return True
        left, self._left = self._left, {}
        if left:
            await self._outcomes.left(left)
        is_done = await self._take_turns()
        if is_done is None:
            return True
        if self._backoff.forget(BACKEND):
            logger.info("the backend answers again")
        if is_done and not (
            self._mempool.candidates or self._mempool.tail or self._sweep_due or self._replacements.is_due
        ):
            self._spans.caught_up()
        return is_done

    async def _take_turns(self) -> bool | None:
        """A turn of each part. False if there is more to do at once, None if the backend does not answer."""
        is_done = True
        for name, step in self._steps:
            if self._backoff.is_due(name):
                try:
                    is_done = await step() and is_done
                except RestError as error:
                    # Where not even the tip can be had, no answer to anything else can be believed.
                    concerns = BACKEND if error.reason in GENERAL or name in {"tip", "blocks"} else name
                    if self._tools.backend.answered > self._answered:
                        # It does answer, if not always: no reason to wait ever longer.
                        self._answered = self._tools.backend.answered
                        self._backoff.forget(BACKEND)
                    self._tools.complain(error, self._backoff.failed(concerns, error.retry_after_s))
                    if concerns == BACKEND:
                        return None
                else:
                    self._backoff.forget(name)
        return is_done

    async def _reach(self) -> bool:
        """Whether the backend answers at all, before it is believed that it does not know a whale."""
        if self._mempool.candidates or self._replacements.is_due:
            # The node's own calls are elsewhere in esplora mode: there only the first would be answered.
            await self._tools.backend.block_hash(await self._tools.backend.tip_height())
        return True

    async def _catch_up(self) -> bool:
        """As long as this fails it stays due."""
        retry_at = self._blocks.next_due()
        is_retry = retry_at is not None and retry_at <= self._monotonic()
        if not self._blocks_due and not is_retry and not self._blocks.is_unfinished:
            return True
        self._blocks_due = False
        is_done = False
        try:
            is_done = await self._blocks.catch_up()
        finally:
            if not is_done:
                self._blocks_due = True
        if self._blocks.has_undone:
            self._blocks.has_undone = False
            self._sweep_due = True
            self._mempool.interrupted()  # what a reorganisation makes of a whale the stream may not say
        return is_done

    async def _sweep(self) -> bool:
        if not self._sweep_due:
            return True
        self._sweep_due = False  # a snapshot taken from here on asks for another one
        # In this order: who is gone from here on is not taken for one that came back.
        gone = await self._outcomes.gone()
        try:
            mempool = await self._tools.backend.mempool()
        except RestError:
            self._sweep_due = True
            raise
        self._mempool.sweep(mempool)
        here = set(mempool)
        await self._outcomes.compare(here, self._mempool.is_shown)
        await self._mempool.revive(gone, here)
        return not self._sweep_due

    async def _rest(self) -> None:
        """Until there is news, or it is time for something."""
        # What a step that failed is to do stays due while the step waits: no reason to come again at once.
        least_s = LEAST_REST_S if self._backoff.next_due() is None else FIRST_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(least_s, min(self._dues()) - self._monotonic())):
                await self._news.wait()
        if self._monotonic() >= self._sweep_at:
            self._sweep_at = self._monotonic() + self._tools.settings.interval
            self._sweep_due = True
            self._blocks_due = True

    def _dues(self) -> list[float]:
        dues: list[float | None] = [self._sweep_at]
        if self._is_connected and self._backoff.is_due(BACKEND):
            parts = (self._blocks, self._replacements, self._outcomes, self._mempool)
            dues += [self._backoff.next_due(), *(part.next_due() for part in parts)]
        elif self._is_connected:
            dues.append(self._backoff.next_due())
        return [due for due in dues if due is not None]

    def _measure(self) -> None:
        self._meter.backlog(
            blocks=self._blocks.behind,
            block_whales=self._blocks.whales,
            candidates=self._mempool.candidates,
            tail=self._mempool.tail,
            fates=self._outcomes.unresolved,
        )
