"""What every part of the reconciliation works with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from whaled.config.sections import Backfill
from whaled.model import Draft, Event, Kind, Market, Scan, Source, Transaction, Whale
from whaled.reconcile.coverage import Cover
from whaled.upstream.http import RestFailure
from whaled.upstream.questions import Questions


class Log(Protocol):
    """The event log, as far as reconciliation goes."""

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """The whales that were alerted among these transactions."""
        ...

    async def histories(self, txids: Iterable[str]) -> dict[str, list[tuple[Kind, str]]]:
        """Kind and ref of every event about these whales that is held, in their order."""
        ...

    async def pending(self, after: int, limit: int) -> list[Event]:
        """The newest event of every whale of which nothing final has been said."""
        ...

    async def confirmed_in(self, block_hash: str) -> list[Whale]:
        """The whales of which the newest word is that they are in this block."""
        ...

    async def gone_since(self, at: float, limit: int) -> list[Whale]:
        """The whales of which the newest word, not older than `at`, is that they were replaced or dropped."""
        ...

    async def scans(self, low: int, high: int) -> list[Scan]:
        """The blocks scanned between two heights, both included, ascending."""
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

    async def commit(self, drafts: Sequence[Draft]) -> list[Event]:
        """Commit and publish; returns what was new."""
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
    ) -> None:
        self.settings = settings
        self.questions = questions
        self.log = log_
        self.committer = committer
        self.meter = meter
        self.clock = clock


def said(draft: Draft, history: Sequence[tuple[Kind, str]]) -> Draft | None:
    """The draft as it can be stored, None if it is the last thing that was said.

    The log takes each (kind, ref) of a whale once. A whale that goes back and forth between two branches is told the
    same a second time: with a number behind the ref.
    """
    if history and history[-1][0] is draft.kind and history[-1][1].partition("#")[0] == draft.ref:
        return None
    times = sum(kind is draft.kind and ref.partition("#")[0] == draft.ref for kind, ref in history)
    return replace(draft, ref=f"{draft.ref}#{times + 1}") if times else draft


async def say(tools: Tools, drafts: Sequence[Draft]) -> None:
    """Commit what of these has not been said yet, all at once."""
    histories = await tools.log.histories({draft.whale.alert.transaction_id for draft in drafts})
    new = [
        draft if draft.kind is Kind.ALERT else said(draft, histories.get(draft.whale.alert.transaction_id, ()))
        for draft in drafts
    ]
    if any(draft is not None for draft in new):
        await tools.committer.commit([draft for draft in new if draft is not None])
