"""Closes the gaps of the stream with requests to the backend, most urgent first.

Each step is idempotent: the event log takes an alert once per transaction and an outcome once. A step that fails, or is
cut short by a kill, is repeated.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from whaled.backfill.blocks import Blocks
from whaled.backfill.context import Context
from whaled.backfill.coverage import Interruptions
from whaled.backfill.first_run import BEGAN_KEY, FirstRun
from whaled.backfill.mempool import Mempool
from whaled.backfill.outcomes import Outcomes
from whaled.backfill.replacements import Replacements
from whaled.backoff import INITIAL_S, Backoff
from whaled.model import UpstreamState
from whaled.source import (
    BackendError,
    Continuity,
    Lost,
    MempoolChange,
    SnapshotTaken,
    StateChanged,
    StreamMessage,
)

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Shortest wait between two rounds of work.
MIN_WAIT_S = 0.05
# The backoff key of failures that concern the whole backend. The other keys are the names of the steps.
BACKEND = "backend"
# Transactions that left the mempool and were not processed yet: an hour of mainnet while the backend does not respond.
LEFT_LIMIT = 100_000
# The most recent scan is searched among this many of the highest ones: catching up scans the highest block first.
RECENT_SCANS = 1_000
# State key of the time when the daemon was last alive, written by its canary.
ALIVE_KEY = "canary"


class Worker:
    """Receives the messages of the feed (`observe`), and works in the background (`run`)."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._clock = context.clock
        self._monotonic = context.monotonic
        self._meter = context.meter
        self._interruptions = Interruptions()
        # An outage is noticed some time after it began, so it counts from the last message.
        self._received_at = self._clock()
        self._interruptions.lost(self._received_at)
        self._replacements = Replacements(context)
        self._mempool = Mempool(context, self._replacements)
        self._outcomes = Outcomes(context)
        self._first_run = FirstRun(context.event_log)
        self._blocks = Blocks(context, self._first_run, self._interruptions, self._replacements)
        self._backoff = Backoff(self._monotonic)
        self._answered = 0
        # Each step has a turn of limited length; a step that fails waits. What is soon lost comes first: the backend
        # lists a replacement until 25 others have followed, and has a whale of the mempool until it leaves. Blocks
        # remain available.
        self._steps: tuple[tuple[str, Callable[[], Awaitable[bool]]], ...] = (
            ("tip", self._probe_backend),
            ("replacements", self._replacements.run),
            ("candidates", self._mempool.fetch_candidates),
            ("blocks", self._catch_up),
            ("recheck_gone", self._mempool.recheck_gone),
            ("outcomes", self._outcomes.run),
            ("comparison", self._compare_mempool),
            ("unvalued", self._mempool.fetch_unvalued),
        )
        self._left: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._blocks_due = False
        self._comparison_due = False
        self._comparison_at = self._monotonic() + context.settings.interval
        self._is_connected = False

    # --- messages of the feed: handled without waiting ---

    def observe(self, message: StreamMessage) -> None:
        """Take in a message after the pipeline has handled it."""
        now = self._clock()
        match message:
            case MempoolChange():
                self._on_mempool_change(message, now)
            case SnapshotTaken():
                self._meter.snapshot()
                self._replacements.mark_due()
                self._comparison_due = True
            case StateChanged(state=UpstreamState.CONNECTED):
                self._interruptions.connected(now)
                self._is_connected = True
                self._blocks_due = True
                self._backoff.forget(BACKEND)
            case StateChanged():
                self._is_connected = False
                self._on_interruption()
            case Lost():
                self._on_interruption()
            case _:
                return
        self._on_change()

    def _on_interruption(self) -> None:
        self._interruptions.lost(self._received_at)
        self._mempool.on_interruption()

    def _on_change(self) -> None:
        """Report the backlog, which may have grown or shrunk, and start a round of work."""
        self._report_backlog()
        self._wake.set()

    def _on_mempool_change(self, change: MempoolChange, now: float) -> None:
        self._received_at = now
        if change.continuity in {Continuity.GAP, Continuity.RESTARTED}:
            self._interruptions.gap(now)
            self._mempool.on_interruption()
        if change.snapshot is not None:
            self._mempool.on_snapshot(change.snapshot)
        self._mempool.on_change(change)
        self._outcomes.on_change(change)
        self._left.update(dict.fromkeys(change.removed))
        self._left.update(dict.fromkeys(pair.replaced for pair in change.replaced))
        if len(self._left) > LEFT_LIMIT:
            self._left.clear()
            self._comparison_due = True  # it finds them too
        if change.is_ready and change.blocks:
            self._first_run.observe(change.blocks)
        if change.block is not None and self._is_connected:
            self._blocks.observe(change.block, now)
        if change.block is not None or change.blocks is not None:
            self._blocks_due = True

    # --- the work ---

    async def run(self) -> None:
        """Work until cancelled. Raises EventLogError."""
        await self._begin()
        async with self._context.background.running(self._on_change):
            while True:
                try:
                    is_done = await self._work()
                finally:
                    self._report_backlog()
                    self._meter.worked()
                if is_done:
                    await self._wait()

    async def _begin(self) -> None:
        log = self._context.event_log
        if await log.state(BEGAN_KEY) is None:
            await log.set_state(BEGAN_KEY, str(self._clock()))
        alive = await log.state(ALIVE_KEY)
        # Canaries may be off. Then the most recent scan is the last sign of life.
        signs = [float(alive)] if alive else [scan.scanned_at for scan in await log.newest_scans(RECENT_SCANS)]
        if signs:
            self._interruptions.was_down(max(signs), self._clock())
        await self._outcomes.begin()

    async def _work(self) -> bool:
        """Do one round of work. Returns False if there is more to do at once."""
        self._wake.clear()
        await self._first_run.store()
        if not self._is_connected or not self._backoff.is_due(BACKEND):
            return True
        left, self._left = self._left, {}
        if left:
            await self._outcomes.on_left(left)
        is_done = await self._take_turns()
        if is_done is None:
            return True
        if self._backoff.forget(BACKEND):
            logger.info("backfill_requests_resumed")
        if is_done and not (
            self._mempool.candidates or self._mempool.unvalued or self._comparison_due or self._replacements.is_due
        ):
            self._interruptions.caught_up()
        return is_done

    async def _take_turns(self) -> bool | None:
        """Give each step a turn. Returns False if there is more to do at once, None if the backend does not respond."""
        is_done = True
        for name, step in self._steps:
            if self._backoff.is_due(name):
                try:
                    is_done = await step() and is_done
                except BackendError as error:
                    # Without the tip, no other response can be trusted.
                    key = BACKEND if error.is_backend_wide or name in {"tip", "blocks"} else name
                    if self._context.backend.answered > self._answered:
                        # The backend responds to some requests: the wait need not grow.
                        self._answered = self._context.backend.answered
                        self._backoff.forget(BACKEND)
                    self._context.report_failure(error, self._backoff.failed(key, error.retry_after_s))
                    if key == BACKEND:
                        return None
                else:
                    self._backoff.forget(name)
        return is_done

    async def _probe_backend(self) -> bool:
        """Verify that the backend responds before trusting a response that it does not know a whale.

        Always returns True. Raises BackendError.
        """
        if self._mempool.candidates or self._replacements.is_due:
            # In esplora mode the first request goes to the backend and the second one to electrs: both must respond.
            await self._context.backend.block_hash(await self._context.backend.tip_height())
        return True

    async def _catch_up(self) -> bool:
        """Scan blocks if that is due. It stays due as long as it fails. Returns False if there is more to do now."""
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
            self._comparison_due = True
            self._mempool.on_interruption()  # the stream may not report what a reorganisation does to a whale
        return is_done

    async def _compare_mempool(self) -> bool:
        """Compare the whole mempool with what is known, if that is due. Returns False if it is due again."""
        if not self._comparison_due:
            return True
        self._comparison_due = False  # a snapshot taken during the requests makes another comparison due
        # In this order, so that a whale that goes after the first call is not taken for one that returned.
        gone = await self._outcomes.recently_gone()
        try:
            txids = await self._context.backend.mempool()
        except BackendError:
            self._comparison_due = True
            raise
        self._mempool.compare(txids)
        mempool = set(txids)
        await self._outcomes.compare(mempool, self._mempool.is_in_stream)
        await self._mempool.mark_pending_again(gone, mempool)
        return not self._comparison_due

    async def _wait(self) -> None:
        """Wait until there is new work, or until the first due time."""
        # The work of a step that failed stays due while the step waits; it must not start rounds at once.
        least_s = MIN_WAIT_S if self._backoff.next_due() is None else INITIAL_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(least_s, min(self._due_times()) - self._monotonic())):
                await self._wake.wait()
        if self._monotonic() >= self._comparison_at:
            self._comparison_at = self._monotonic() + self._context.settings.interval
            self._comparison_due = True
            self._blocks_due = True

    def _due_times(self) -> list[float]:
        dues: list[float | None] = [self._comparison_at]
        if self._is_connected and self._backoff.is_due(BACKEND):
            parts = (self._blocks, self._replacements, self._outcomes, self._mempool)
            dues += [self._backoff.next_due(), *(part.next_due() for part in parts)]
        elif self._is_connected:
            dues.append(self._backoff.next_due())
        return [due for due in dues if due is not None]

    def _report_backlog(self) -> None:
        self._meter.backlog(
            blocks=self._blocks.behind,
            block_whales=self._blocks.unfetched_whales,
            candidates=self._mempool.candidates,
            tail=self._mempool.unvalued,
            fates=self._outcomes.unresolved,
        )
