"""The mempool as a whole: what was in it before the stream reported changes, and what the stream left out."""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from heapq import nlargest
from itertools import chain, islice, takewhile

import structlog
from msgspec import Struct
from msgspec.structs import replace

from whaled.backfill.context import BATCH, Context
from whaled.backfill.first_run import began_at
from whaled.backfill.replacements import Replacements
from whaled.backfill.seen_txids import SeenTxids
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Kind, Source, Transaction
from whaled.source import BackendError, Listed, MempoolChange, MempoolPart
from whaled.tables import Tables
from whaled.whales import lifecycle
from whaled.whales.conflicts import rivals_of
from whaled.whales.lifecycle import GONE

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Whales to fetch. A mempool of 300,000 transactions has some hundred. With a threshold near zero there may be more; the
# next mempool comparison finds those beyond.
CANDIDATES_LIMIT = 50_000
# Transactions of unknown value to fetch; the next mempool comparison finds those beyond.
UNVALUED_LIMIT = 50_000
# Whales of the stream to remember, and to recheck; a restarted backend announces its whole mempool. The next mempool
# comparison finds those beyond.
STREAM_LIMIT = 50_000
# The smallest input: a key spend of taproot.
LEAST_INPUT_VSIZE = 57.5
# The node knows a transaction before the backend streams it. The stream delivers in this time what is merely ahead.
UNVALUED_AFTER_S = 10.0


class Candidate(Struct):
    """A whale of a snapshot that is to be fetched. `has_left`: the stream reported since that it left the mempool."""

    fee: int | None
    rate: float
    first_seen: float
    vsize: float
    is_replacement: bool | None
    has_left: bool = False

    @classmethod
    def of(cls, listed: Listed) -> "Candidate":
        """Return the candidate for an entry of a snapshot.

        What is unknown is 0 or None. A fee of 0 is unknown too: a backend keeps it from having seen the transaction in
        a block.
        """
        return cls(
            round(listed.fee) if listed.fee is not None and listed.fee > 0 else None,
            listed.rate or 0.0,
            listed.first_seen or 0.0,
            listed.vsize or 0.0,
            listed.is_replacement,
        )

    def completing(self, transaction: Transaction) -> Transaction:
        """Return the transaction with the fee, fee rate and first-seen time of the snapshot."""
        return replace(
            transaction,
            fee_sat=self.fee if self.fee is not None else transaction.fee_sat,
            fee_rate=self.rate if self.rate > 0 else transaction.fee_rate,
            first_seen=int(self.first_seen) or None,
        )


def most_urgent_first(candidates: Mapping[str, Candidate], limit: int) -> Iterator[str]:
    """Yield the newest and the best paying candidates alternately, at most `limit` of each.

    A new transaction may be replaced at any moment, and the best paying one is mined next.
    """
    newest = nlargest(limit, candidates, key=lambda txid: candidates[txid].first_seen)
    best = nlargest(limit, candidates, key=lambda txid: candidates[txid].rate)
    return iter(dict.fromkeys(chain.from_iterable(zip(newest, best, strict=True))))


