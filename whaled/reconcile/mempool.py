"""The mempool as a whole: what was in it before the stream told changes, and what the stream left out."""

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from itertools import islice

import structlog

from whaled.model import Draft, Source, Transaction
from whaled.reconcile.losers import Losers
from whaled.reconcile.patience import Patience
from whaled.reconcile.start import began_at
from whaled.reconcile.tools import GONE, LOT, Tools, say
from whaled.upstream.dialect import Delta, Snapshot
from whaled.upstream.http import RestError
from whaled.whales import lifecycle

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Whales to ask about. A mempool of 300,000 has some hundred; who lowers the threshold to nothing gets the rest later.
CANDIDATES_LIMIT = 50_000
# Transactions of unknown value to ask about; the next sweep finds those beyond.
TAIL_LIMIT = 50_000
# Whales that the stream brings again; a restarted backend brings its whole mempool. The next sweep finds those beyond.
AGAIN_LIMIT = 50_000
# More than fit into any mempool: a node's default is 300 MB. The next sweep asks for what is beyond.
JUDGED_LIMIT = 1_000_000
# The node knows a transaction before the backend's stream tells it: what is only ahead comes by itself.
TAIL_AFTER_S = 10.0


class Judged:
    """Transactions that have been looked at: hashes, 8 bytes instead of 64 letters. Two of a million are alike once in
    10^7 mempools.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, txid: str) -> bool:
        return hash(txid) in self._hashes

    def add(self, txids: Iterable[str]) -> None:
        """These were looked at."""
        self._hashes.update(map(hash, txids))
        if len(self._hashes) > JUDGED_LIMIT:
            self._hashes.clear()

    def discard(self, txids: Iterable[str]) -> None:
        """These are to be looked at if they come again."""
        self._hashes.difference_update(map(hash, txids))

    def compare(self, mempool: Iterable[str]) -> list[str]:
        """Forget what is not in the mempool. Returns what is, and was not looked at."""
        keys = {hash(txid): txid for txid in mempool}
        self._hashes &= keys.keys()
        return [txid for found, txid in keys.items() if found not in self._hashes]


class Mempool:
    """Which transactions have been looked at, and which are still to be asked for.

    The projected blocks of a snapshot give the value of every transaction in them; what is in the mempool and in none
    of them, and was not in the stream either, has to be fetched one by one.
    """

    def __init__(self, tools: Tools, losers: Losers) -> None:
        self._tools = tools
        self._losers = losers
        self._patience = Patience(tools.monotonic)
        # Whales to ask for, and whether the stream said since that they left.
        self._candidates: OrderedDict[str, bool] = OrderedDict()
        self._tail: OrderedDict[str, None] = OrderedDict()
        self._tail_from = 0.0
        self._again: dict[str, None] = {}
        self._judged = Judged()

    @property
    def candidates(self) -> int:
        """Whales to ask for."""
        return len(self._candidates)

    @property
    def tail(self) -> int:
        """Transactions of unknown value to ask for."""
        return len(self._tail)

    # --- what the stream tells: plain defs, nothing waits here ---

    def snapshot(self, part: Snapshot) -> None:
        """A projected block."""
        self._judged.add(stripped.txid for stripped in part.transactions)
        for txid in part.at_least(self._tools.committer.minimum_sat):
            self._candidate(txid)

    def streamed(self, delta: Delta) -> None:
        """What the stream told was judged when it came."""
        # The next sweep forgets who left, too; but it waits for an answer, perhaps for days.
        self._judged.discard((*delta.removed, *delta.mined))
        self._judged.add(glance.txid for glance in delta.added)
        minimum_sat = self._tools.committer.minimum_sat
        for glance in delta.added:
            if sum(output.value for output in glance.vout) >= minimum_sat and len(self._again) < AGAIN_LIMIT:
                self._again[glance.txid] = None
        for txid in (*delta.removed, *delta.mined):
            self._again.pop(txid, None)
            if txid in self._candidates:
                self._candidates[txid] = True

    def _candidate(self, txid: str) -> None:
        self._candidates[txid] = False
        if len(self._candidates) > CANDIDATES_LIMIT:
            dropped, _ = self._candidates.popitem(last=False)
            self._patience.forget(dropped)
            self._judged.discard([dropped])

    # --- the whole mempool ---

    def sweep(self, txids: Iterable[str]) -> None:
        """Compare with the whole mempool: what is in it and was never looked at is asked for."""
        for txid in self._judged.compare(txids):
            if len(self._tail) < TAIL_LIMIT:
                self._tail[txid] = None
        self._tail_from = self._tools.monotonic() + TAIL_AFTER_S

    def next_due(self) -> float | None:
        """When to ask for what waits (monotonic), None if nothing does."""
        dues = [self._patience.next_due()]
        if any(self._patience.is_due(txid) for txid in self._tail):
            dues.append(self._tail_from)
        return min((due for due in dues if due is not None), default=None)

    # --- the questions ---

    async def greet(self) -> bool:
        """Whales said to be gone that the stream or a snapshot brought again, if they are there.

        Whether they are is asked: what was brought may have left since, in a message that was missed. Raises RestError;
        nothing is lost then.
        """
        again, self._again = self._again, {}
        histories = await self._tools.log.histories(again)
        gone = {txid: len(history) for txid, history in histories.items() if history[-1][0] in GONE}
        if gone:
            try:
                mempool = set(await self._tools.questions.mempool())
            except RestError:
                self._again |= dict.fromkeys(gone)
                raise
            await self.revive(gone, mempool)
        return True

    async def ask_for_candidates(self) -> bool:
        """Ask for a lot of those that are whales. False if there are more. Raises RestError; nothing is lost then."""
        due = [txid for txid in self._candidates if self._patience.is_due(txid)]
        lot = due[:LOT]
        known = await self._tools.log.whales(lot)

        async def ask(txid: str) -> None:
            if txid in known:
                if not self._candidates.get(txid, True):
                    self._again[txid] = None
            elif not await self._fetch(txid):
                await self._give_up(txid)
            self._candidates.pop(txid, None)

        return await self._tools.each(lot, ask, self._patience) and len(due) <= LOT

    async def ask_for_tail(self) -> bool:
        """Ask for a lot of those of unknown value. False if there are more. Raises RestError; nothing is lost then."""
        if self._tools.monotonic() < self._tail_from:
            return True
        for txid in [txid for txid in self._tail if txid in self._judged]:
            del self._tail[txid]
            self._patience.forget(txid)
        due = list(islice((txid for txid in self._tail if self._patience.is_due(txid)), LOT + 1))

        async def ask(txid: str) -> None:
            await self._fetch(txid)
            self._judged.add([txid])
            self._tail.pop(txid, None)

        return await self._tools.each(due[:LOT], ask, self._patience) and len(due) <= LOT

    async def _fetch(self, txid: str) -> bool:
        """Alert it if it is a whale. False if the backend does not know it (any more)."""
        tools = self._tools
        transaction = await tools.questions.transaction(txid) or await tools.questions.cached(txid)
        if transaction is None:
            return False
        # Mined meanwhile: then it is in a block that is scanned.
        if transaction.is_confirmed or transaction.value_sat < tools.committer.minimum_sat:
            return True
        if tools.settings.first_mempool or not await self._is_older(transaction.first_seen):
            await say(tools, await self._drafts(transaction))
        return True

    async def _give_up(self, txid: str) -> None:
        """A whale of a snapshot that nobody has any more. Unless it was mined, it can only be counted."""
        tools = self._tools
        if await tools.questions.confirmation(txid) is None and txid not in await tools.log.whales([txid]):
            tools.meter.unread()
            log.warning("a whale of the mempool was gone before the backend gave it", txid=txid)

    async def _drafts(self, transaction: Transaction) -> list[Draft]:
        """The alert, and what is known of those it replaced and of who replaced it."""
        tools = self._tools
        txid = transaction.txid
        family = await tools.questions.family(txid)
        replaced = [each.txid for each in family if each.replaced_by == txid]
        known = await tools.log.whales(replaced)
        earlier = await self._losers.drafts([each for each in family if each.txid != txid])
        now = tools.clock()
        whale = tools.committer.assess(
            transaction,
            source=Source.SNAPSHOT,
            now=now,
            market=tools.committer.market,
            replaces=next((old for old in replaced if old in known), replaced[0] if replaced else None),
        )
        if whale is None:
            return earlier
        winner = next((each.replaced_by for each in family if each.txid == txid), None)
        told = [lifecycle.replaced(loser, txid, now) for loser in known.values()]
        if winner is not None:
            told.append(lifecycle.replaced(whale, winner, now))
        return [*earlier, lifecycle.alerted(whale, now), *told]

    async def _is_older(self, first_seen: int | None) -> bool:
        """Whether the backend had a transaction before whaled's first start."""
        began = await began_at(self._tools.log, self._tools.clock())
        return first_seen is not None and first_seen < began

    async def revive(self, gone: Mapping[str, int], mempool: Container[str]) -> None:
        """Whales that were said to be gone before the mempool was asked for, and are in it: pending again.

        `gone` has how many events there were about each.
        """
        tools = self._tools
        whales = await tools.log.whales(txid for txid in gone if txid in mempool)
        again = [lifecycle.pending_again(whale, "", tools.clock()) for whale in whales.values()]
        await say(tools, again, lambda txid, history: len(history) == gone[txid])
