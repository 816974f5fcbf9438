"""The mempool as a whole: what was in it before the stream told changes, and what the stream left out."""

import sys
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from heapq import nlargest
from itertools import chain, islice, takewhile

import structlog
from msgspec import Struct
from msgspec.structs import replace

from whaled.backfill.first_run import began_at
from whaled.backfill.replacements import Replacements
from whaled.backfill.tools import LOT, Tools, commit_valid
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Kind, Source, Transaction
from whaled.tables import Tables
from whaled.upstream.dialect import Delta, Snapshot, Stripped
from whaled.upstream.http import RestError
from whaled.upstream.rest import INPUTS_LIMIT
from whaled.whales import lifecycle
from whaled.whales.conflicts import rivals_of
from whaled.whales.history import GONE

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Whales to ask about. A mempool of 300,000 has some hundred; who lowers the threshold to nothing gets the rest later.
CANDIDATES_LIMIT = 50_000
# Transactions of unknown value to ask about; the next sweep finds those beyond.
TAIL_LIMIT = 50_000
# Whales that the stream brings again; a restarted backend brings its whole mempool. The next sweep finds those beyond.
AGAIN_LIMIT = 50_000
# More than fit into any mempool: a node's default is 300 MB. The next sweep asks for what is beyond.
JUDGED_LIMIT = 1_000_000
HASH_BITS_LEFT_OUT = 4
# The smallest input has 57.5 vB (a key spend of taproot): below this size there are at most `INPUTS_LIMIT`.
LARGE_VSIZE = 57.5 * INPUTS_LIMIT
# The node knows a transaction before the backend's stream tells it: what is only ahead comes by itself.
TAIL_AFTER_S = 10.0


