"""Whales that came and were replaced while nobody listened: only who replaced them still tells of them."""

from collections.abc import Iterable, Sequence

from whaled.backfill.first_run import began_at
from whaled.backfill.tools import Tools, commit_valid
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Source, Whale
from whaled.upstream.http import RestError
from whaled.upstream.rbf import Relative
from whaled.whales import lifecycle


class Replacements:
    """Looks through trees of replacements for whales that are not known."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._backoff = Backoff(tools.monotonic)
        # By the transaction that nobody replaced. At most what the backend shows: 25.
        self._families: dict[str, list[Relative]] = {}
        self._is_due = False
        self._turns = Turns(tools, self._backoff, tools.settings.concurrency)

    @property
    def is_due(self) -> bool:
        """Whether there are replacements to look through."""
        return self._is_due or bool(self._families)

    def ask(self) -> None:
        """The latest replacements are to be looked through."""
        self._is_due = True

    def next_due(self) -> float | None:
        """When to ask again for what could not be answered (monotonic)."""
        return self._backoff.next_due(self._turns.is_asking)

    async def look(self) -> bool:
        """Look through the latest replacements if that is due. False if there is more to do. Raises RestError."""
        if self._is_due:
            self._is_due = False  # a snapshot taken from here on asks again
            try:
                families = await self._tools.backend.latest_families()
            except RestError:
                self._is_due = True
                raise
            self._families = {family[0].txid: family for family in families}
            self._backoff.keep(self._families)

        async def ask(root: str) -> None:
            await commit_valid(self._tools, await self.drafts(self._families[root]))
            self._families.pop(root, None)

        due = [root for root in self._families if self._backoff.is_due(root)]
        return await self._turns.take(due, ask) and not self._is_due

    async def drafts(self, family: Sequence[Relative]) -> list[Draft]:
        """Alerts of those of a tree that were whales and are not known, and who took their place; the oldest first.

        Those from before whaled's first start are left out. Raises RestError.
        """
        tools = self._tools
        wanted = [each for each in reversed(family) if self._may_be_whale(each)]
        if not wanted:
            return []
        began = await began_at(tools.log, tools.clock())
        known = await tools.log.whales(each.txid for each in wanted)
        unknown = [
            each for each in wanted if each.txid not in known and each.seen is not None and each.seen >= int(began)
        ]
        if not unknown:
            return []
        # One that is back in the mempool, or came back and was mined, was not replaced for good: it is found there, or
        # was mined before the first start.
        mempool = set(await tools.backend.mempool())
        drafts: list[Draft] = []
        for each in unknown:
            if each.txid not in mempool and not await self._is_mined(each.txid):
                drafts += await self._drafts_of(each, family)
        return drafts

    async def replaced_by(self, whale: Whale, family: Sequence[Relative], now: float) -> tuple[Whale, list[Draft]]:
        """The whale with what it replaced by its tree, a whale of the log if there is one, and the end of those."""
        txid = whale.alert.transaction_id
        replaced = [each.txid for each in family if each.replaced_by == txid]
        known = await self._tools.log.whales(replaced)
        first = next((old for old in replaced if old in known), next(iter(replaced), None))
        return lifecycle.replacing(whale, first), [lifecycle.replaced(loser, txid, now) for loser in known.values()]

    async def _is_mined(self, txid: str) -> bool:
        backend = self._tools.backend
        place = await backend.confirmation(txid)
        return place is not None and await backend.is_in_chain(place)

    def _may_be_whale(self, each: Relative) -> bool:
        return (
            each.replaced_by is not None and each.value is not None and each.value >= self._tools.committer.minimum_sat
        )

    async def _drafts_of(self, loser: Relative, family: Iterable[Relative]) -> list[Draft]:
        tools = self._tools
        transaction = await tools.backend.cached(loser.txid)
        if transaction is None or loser.replaced_by is None:
            return []
        now = tools.clock()
        whale = tools.committer.assess(
            transaction,
            source=Source.SNAPSHOT,
            now=now,
            market=tools.committer.market,
            replaces=next((each.txid for each in family if each.replaced_by == loser.txid), None),
        )
        return (
            [] if whale is None else [lifecycle.alerted(whale, now), lifecycle.replaced(whale, loser.replaced_by, now)]
        )
