"""The interfaces through which the backfill does its I/O: event log, committer and meter."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from whaled.model import Draft, Event, Market, Scan, Source, Transaction, Whale
from whaled.whales.conflicts import Conflicts


class Log(Conflicts, Protocol):
    """The event log as the backfill uses it."""

    @property
    def head(self) -> int:
        """The newest offset."""
        ...

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        """Return at most `limit` events with after < offset <= through, ascending."""
        ...

    async def pending(self, after: int, limit: int) -> list[Event]:
        """Return the newest event of each whale that has no outcome yet.

        They ascend from offset `after` (exclusive), at most `limit`.
        """
        ...

    async def confirmed_in(self, block_hash: str) -> list[Whale]:
        """Return the whales whose newest event is their confirmation in this block."""
        ...

    async def gone_since(self, at: float, limit: int) -> dict[str, int]:
        """Return the whales whose newest event is a replacement or drop at `at` or later.

        `at` is in Unix seconds. The newest come first, at most `limit`: the number of events of each by txid.
        """
        ...

    async def scans(self, low: int, high: int) -> list[Scan]:
        """Return the scans of the blocks between two heights, both included, ascending."""
        ...

    async def newest_scans(self, limit: int, below: int = ...) -> list[Scan]:
        """Return the scans of the highest blocks below a height, descending, at most `limit`."""
        ...

    async def put_scan(self, scan: Scan) -> None:
        """Store the scan of a block."""
        ...

    async def forget_scan(self, height: int) -> None:
        """Delete the scan of the block at this height."""
        ...

    async def state(self, key: str) -> str | None:
        """Return the text stored under a key, None if there is none."""
        ...

    async def set_state(self, key: str, value: str) -> None:
        """Store a small text under a key."""
        ...


class Committer(Protocol):
    """Commits and publishes events in one order with those of the stream."""

    market: Market

    async def commit(self, decide: Callable[[], Awaitable[Sequence[Draft]]]) -> list[Event]:
        """Commit and publish the drafts of `decide`, which is called between two messages of the stream.

        Return the events that were new.
        """
        ...

    def assess(
        self, transaction: Transaction, *, source: Source, now: float, market: Market, replaces: str | None = None
    ) -> Whale | None:
        """Return this transaction as a whale, None if no rule matches it."""
        ...

    @property
    def minimum_sat(self) -> int:
        """The smallest sum of outputs and fee that any rule can match, in satoshi."""
        ...