class SeenTxids:
    """Transactions that have been looked at, by 60 bits of a hash: 32 bytes and a place in the table instead of 64
    letters. Two of a million are alike once in 10^6 mempools.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._tables = Tables(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, txid: str) -> bool:
        return _key(txid) in self._hashes

    @property
    def table_bytes(self) -> int:
        """What the table takes, without the hashes in it."""
        return sys.getsizeof(self._hashes)

    def add(self, txids: Iterable[str]) -> None:
        """These were looked at."""
        self._hashes.update(map(_key, txids))
        if len(self._hashes) > JUDGED_LIMIT:
            self._hashes.clear()
        self._tables.shrink()

    def discard(self, txids: Iterable[str]) -> None:
        """These are to be looked at if they come again."""
        self._hashes.difference_update(map(_key, txids))
        self._tables.shrink()

    def compare(self, mempool: Iterable[str]) -> list[str]:
        """Forget what is not in the mempool. Returns what is, and was not looked at."""
        here: set[int] = set()
        unseen: list[str] = []
        for txid in mempool:
            key = _key(txid)
            if key in self._hashes:
                here.add(key)
            else:
                unseen.append(txid)
        self._hashes.intersection_update(here)
        self._tables.shrink()
        return unseen


def _key(txid: str) -> int:
    # Python keeps integers of up to 60 bits in 32 bytes, and larger ones in 48.
    return hash(txid) >> HASH_BITS_LEFT_OUT


class Candidate(Struct):
    """A whale of a snapshot that is to be asked for. `has_left` is whether the stream said since that it left."""

    fee: int | None
    rate: float
    first_seen: float
    vsize: float
    is_replacement: bool | None
    has_left: bool = False

    @classmethod
    def of(cls, stripped: Stripped) -> "Candidate":
        """As the snapshot has it; unknown counts for nothing, and so does a fee of 0, which a backend keeps of what it
        once saw in a block.
        """
        return cls(
            round(stripped.fee) if stripped.fee is not None and stripped.fee > 0 else None,
            stripped.rate or 0.0,
            stripped.first_seen or 0.0,
            stripped.vsize or 0.0,
            stripped.is_replacement,
        )

    def completing(self, transaction: Transaction) -> Transaction:
        """What the snapshot knows of a transaction beside itself."""
        return replace(
            transaction,
            fee_sat=self.fee if self.fee is not None else transaction.fee_sat,
            fee_rate=self.rate if self.rate > 0 else transaction.fee_rate,
            first_seen=int(self.first_seen) or None,
        )


def perishable_first(candidates: Mapping[str, Candidate], limit: int) -> Iterator[str]:
    """The newest and the best paying in turn, at most `limit` of each: what is new may be replaced any moment, what
    pays best is mined next.
    """
    newest = nlargest(limit, candidates, key=lambda txid: candidates[txid].first_seen)
    best = nlargest(limit, candidates, key=lambda txid: candidates[txid].rate)
    return iter(dict.fromkeys(chain.from_iterable(zip(newest, best, strict=True))))


class Mempool:
    """Which transactions have been looked at, and which are still to be asked for.

    The projected blocks of a snapshot give the value of every transaction in them; what is in the mempool and in none
    of them, and was not in the stream either, has to be fetched one by one.
    """

    def __init__(self, tools: Tools, replacements: Replacements) -> None:
        self._tools = tools
        self._replacements = replacements
        self._backoff = Backoff(tools.monotonic)
        self._candidates: OrderedDict[str, Candidate] = OrderedDict()
        self._turns = Turns(tools, self._backoff, tools.settings.concurrency)
        # With the time (monotonic) from which on they are asked for, in its order.
        self._tail: OrderedDict[str, float] = OrderedDict()
        self._tail_turns = Turns(tools, self._backoff, tools.settings.concurrency)
        # Whales that the stream or a snapshot showed since it last began anew, and that have not left it.
        self._shown: OrderedDict[str, None] = OrderedDict()
        # Of those that are being asked for, the ones that left the stream's mempool meanwhile.
        self._departed: set[str] = set()
        self._again: dict[str, None] = {}
        self._judged = SeenTxids()
        self._tables = Tables(self._candidates, self._tail, self._shown)

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
        for stripped in part.at_least(self._tools.committer.minimum_sat):
            self._candidate(stripped.txid, Candidate.of(stripped))
            self._show(stripped.txid)

    def streamed(self, delta: Delta) -> None:
        """What the stream told was judged when it came."""
        # The next sweep forgets who left, too; but it waits for an answer, perhaps for days.
        self._judged.discard((*delta.removed, *delta.mined))
        self._judged.add(glance.txid for glance in delta.added)
        minimum_sat = self._tools.committer.minimum_sat
        for glance in delta.added:
            if glance.gross_sat >= minimum_sat:
                self._show(glance.txid)
                if len(self._again) < AGAIN_LIMIT:
                    self._again[glance.txid] = None
        left = (*delta.removed, *delta.mined, *(pair.replaced for pair in delta.replaced))
        self._departed = {txid for txid in (*self._departed, *left) if self._is_asking(txid)}
        self._departed.difference_update(glance.txid for glance in delta.added)
        for txid in (*delta.removed, *delta.mined):
            self._again.pop(txid, None)
            self._shown.pop(txid, None)
            if txid in self._candidates:
                self._candidates[txid].has_left = True
        self._forget_gone(delta)
        self._tables.shrink()

    def _forget_gone(self, delta: Delta) -> None:
        """Stop asking for what a question no longer helps: the scan of its block finds what was mined, and the backend
        does not give what it evicted. It still gives what it saw being replaced.
        """
        if self._candidates:
            for txid in delta.mined:
                if not self._turns.is_asking(txid) and self._candidates.pop(txid, None) is not None:
                    self._backoff.forget(txid)
        if self._tail:
            replaced = {pair.replaced for pair in delta.replaced}
            for txid in (*delta.mined, *(removed for removed in delta.removed if removed not in replaced)):
                if not self._tail_turns.is_asking(txid) and txid in self._tail:
                    del self._tail[txid]
                    self._backoff.forget(txid)

    def interrupted(self) -> None:
        """The stream may have left out who left."""
        self._shown.clear()

    def is_shown(self, txid: str) -> bool:
        """Whether the stream brought this whale and has not let it go, without an interruption. The node that REST asks
        may be another one, which never had it.
        """
        return txid in self._shown

    def _show(self, txid: str) -> None:
        self._shown[txid] = None
        if len(self._shown) > AGAIN_LIMIT:
            self._shown.popitem(last=False)

    def _candidate(self, txid: str, candidate: Candidate) -> None:
        self._candidates[txid] = candidate
        if len(self._candidates) > CANDIDATES_LIMIT:
            dropped, _ = self._candidates.popitem(last=False)
            self._backoff.forget(dropped)
            self._judged.discard([dropped])

    # --- the whole mempool ---

    def sweep(self, txids: Iterable[str]) -> None:
        """Compare with the whole mempool: what is in it and was never looked at is asked for."""
        ask_from = self._tools.monotonic() + TAIL_AFTER_S
        for txid in self._judged.compare(txids):
            if len(self._tail) < TAIL_LIMIT:
                self._tail.setdefault(txid, ask_from)  # one that waits does not wait anew at each sweep

    def next_due(self) -> float | None:
        """When to ask for what waits (monotonic), None if nothing does."""
        dues = [self._backoff.next_due(self._is_asking)]
        waiting = (txid for txid in self._tail if self._backoff.is_due(txid) and not self._tail_turns.is_asking(txid))
        dues.append(self._tail.get(next(waiting, "")))
        return min((due for due in dues if due is not None), default=None)

    def _is_asking(self, txid: str) -> bool:
        return self._turns.is_asking(txid) or self._tail_turns.is_asking(txid)

    # --- the backend ---

    async def recheck_gone(self) -> bool:
        """Whales said to be gone that the stream or a snapshot brought again, or an answer called replaced, if they are
        there.

        Whether they are is asked: what was brought may have left since, in a message that was missed. Raises RestError;
        nothing is lost then.
        """
        again, self._again = self._again | self._tools.replaced, {}
        self._tools.replaced.clear()
        histories = await self._tools.log.histories(again)
        gone = {txid: len(history) for txid, history in histories.items() if history[-1][0] in GONE}
        if gone:
            try:
                mempool = set(await self._tools.backend.mempool())
            except RestError:
                self._again |= dict.fromkeys(gone)
                raise
            await self.revive(gone, mempool)
        return True

    async def ask_for_candidates(self) -> bool:
        """Ask for whales of the snapshot. False if there are more. Raises RestError; nothing is lost then."""
        due = {
            txid: candidate
            for txid, candidate in self._candidates.items()
            if self._backoff.is_due(txid) and not self._turns.is_asking(txid)
        }
        lot = list(perishable_first(due, LOT))
        known = await self._tools.log.whales(lot)

        async def ask(txid: str) -> None:
            candidate = self._candidates.get(txid)
            if txid in known:
                if candidate is not None and not candidate.has_left:
                    self._again[txid] = None
            elif not await self._fetch(txid, candidate):
                await self._give_up(txid)
            self._candidates.pop(txid, None)

        return await self._turns.take(lot, ask) and len(lot) == len(due)

    async def ask_for_tail(self) -> bool:
        """Ask for a lot of those of unknown value. False if there are more. Raises RestError; nothing is lost then."""
        for txid in [txid for txid in self._tail if txid in self._judged]:
            del self._tail[txid]
            self._backoff.forget(txid)
        now = self._tools.monotonic()
        waited = (txid for txid, _ in takewhile(lambda each: each[1] <= now, self._tail.items()))
        due = list(islice((txid for txid in waited if self._backoff.is_due(txid)), LOT + 1))

        async def ask(txid: str) -> None:
            # What is in no projected block pays least: its outputs tell whether it is a whale, without the fee.
            bare = await self._tools.backend.bare(txid)
            is_known = bare is not None
            if bare is None or bare.value_sat >= self._tools.committer.minimum_sat:
                is_known = await self._fetch(txid, None, is_large=bare is not None and len(bare.inputs) > INPUTS_LIMIT)
            if is_known:
                self._judged.add([txid])
            self._tail.pop(txid, None)

        return await self._tail_turns.take(due[:LOT], ask) and len(due) <= LOT

    async def _fetch(self, txid: str, candidate: Candidate | None, *, is_large: bool = False) -> bool:
        """Alert it if it is a whale. False if the backend does not know it (any more)."""
        tools = self._tools
        is_replacement = candidate.is_replacement if candidate is not None else None
        if is_large or (candidate is not None and candidate.vsize > LARGE_VSIZE):
            transaction = await tools.backend.large(txid)
            if transaction is not None and candidate is not None:
                transaction = candidate.completing(transaction)
        else:
            transaction = await tools.backend.transaction(txid)
        is_there = transaction is not None
        if transaction is None:
            transaction = await tools.backend.cached(txid)
        if transaction is None:
            return False
        # Mined meanwhile: then it is in a block that is scanned.
        if transaction.is_confirmed or transaction.gross_sat < tools.committer.minimum_sat:
            return True
        if tools.settings.first_mempool or not await self._is_older(transaction.first_seen):
            drafts = await self._drafts(transaction, is_replacement, is_there=is_there)
            await commit_valid(tools, drafts, lambda *_: not is_there or txid not in self._departed)
            if is_there and txid in self._departed:
                await commit_valid(tools, await self._drafts(transaction, is_replacement, is_there=False))
        return True

    async def _give_up(self, txid: str) -> None:
        """A whale of a snapshot that nobody has any more. Unless it was mined, it can only be counted."""
        tools = self._tools
        if await tools.backend.confirmation(txid) is None and txid not in await tools.log.whales([txid]):
            tools.meter.unread()
            logger.warning("a whale of the mempool was gone before the backend gave it", txid=txid)
            self._judged.discard([txid])  # if a sweep finds it in the mempool, it is asked for once more

    async def _drafts(self, transaction: Transaction, is_replacement: bool | None, *, is_there: bool) -> list[Draft]:
        """The alert, and what is known of those it replaced and of who replaced it.

        A transaction that is in the mempool has been replaced by none, whatever the tree says: what replaced it was
        replaced in turn, by one that does not spend the same, and it came back.
        """
        tools = self._tools
        txid = transaction.txid
        now = tools.clock()
        whale = tools.committer.assess(transaction, source=Source.SNAPSHOT, now=now, market=tools.committer.market)
        if whale is None:
            return []
        has_family = not is_there or is_replacement is not False
        family = await tools.backend.family(txid) if has_family else []
        whale, drafts = await self._replacements.replaced_by(whale, family, now)
        earlier = await self._replacements.drafts([each for each in family if each.txid != txid])
        winner = None
        if not is_there:
            winner = next((each.replaced_by for each in family if each.txid == txid), None)
            winner = winner or await self._rival(transaction)
        if winner is not None:
            drafts.append(lifecycle.replaced(whale, winner, now))
        return [*earlier, lifecycle.alerted(whale, now), *drafts]

    async def _rival(self, transaction: Transaction) -> str | None:
        """A whale that spends what this transaction spends and is not gone, as far as is known; None if there is none.

        Without it the one that left would be taken for the one that is there, because its alert comes later.
        """
        found = await rivals_of(transaction.txid, transaction.outpoints, self._tools.log)
        present = [rival for rival, last in found.items() if last not in GONE]
        return next((rival for rival in present if found[rival] is Kind.CONFIRMED), next(iter(present), None))

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
        await commit_valid(tools, again, lambda txid, history: len(history) == gone[txid])