class Mempool:
    """The transactions of the mempool that have been examined, and those still to be fetched.

    The projected blocks of a snapshot give the value of each transaction in them. A transaction of the mempool that is
    in no projected block and was not in the stream either has to be fetched on its own.
    """

    def __init__(self, context: Context, replacements: Replacements) -> None:
        self._context = context
        self._replacements = replacements
        self._backoff = Backoff(context.monotonic)
        self._candidates: OrderedDict[str, Candidate] = OrderedDict()
        self._turns = Turns(context, self._backoff, context.settings.concurrency)
        # Transactions of unknown value and the time (monotonic) from which each is fetched, in the order of the times.
        self._unvalued: OrderedDict[str, float] = OrderedDict()
        self._unvalued_turns = Turns(context, self._backoff, context.settings.concurrency)
        # Whales that the stream or a snapshot announced since the last interruption and that have not left since.
        self._in_stream: OrderedDict[str, None] = OrderedDict()
        # Transactions that left the stream's mempool while they are being fetched.
        self._left_meanwhile: set[str] = set()
        self._to_recheck: dict[str, None] = {}
        self._seen = SeenTxids()
        self._tables = Tables(self._candidates, self._unvalued, self._in_stream)

    @property
    def candidates(self) -> int:
        """Number of whales to fetch."""
        return len(self._candidates)

    @property
    def unvalued(self) -> int:
        """Number of transactions of unknown value to fetch."""
        return len(self._unvalued)

    # --- messages of the stream: handled without waiting ---

    def on_snapshot(self, part: MempoolPart) -> None:
        """Take in a part of a snapshot."""
        self._seen.add(listed.txid for listed in part.transactions)
        for listed in part.at_least(self._context.committer.minimum_sat):
            self._add_candidate(listed.txid, Candidate.of(listed))
            self._add_to_stream(listed.txid)

    def on_change(self, change: MempoolChange) -> None:
        """Take in a change of the mempool. The pipeline has examined its transactions already."""
        # The next mempool comparison forgets what left as well, but it waits for a response, possibly for days.
        self._seen.discard((*change.removed, *change.mined))
        self._seen.add(glimpse.txid for glimpse in change.entered.added)
        minimum_sat = self._context.committer.minimum_sat
        for glimpse in change.entered.added:
            if glimpse.gross_sat >= minimum_sat:
                self._add_to_stream(glimpse.txid)
                if len(self._to_recheck) < STREAM_LIMIT:
                    self._to_recheck[glimpse.txid] = None
        left = (*change.removed, *change.mined, *(pair.replaced for pair in change.replaced))
        self._left_meanwhile = {txid for txid in (*self._left_meanwhile, *left) if self._is_running(txid)}
        self._left_meanwhile.difference_update(glimpse.txid for glimpse in change.entered.added)
        for txid in (*change.removed, *change.mined):
            self._to_recheck.pop(txid, None)
            self._in_stream.pop(txid, None)
            if txid in self._candidates:
                self._candidates[txid].has_left = True
        self._stop_fetching(change)
        self._tables.shrink()

    def _stop_fetching(self, change: MempoolChange) -> None:
        """Stop fetching transactions that a request no longer helps.

        The block scan finds those that were mined, and the backend does not return those that it evicted. It still
        returns those that it saw being replaced.
        """
        if self._candidates:
            for txid in change.mined:
                if not self._turns.is_running(txid) and self._candidates.pop(txid, None) is not None:
                    self._backoff.forget(txid)
        if self._unvalued:
            replaced = {pair.replaced for pair in change.replaced}
            for txid in (*change.mined, *(removed for removed in change.removed if removed not in replaced)):
                if not self._unvalued_turns.is_running(txid) and txid in self._unvalued:
                    del self._unvalued[txid]
                    self._backoff.forget(txid)

    def on_interruption(self) -> None:
        """Forget which whales are in the stream: it may have left out some that left."""
        self._in_stream.clear()

    def is_in_stream(self, txid: str) -> bool:
        """Return whether the stream announced this whale and has not removed it since, without an interruption.

        REST requests may reach another node, which never had it.
        """
        return txid in self._in_stream

    def _add_to_stream(self, txid: str) -> None:
        self._in_stream[txid] = None
        if len(self._in_stream) > STREAM_LIMIT:
            self._in_stream.popitem(last=False)

    def _add_candidate(self, txid: str, candidate: Candidate) -> None:
        self._candidates[txid] = candidate
        if len(self._candidates) > CANDIDATES_LIMIT:
            oldest, _ = self._candidates.popitem(last=False)
            self._backoff.forget(oldest)
            self._seen.discard([oldest])

    # --- the mempool comparison ---

    def compare(self, mempool: Iterable[str]) -> None:
        """Compare with the whole mempool: its transactions that were never examined will be fetched."""
        fetch_from = self._context.monotonic() + UNVALUED_AFTER_S
        for txid in self._seen.compare(mempool):
            if len(self._unvalued) < UNVALUED_LIMIT:
                self._unvalued.setdefault(txid, fetch_from)  # each comparison leaves the times of those that wait

    def next_due(self) -> float | None:
        """Return when to fetch the next transaction that has to wait (monotonic), None if there is none."""
        dues = [self._backoff.next_due(self._is_running)]
        waiting = (
            txid for txid in self._unvalued if self._backoff.is_due(txid) and not self._unvalued_turns.is_running(txid)
        )
        dues.append(self._unvalued.get(next(waiting, "")))
        return min((due for due in dues if due is not None), default=None)

    def _is_running(self, txid: str) -> bool:
        return self._turns.is_running(txid) or self._unvalued_turns.is_running(txid)

    # --- requests to the backend ---

    async def recheck_gone(self) -> bool:
        """Recheck whales that are gone by the event log, but were announced or reported again.

        The stream or a snapshot announced them, or a response reported them as replaced. Those in the mempool become
        pending again.

        The mempool is requested because an announced whale may have left since, in a message that was missed. Always
        returns True. Raises BackendError; nothing is lost then.
        """
        recheck, self._to_recheck = self._to_recheck | self._context.replaced, {}
        self._context.replaced.clear()
        histories = await self._context.event_log.histories(recheck)
        gone = {txid: len(history) for txid, history in histories.items() if history[-1].kind in GONE}
        if gone:
            try:
                mempool = set(await self._context.backend.mempool())
            except BackendError:
                self._to_recheck |= dict.fromkeys(gone)
                raise
            await self.mark_pending_again(gone, mempool)
        return True

    async def fetch_candidates(self) -> bool:
        """Fetch whales of the snapshot. Returns False if there are more. Raises BackendError; nothing is lost then."""
        due = {
            txid: candidate
            for txid, candidate in self._candidates.items()
            if self._backoff.is_due(txid) and not self._turns.is_running(txid)
        }
        batch = list(most_urgent_first(due, BATCH))
        known = await self._context.event_log.whales(batch)

        async def request(txid: str) -> None:
            candidate = self._candidates.get(txid)
            if txid in known:
                if candidate is not None and not candidate.has_left:
                    self._to_recheck[txid] = None
            elif not await self._fetch(txid, candidate):
                await self._give_up(txid)
            self._candidates.pop(txid, None)

        return await self._turns.take(batch, request) and len(batch) == len(due)

    async def fetch_unvalued(self) -> bool:
        """Fetch a batch of transactions of unknown value.

        Returns False if there are more. Raises BackendError; nothing is lost then.
        """
        for txid in [txid for txid in self._unvalued if txid in self._seen]:
            del self._unvalued[txid]
            self._backoff.forget(txid)
        now = self._context.monotonic()
        waited = (txid for txid, _ in takewhile(lambda each: each[1] <= now, self._unvalued.items()))
        due = list(islice((txid for txid in waited if self._backoff.is_due(txid)), BATCH + 1))

        async def request(txid: str) -> None:
            # A transaction in no projected block pays least: its outputs decide whether it is a whale, without the fee.
            bare = await self._context.backend.bare(txid)
            is_known = bare is not None
            if bare is None or bare.value_sat >= self._context.committer.minimum_sat:
                is_large = bare is not None and len(bare.inputs) > self._context.backend.inputs_limit
                is_known = await self._fetch(txid, None, is_large=is_large)
            if is_known:
                self._seen.add([txid])
            self._unvalued.pop(txid, None)

        return await self._unvalued_turns.take(due[:BATCH], request) and len(due) <= BATCH

    async def _fetch(self, txid: str, candidate: Candidate | None, *, is_large: bool = False) -> bool:
        """Fetch a transaction and alert it if it is a whale. Returns False if the backend does not have it."""
        context = self._context
        is_replacement = candidate.is_replacement if candidate is not None else None
        # Below this size a transaction has at most `inputs_limit` inputs.
        limit_vsize = LEAST_INPUT_VSIZE * context.backend.inputs_limit
        if is_large or (candidate is not None and candidate.vsize > limit_vsize):
            transaction = await context.backend.large(txid)
            if transaction is not None and candidate is not None:
                transaction = candidate.completing(transaction)
        else:
            transaction = await context.backend.transaction(txid)
        is_there = transaction is not None
        if transaction is None:
            transaction = await context.backend.cached(txid)
        if transaction is None:
            return False
        # If it was mined meanwhile, the block scan finds it.
        if transaction.is_confirmed or transaction.gross_sat < context.committer.minimum_sat:
            return True
        if context.settings.first_mempool or not await self._is_older(transaction.first_seen):
            drafts = await self._drafts(transaction, is_replacement, is_there=is_there)
            await context.commit_valid(drafts, lambda *_: not is_there or txid not in self._left_meanwhile)
            if is_there and txid in self._left_meanwhile:
                await context.commit_valid(await self._drafts(transaction, is_replacement, is_there=False))
        return True

    async def _give_up(self, txid: str) -> None:
        """Count a whale of a snapshot that the backend no longer has, unless it was mined or is known."""
        context = self._context
        if await context.backend.confirmation(txid) is None and txid not in await context.event_log.whales([txid]):
            context.meter.unread()
            logger.warning("backfill_whale_missed", txid=txid)
            self._seen.discard([txid])  # if a comparison finds it in the mempool, it is fetched once more

    async def _drafts(self, transaction: Transaction, is_replacement: bool | None, *, is_there: bool) -> list[Draft]:
        """Return the alert of a transaction, and the replacements of it and by it as far as they are known.

        A transaction in the mempool has not been replaced, whatever its RBF tree lists: its replacement was replaced in
        turn by a transaction that does not spend the same outputs, and it returned.
        """
        context = self._context
        txid = transaction.txid
        now = context.clock()
        whale = context.committer.assess(transaction, source=Source.SNAPSHOT, now=now, market=context.committer.market)
        if whale is None:
            return []
        has_tree = not is_there or is_replacement is not False
        rbf_tree = await context.backend.family(txid) if has_tree else []
        whale, drafts = await self._replacements.with_replaced(whale, rbf_tree, now)
        earlier = await self._replacements.drafts([each for each in rbf_tree if each.txid != txid])
        replaced_by = None
        if not is_there:
            replaced_by = next((each.replaced_by for each in rbf_tree if each.txid == txid), None)
            replaced_by = replaced_by or await self._conflicting(transaction)
        if replaced_by is not None:
            drafts.append(lifecycle.replaced(whale, replaced_by, now))
        return [*earlier, lifecycle.alerted(whale, now), *drafts]

    async def _conflicting(self, transaction: Transaction) -> str | None:
        """Return a whale that spends an output which this transaction also spends.

        It is not known to be gone, and preferably confirmed. Returns None if there is none.

        Without this, the transaction that left would count as the replacement of the one that is there, because it is
        alerted later.
        """
        found = await rivals_of(transaction.txid, transaction.outpoints, self._context.event_log)
        present = [txid for txid, last in found.items() if last not in GONE]
        return next((txid for txid in present if found[txid] is Kind.CONFIRMED), next(iter(present), None))

    async def _is_older(self, first_seen: int | None) -> bool:
        """Return whether the backend had a transaction before whaled's first start."""
        began = await began_at(self._context.event_log, self._context.clock())
        return first_seen is not None and first_seen < began

    async def mark_pending_again(self, gone: Mapping[str, int], mempool: Container[str]) -> None:
        """Mark whales as pending again that were gone before the mempool was requested and are in it.

        `gone` has the number of events of each whale at that time: a whale with a newer event is left alone.
        """
        context = self._context
        whales = await context.event_log.whales(txid for txid in gone if txid in mempool)
        again = [lifecycle.pending_again(whale, "", context.clock()) for whale in whales.values()]
        await context.commit_valid(again, lambda txid, history: len(history) == gone[txid])
