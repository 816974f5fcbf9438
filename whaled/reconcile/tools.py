"""What every part of the reconciliation works with."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import structlog
from msgspec.structs import replace

from whaled.config.sections import Backfill
from whaled.model import Draft, Event, Kind, Market, Scan, Source, Transaction, Whale
from whaled.reconcile.coverage import Cover
from whaled.reconcile.patience import Patience
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.questions import Questions
from whaled.upstream.sampling import Sampler

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Kind and ref of each event about a whale, in their order.
History = list[tuple[Kind, str]]
# Asked in one go; then others have their turn.
LOT = 20
# Questions that fail one after the other: then it is not the question.
FAILURES_IN_A_ROW = 3
# These say nothing about the question: the next one would fail alike.
GENERAL = frozenset({RestFailure.UNREACHABLE, RestFailure.RATE_LIMITED, RestFailure.TLS, RestFailure.REDIRECTED})
# Lines about one sort of failure are at least this far apart.
LOG_INTERVAL_S = 600.0


class Log(Protocol):
    """The event log, as far as reconciliation goes."""

    @property
    def head(self) -> int:
        """The newest offset."""
        ...

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Events with after < offset <= through, ascending, at most `limit`."""
        ...

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """The whales that were alerted among these transactions."""
        ...

    async def histories(self, txids: Iterable[str]) -> dict[str, History]:
        """What was said of these whales, as far as it is held."""
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


class ReconcileMeter(Protocol):
    """What is counted of reconciliation."""

    def failed(self, reason: RestFailure) -> None:
        """The backend could not be asked; it is asked again."""
        ...

    def snapshot(self) -> None:
        """The whole mempool was looked at."""
        ...

    def scanned(self, covers: Sequence[Cover], leads_s: Sequence[float]) -> None:
        """A block was scanned."""
        ...

    def backlog(self, *, blocks: int, candidates: int, tail: int, fates: int) -> None:
        """What is still to be done."""
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


class Tools:
    """The means, passed to each part."""

    def __init__(
        self,
        *,
        settings: Backfill,
        questions: Questions,
        log_: Log,
        committer: Committer,
        meter: ReconcileMeter,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.questions = questions
        self.log = log_
        self.committer = committer
        self.meter = meter
        self.clock = clock
        self.monotonic = monotonic
        self._lines = Sampler(LOG_INTERVAL_S, monotonic)

    async def each(self, keys: Iterable[str], ask: Callable[[str], Awaitable[None]], patience: Patience) -> bool:
        """Ask about each in turn. What fails waits and the others go on, unless that was several in a row.

        False if it was: then there is more to ask. Raises RestError where every other question would fail as well.
        """
        failures = 0
        for key in keys:
            try:
                await ask(key)
            except RestError as error:
                if error.reason in GENERAL:
                    raise
                failures += 1
                self.complain(error, patience.failed(key, error.retry_after_s))
                if failures == FAILURES_IN_A_ROW:
                    return False
            else:
                failures = 0
                patience.forget(key)
        return True

    def complain(self, error: RestError, again_s: float) -> None:
        """Count a question that stays open, and log it now and then."""
        self.meter.failed(error.reason)
        suppressed = self._lines.admit(error.reason)
        if suppressed is not None:
            log.warning(
                "the backend cannot be asked, gaps stay open",
                reason=error.reason.value,
                problem=str(error),
                again_s=again_s,
                suppressed=suppressed,
            )


# What may be said after what, told by something other than the stream; that is, the state as it is known now.
GONE = frozenset({Kind.REPLACED, Kind.DROPPED})
WAITING = frozenset({Kind.ALERT, Kind.PENDING})
AFTER = {
    Kind.CONFIRMED: frozenset({Kind.CONFIRMED}) | WAITING | GONE,
    Kind.REPLACED: WAITING | {Kind.DROPPED},
    Kind.DROPPED: WAITING,
    Kind.PENDING: frozenset({Kind.CONFIRMED}) | GONE,
}


def said(draft: Draft, history: History) -> Draft | None:
    """The draft as it can be stored, None if it is the last thing that was said, or no longer so.

    The log takes each (kind, ref) of a whale once. A whale that goes back and forth between two branches is told the
    same a second time: with a number behind the ref.
    """
    if draft.kind is Kind.ALERT:
        return None if history else draft
    last, ref = history[-1] if history else (Kind.ALERT, "")
    ref = ref.partition("#")[0]
    if last not in AFTER[draft.kind] or (last, ref) == (draft.kind, draft.ref):
        return None
    # A block that died takes back only what was said last, and only of itself; who was gone comes back without a block.
    if draft.kind is Kind.PENDING and (draft.ref != ref if last is Kind.CONFIRMED else draft.ref):
        return None
    # Retention may have taken the first of them: what counts is the highest number that is held.
    numbers = [
        int(number or 1)
        for before, number in (ref.partition("#")[::2] for kind, ref in history if kind is draft.kind)
        if before == draft.ref
    ]
    return replace(draft, ref=f"{draft.ref}#{max(numbers) + 1}") if numbers else draft


async def say(tools: Tools, drafts: Sequence[Draft], is_so: Callable[[str, History], bool] | None = None) -> bool:
    """Commit what of these has not been said yet, all at once, as things stand between two messages of the stream.

    `is_so` tells, by txid and history, whether that still holds which was true when the backend was asked: what the
    stream said since is newer than the answer. Returns whether there was anything.
    """
    if not drafts:
        return False

    async def decide() -> list[Draft]:
        told: list[Draft] = []
        histories = await tools.log.histories({draft.whale.alert.transaction_id for draft in drafts})
        for draft in drafts:
            txid = draft.whale.alert.transaction_id
            history = histories.get(txid, [])
            if is_so is None or is_so(txid, history):
                told += filter(None, [said(draft, history)])
        return told

    return bool(await tools.committer.commit(decide))
