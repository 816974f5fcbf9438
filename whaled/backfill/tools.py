"""What every part of the backfill works with."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from whaled.backfill.coverage import Cover
from whaled.config.sections import Backfill
from whaled.model import Draft, Event, Kind, Market, Scan, Source, Transaction, Whale
from whaled.upstream.backend import Backend
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.sampling import Sampler
from whaled.whales.conflicts import Conflicts
from whaled.whales.history import History, next_event

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# As many are looked up in the log at a time, and asked about unless the turn is over before.
LOT = 100
# These say nothing about the question: the next one would fail alike.
GENERAL = frozenset({RestFailure.UNREACHABLE, RestFailure.RATE_LIMITED, RestFailure.TLS, RestFailure.REDIRECTED})
# Lines about one sort of failure are at least this far apart.
LOG_INTERVAL_S = 600.0


class Log(Conflicts, Protocol):
    """The event log, as far as backfill goes."""

    @property
    def head(self) -> int:
        """The newest offset."""
        ...

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, ascending, at most `limit`."""
        ...

    async def pending(self, after: int, limit: int) -> list[Event]:
        """The newest event of every whale of which nothing final has been said."""
        ...

    async def confirmed_in(self, block_hash: str) -> list[Whale]:
        """The whales of which the newest word is that they are in this block."""
        ...

    async def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """The whales of which the newest word, not older than `at`, is that they were replaced or dropped, and how many
        events there are about each.
        """
        ...

    async def scans(self, low: int, high: int) -> list[Scan]:
        """The blocks scanned between two heights, both included, ascending."""
        ...

    async def newest_scans(self, limit: int, below: int = ...) -> list[Scan]:
        """The highest blocks scanned below a height, descending."""
        ...

    async def put_scan(self, scan: Scan) -> None:
        """Store what a block's scan found."""
        ...

    async def forget_scan(self, height: int) -> None:
        """The block at this height is not in the chain (any more)."""
        ...

    async def state(self, key: str) -> str | None:
        """The text stored under a key."""
        ...

    async def set_state(self, key: str, value: str) -> None:
        """Store a small text under a key."""
        ...


class Committer(Protocol):
    """Who commits and publishes, in one order with what the stream brings."""

    market: Market

    async def commit(self, decide: Callable[[], Awaitable[Sequence[Draft]]]) -> list[Event]:
        """Commit and publish what `decide` says between two messages of the stream; returns what was new."""
        ...

    def assess(
        self, transaction: Transaction, *, source: Source, now: float, market: Market, replaces: str | None = None
    ) -> Whale | None:
        """The whale that this transaction is, None if it is none."""
        ...

    @property
    def minimum_sat(self) -> int:
        """The least sum of outputs that is worth looking at."""
        ...


class BackfillMeter(Protocol):
    """What is counted of backfill."""

    def failed(self, reason: RestFailure) -> None:
        """The backend could not be asked; it is asked again."""
        ...

    def snapshot(self) -> None:
        """The whole mempool was looked at."""
        ...

    def scanned(self, covers: Sequence[Cover], leads_s: Sequence[float]) -> None:
        """A block was scanned."""
        ...

    def backlog(self, *, blocks: int, block_whales: int, candidates: int, tail: int, fates: int) -> None:
        """What is still to be done. Called whenever there is more or less of it."""
        ...

    def worked(self) -> None:
        """A round of work is over."""
        ...

    def unread(self) -> None:
        """A whale of a snapshot left, unmined, before the backend gave it: it is not alerted."""
        ...

    def skipped(self, blocks: int) -> None:
        """Blocks that are not going to be scanned: further back than backfill.max_blocks."""
        ...

    def reorganised(self, depth: int) -> None:
        """Blocks left the chain."""
        ...


class Background:
    """Where backend go on that take longer than their turn. `changed` is called whenever one ends."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self.changed: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def running(self, changed: Callable[[], None]) -> AsyncIterator[None]:
        """Until the end of the block; what still runs then is cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group, self.changed = group, changed
            try:
                yield
            finally:
                self._group = None

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Begin, within the block."""
        assert self._group is not None, "questions are asked while the backfill runs"
        return self._group.create_task(work)


class Tools:
    """The means, passed to each part."""

    def __init__(
        self,
        *,
        settings: Backfill,
        backend: Backend,
        event_log: Log,
        committer: Committer,
        meter: BackfillMeter,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.log = event_log
        self.committer = committer
        self.meter = meter
        self.clock = clock
        self.monotonic = monotonic
        self.background = Background()
        # Whales called replaced by what an answer showed: it may have been older than their return.
        self.replaced: dict[str, None] = {}
        self._lines = Sampler(LOG_INTERVAL_S, monotonic)

    def complain(self, error: RestError, again_s: float) -> None:
        """Count a question that stays open, and log it now and then."""
        self.meter.failed(error.reason)
        suppressed = self._lines.admit(error.reason)
        if suppressed is not None:
            logger.warning(
                "the backend cannot be asked, gaps stay open",
                reason=error.reason.value,
                problem=str(error),
                again_s=again_s,
                suppressed=suppressed,
            )


async def commit_valid(
    tools: Tools, drafts: Sequence[Draft], is_so: Callable[[str, History], bool] | None = None
) -> bool:
    """Commit what of these has not been said yet, all at once, as things stand between two messages of the stream.

    `is_so` tells, by txid and history, whether that still holds which was true when the backend was asked: what the
    stream said since is newer than the answer. Returns whether there was anything.
    """
    if not drafts:
        return False

    async def decide() -> list[Draft]:
        valid: list[Draft] = []
        histories = await tools.log.histories({draft.whale.alert.transaction_id for draft in drafts})
        for draft in drafts:
            txid = draft.whale.alert.transaction_id
            history = histories.get(txid, [])
            if is_so is None or is_so(txid, history):
                valid += filter(None, [next_event(draft, history)])
        return valid

    events = await tools.committer.commit(decide)
    tools.replaced.update((each.whale.alert.transaction_id, None) for each in events if each.kind is Kind.REPLACED)
    return bool(events)
