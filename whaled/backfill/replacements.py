"""Whales that were both announced and replaced while the stream was down, found in the backend's RBF trees."""

from collections.abc import Iterable, Sequence

from whaled.backfill.context import Context
from whaled.backfill.first_run import began_at
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Source, Whale
from whaled.source import BackendError, Relative
from whaled.whales import lifecycle


class Replacements:
    """Searches RBF trees for unknown whales."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._backoff = Backoff(context.monotonic)
        # The trees still to be searched, by their root, which was not replaced. The backend lists at most 25.
        self._trees: dict[str, list[Relative]] = {}
        self._is_due = False
        self._turns = Turns(context, self._backoff, context.settings.concurrency)

    @property
    def is_due(self) -> bool:
        """Return whether there are replacements to search."""
        return self._is_due or bool(self._trees)

    def mark_due(self) -> None:
        """Schedule a search of the latest replacements."""
        self._is_due = True

    def next_due(self) -> float | None:
        """Return when to repeat a failed request (monotonic), None if none failed."""
        return self._backoff.next_due(self._turns.is_running)

    async def run(self) -> bool:
        """Search the latest replacements if that is due. Returns False if there is more to do. Raises BackendError."""
        if self._is_due:
            self._is_due = False  # a snapshot taken during the request marks it due again
            try:
                trees = await self._context.backend.latest_families()
            except BackendError:
                self._is_due = True
                raise
            self._trees = {rbf_tree[0].txid: rbf_tree for rbf_tree in trees}
            self._backoff.retain(self._trees)

        async def request(root: str) -> None:
            await self._context.commit_valid(await self.drafts(self._trees[root]))
            self._trees.pop(root, None)

        due = [root for root in self._trees if self._backoff.is_due(root)]
        return await self._turns.take(due, request) and not self._is_due

    async def drafts(self, rbf_tree: Sequence[Relative]) -> list[Draft]:
        """Return alerts and replacements of a tree's replaced whales, oldest first.

        Only of those that are not in the event log.

        Transactions from before whaled's first start are left out. Raises BackendError.
        """
        context = self._context
        wanted = [each for each in reversed(rbf_tree) if self._may_be_whale(each)]
        if not wanted:
            return []
        began = await began_at(context.event_log, context.clock())
        known = await context.event_log.whales(each.txid for each in wanted)
        unknown = [
            each for each in wanted if each.txid not in known and each.seen is not None and each.seen >= int(began)
        ]
        if not unknown:
            return []
        # A transaction that returned to the mempool, or was mined after its return, was not replaced for good. The
        # mempool comparison or the block scan finds it, or it was mined before the first start.
        mempool = set(await context.backend.mempool())
        drafts: list[Draft] = []
        for each in unknown:
            if each.txid not in mempool and not await self._is_mined(each.txid):
                drafts += await self._drafts_of(each, rbf_tree)
        return drafts

    async def with_replaced(self, whale: Whale, rbf_tree: Sequence[Relative], now: float) -> tuple[Whale, list[Draft]]:
        """Return the whale with the transaction that it replaced, and other replacements.

        The first, according to its tree, is preferably a whale of the event log. The others are the replacements of all
        whales of the log that it replaced.
        """
        txid = whale.alert.transaction_id
        replaced = [each.txid for each in rbf_tree if each.replaced_by == txid]
        known = await self._context.event_log.whales(replaced)
        first = next((old for old in replaced if old in known), next(iter(replaced), None))
        return lifecycle.replacing(whale, first), [lifecycle.replaced(old, txid, now) for old in known.values()]

    async def _is_mined(self, txid: str) -> bool:
        backend = self._context.backend
        place = await backend.confirmation(txid)
        return place is not None and await backend.is_in_chain(place)

    def _may_be_whale(self, each: Relative) -> bool:
        minimum_sat = self._context.committer.minimum_sat
        return each.replaced_by is not None and each.value is not None and each.value >= minimum_sat

    async def _drafts_of(self, replaced: Relative, rbf_tree: Iterable[Relative]) -> list[Draft]:
        context = self._context
        transaction = await context.backend.cached(replaced.txid)
        if transaction is None or replaced.replaced_by is None:
            return []
        now = context.clock()
        whale = context.committer.assess(
            transaction,
            source=Source.SNAPSHOT,
            now=now,
            market=context.committer.market,
            replaces=next((each.txid for each in rbf_tree if each.replaced_by == replaced.txid), None),
        )
        if whale is None:
            return []
        return [lifecycle.alerted(whale, now), lifecycle.replaced(whale, replaced.replaced_by, now)]
