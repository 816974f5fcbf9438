"""Outcomes of whales that are no longer in the mempool. They come from requests to the backend; none is guessed."""

from collections.abc import Callable, Container, Iterable
from itertools import islice

from msgspec import Struct

from whaled.backfill.context import BATCH, Context
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Kind, Whale
from whaled.source import BackendError, MempoolChange
from whaled.tables import Tables
from whaled.whales import lifecycle
from whaled.whales.conflicts import rivals_of
from whaled.whales.lifecycle import lacks_outcome

# The next message of the stream usually explains why a whale left (a block, a replacement): the first request waits for
# it.
FIRST_CHECK_S = 3.0
# Interval of further requests while a whale is neither in a block nor in the mempool, until `drop_after` has passed.
RECHECK_S = 30.0
PAGE = 500
# Missing whales to follow at a time, with the outputs that each spends: with a threshold near zero, a node that loses
# its mempool makes many of them. The next mempool comparison finds those beyond.
MISSING_LIMIT = 10_000
# Replaced and dropped whales are looked for in the mempool for this time; nodes forget a transaction after 14 days.
GONE_S = 14 * 86400.0
GONE_LIMIT = 20_000
# At a start, whales that were replaced in this time after a confirmation are checked again.
RECENT_S = 3600.0
RECENT_LIMIT = 1_000
# The most recently dropped whales are watched for a transaction that spends the same outputs, at most this many.
WATCHED_LIMIT = 1_000
# A larger frame is the whole mempool of a restarted backend. Reading all outputs that it spends would take seconds.
FRAME_LIMIT_BYTES = 32 * 1024 * 1024
# Before a whale is dropped, the blocks since its alert are searched for a transaction that spends the same outputs, at
# most this many: a day of blocks.
SEARCHED_BLOCKS = 144
# This many of the newest blocks, and each new one, are searched as soon as the backend does not know an outcome: after
# a restart it does not name the replacement that was mined meanwhile.
NEWEST_BLOCKS = 6
# At most this many inputs of a missing whale are looked up at electrs: a replacement mostly spends all of them.
SPENT_LIMIT = 10
# A miner's clock may be ahead or behind by this much.
BLOCK_CLOCK_S = 7200.0
# Keys of the searches through blocks; the other keys are the txids of whales.
DROP = "drop"
NEWEST = "newest"


class Missing(Struct):
    """A whale that left the mempool.

    It has the times when that was noticed and of the next check (monotonic), and the hashes of the blocks that were
    searched for its replacement, None before its first check.
    """

    whale: Whale
    since: float
    due: float
    searched: set[str] | None = None

    def is_searched(self, block: str) -> bool:
        """Return whether this block was searched."""
        return self.searched is not None and block in self.searched


class Outcomes:
    """Finds the outcomes of whales that left the mempool, at most `MISSING_LIMIT` at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._backoff = Backoff(context.monotonic)
        self._turns = Turns(context, self._backoff, context.settings.concurrency)
        self._missing: dict[str, Missing] = {}
        # Missing whales without an outcome after their grace period. They are dropped once blocks have been searched,
        # which takes long.
        self._expired: dict[str, None] = {}
        self._searches = Turns(context, self._backoff, 1)
        # Whether the newest blocks are to be searched for replacements of whales that the backend does not know.
        self._is_search_due = False
        # The whale that spends each outpoint, of those that are missing or were dropped, and the outpoints of each.
        self._watched: dict[str, str] = {}
        self._outpoints: dict[str, list[str]] = {}
        # The watched whales that were dropped, the newest last.
        self._dropped: dict[str, None] = {}
        # Transactions of the stream that spend an output which a watched whale spends, by that whale.
        self._spenders: dict[str, str] = {}
        self._tables = Tables(self._missing, self._watched, self._outpoints)

    @property
    def unresolved(self) -> int:
        """Number of whales that left the mempool and have no outcome yet."""
        return len(self._missing)

    def next_due(self) -> float | None:
        """Return when there is something to do next (monotonic), None if there is nothing."""
        if self._spenders:
            return self._context.monotonic()
        dues = [
            max(missing.due, self._backoff.due(txid))
            for txid, missing in self._missing.items()
            if txid not in self._expired and not self._turns.is_running(txid)
        ]
        for key, is_due in ((DROP, bool(self._expired)), (NEWEST, self._is_search_due)):
            if is_due and not self._searches.is_running(key):
                dues.append(max(self._context.monotonic(), self._backoff.due(key)))
        return min(dues, default=None)

    def on_change(self, change: MempoolChange) -> None:
        """Look for transactions that spend an output which a watched whale spends, and for whales that returned.

        A backend does not report every replacement: not after a restart, and not if the new transaction pays the lower
        fee by itself (package RBF).
        """
        entered = change.entered
        if self._watched and entered.added and entered.size_bytes <= FRAME_LIMIT_BYTES:
            for outpoint, by in entered.spending(self._watched).items():
                if self._watched[outpoint] != by:
                    self._spenders[self._watched[outpoint]] = by
        # The stream announced them: one that leaves again gets a full grace period again.
        for glimpse in entered.added:
            if glimpse.txid in self._missing:
                self._stop(glimpse.txid)

    async def on_left(self, txids: Iterable[str]) -> None:
        """Follow those of these transactions that are whales: they are no longer in the mempool."""
        now = self._context.monotonic()
        whales = await self._context.event_log.whales(txids)
        room = max(0, MISSING_LIMIT - len(self._missing))
        new = dict(islice(((txid, whale) for txid, whale in whales.items() if txid not in self._missing), room))
        await self._watch(new)
        for txid, whale in new.items():
            self._missing.setdefault(txid, Missing(whale, now, now + FIRST_CHECK_S))

    async def _watch(self, txids: Iterable[str]) -> None:
        for txid, outpoints in (await self._context.event_log.outpoints(txids)).items():
            self._watched.update(dict.fromkeys(outpoints, txid))
            self._outpoints[txid] = outpoints

    def _unwatch(self, txid: str) -> None:
        for outpoint in self._outpoints.pop(txid, ()):
            if self._watched.get(outpoint) == txid:  # else another whale spends it as well
                del self._watched[outpoint]
        self._dropped.pop(txid, None)
        self._spenders.pop(txid, None)

    def _watch_dropped(self, txids: Iterable[str]) -> None:
        """Keep watching these dropped whales, the newest last, and stop watching the oldest ones beyond the limit."""
        for txid in txids:
            self._dropped.pop(txid, None)
            self._dropped[txid] = None
        while len(self._dropped) > WATCHED_LIMIT:
            oldest = next(iter(self._dropped))
            del self._dropped[oldest]
            if oldest not in self._missing:
                self._unwatch(oldest)

    async def begin(self) -> None:
        """Resume after a start: follow recently replaced whales that may be confirmed, and watch dropped ones."""
        log = self._context.event_log
        recent = await log.gone_since(self._context.clock() - RECENT_S, RECENT_LIMIT)
        histories = await log.histories(recent)
        await self.on_left(txid for txid, history in histories.items() if lacks_outcome(history))
        gone = await self.recently_gone()
        histories = await log.histories(gone)
        dropped = [txid for txid in gone if txid in histories and histories[txid][-1].kind is Kind.DROPPED]
        await self._watch(dropped[:WATCHED_LIMIT])
        self._watch_dropped(reversed(dropped[:WATCHED_LIMIT]))

    async def recently_gone(self) -> dict[str, int]:
        """Return the replaced and dropped whales, with the number of events of each.

        They should not be in the mempool. To be called before the mempool is requested.
        """
        return await self._context.event_log.gone_since(self._context.clock() - GONE_S, GONE_LIMIT)

    async def compare(self, mempool: set[str], is_in_stream: Callable[[str], bool]) -> None:
        """Follow pending whales that are in neither of the two mempools.

        One is this mempool, which REST returned, and the other that of the stream: behind a load balancer they differ.
        """
        after = 0
        while events := await self._context.event_log.pending(after, PAGE):
            after = events[-1].offset
            pending = (event.whale.alert.transaction_id for event in events)
            await self.on_left([txid for txid in pending if txid not in mempool and not is_in_stream(txid)])

    async def run(self) -> bool:
        """Check the whales that are due, as far as the turn allows.

        Returns False if there are more. Raises BackendError; they stay due.
        """
        context = self._context
        self._tables.shrink()
        await self._commit_spenders()
        now = context.monotonic()
        due = [
            txid
            for txid, missing in self._missing.items()
            if missing.due <= now
            and self._backoff.is_due(txid)
            and txid not in self._expired
            and not self._turns.is_running(txid)
        ]
        histories = await context.event_log.histories(due)
        # Retention may have removed the events of a whale, and with them the whale.
        unresolved = [txid for txid in due if txid in histories and lacks_outcome(histories[txid])]
        for txid in set(due) - set(unresolved):
            self._stop(txid)  # the stream or a scan has reported its outcome
        is_done = await self._check(unresolved, now) if unresolved else True
        if self._is_search_due and self._backoff.is_due(NEWEST):
            await self._searches.take([NEWEST], self._search_newest)
        if self._expired and self._backoff.is_due(DROP):
            await self._searches.take([DROP], self._drop)
        return is_done

    async def _check(self, unresolved: list[str], now: float) -> bool:
        context = self._context
        mempool = set(await context.backend.mempool())

        async def request(txid: str) -> None:
            missing = self._missing.get(txid)
            if missing is None or txid in mempool or await self._resolve(txid, missing, mempool):
                if self._missing.get(txid) is missing:  # else it returned and left again meanwhile
                    self._stop(txid)
            elif self._missing.get(txid) is missing:
                if missing.searched is None:
                    missing.searched = set()
                self._is_search_due = True
                if missing.since <= now - context.settings.drop_after:
                    self._expired[txid] = None

        batch = unresolved[:BATCH]
        is_done = await self._turns.take(batch, request)
        for txid in batch:
            missing = self._missing.get(txid)
            if missing is not None and missing.due <= now:  # without a response
                missing.due = now + RECHECK_S
        return is_done and len(unresolved) <= BATCH

    async def _commit_spenders(self) -> None:
        """Commit the replacements of watched whales by transactions of the stream that spend the same outputs."""
        spenders, self._spenders = self._spenders, {}
        if not spenders:
            return
        whales = await self._context.event_log.whales(spenders)
        now = self._context.clock()
        await self._context.commit_valid(
            [lifecycle.replaced(whale, spenders[txid], now) for txid, whale in whales.items()]
        )
        for txid in spenders:
            self._stop(txid)

    async def _drop(self, _: str) -> None:
        """Drop the whales whose grace period has passed.

        Except those that a transaction in a block replaced, and those that are in the mempool again: the earlier
        responses are seconds or minutes old by now.
        """
        context = self._context
        expired = {txid: self._missing[txid] for txid in self._expired if txid in self._missing}
        replaced = await self._replaced_in_blocks(expired, SEARCHED_BLOCKS)
        mempool = set(await context.backend.mempool())
        drafts = [
            replaced.get(txid) or lifecycle.dropped(missing.whale, context.clock())
            for txid, missing in expired.items()
            if txid not in mempool
        ]
        await context.commit_valid(drafts, lambda txid, _: self._missing.get(txid) is expired[txid])
        for txid, missing in expired.items():
            self._expired.pop(txid, None)
            if self._missing.get(txid) is missing:
                self._forget(txid)
                if txid in replaced or txid in mempool:
                    self._unwatch(txid)
                else:
                    self._watch_dropped([txid])

    async def _search_newest(self, _: str) -> None:
        """Search the newest blocks for replacements of the whales that the backend does not know."""
        self._is_search_due = False
        checked = {txid: missing for txid, missing in self._missing.items() if missing.searched is not None}
        try:
            replaced = await self._replaced_in_blocks(checked, NEWEST_BLOCKS)
        except BackendError:
            self._is_search_due = True
            raise
        await self._context.commit_valid(
            list(replaced.values()), lambda txid, _: self._missing.get(txid) is checked[txid]
        )
        for txid in replaced:
            if self._missing.get(txid) is checked[txid]:
                self._stop(txid)

    async def _replaced_in_blocks(self, whales: dict[str, Missing], limit: int) -> dict[str, Draft]:
        """Return the replacements of those whales that conflict with a transaction in a block.

        That transaction spends an output that the whale spends: it was sent directly to a miner, or mined while the
        link was down, so the backend never reported it.

        Searches the newest `limit` scanned blocks, back to the oldest alert, except those that were searched for all of
        these whales.
        """
        context = self._context
        wanted = {outpoint: txid for txid in whales for outpoint in self._outpoints.get(txid, ())}
        alerted = [lifecycle.detected_at(missing.whale.alert) for missing in whales.values()]
        found: dict[str, Draft] = {}
        if not wanted or not alerted:
            return found
        for scan in await context.event_log.newest_scans(limit):
            if scan.mined_at < min(alerted) - BLOCK_CLOCK_S or len(found) == len(whales):
                break
            if all(missing.is_searched(scan.hash) for missing in whales.values()):
                continue
            spenders = await context.backend.spenders(scan.hash, wanted)
            if spenders is None:
                break  # the backend does not have this call
            for outpoint, by in spenders.items():
                txid = wanted[outpoint]
                if by != txid:
                    found[txid] = lifecycle.replaced(whales[txid].whale, by, context.clock())
            for missing in whales.values():
                if missing.searched is not None:
                    missing.searched.add(scan.hash)
        return found

    def _forget(self, txid: str) -> None:
        self._missing.pop(txid, None)
        self._expired.pop(txid, None)
        self._backoff.forget(txid)

    def _stop(self, txid: str) -> None:
        """Stop following and watching a whale."""
        self._forget(txid)
        self._unwatch(txid)

    async def _resolve(self, txid: str, missing: Missing, mempool: Container[str]) -> bool:
        """Commit the outcome of a whale if the backend or the event log knows it. Returns whether it does."""
        context = self._context
        whale = missing.whale
        place = await context.backend.confirmation(txid)
        if place is not None and await context.backend.is_in_chain(place):
            block = await context.backend.block(place.block_hash)
            await context.commit_valid([lifecycle.confirmed(whale, block, context.clock())])
            return True
        by = await context.backend.replacer(txid) or await self._conflicting(txid, mempool) or await self._spender(txid)
        if by is not None:
            draft = lifecycle.replaced(whale, by, context.clock())
            await context.commit_valid([draft], lambda txid, _: self._missing.get(txid) is missing)
            return True
        missing.due = min(context.monotonic() + RECHECK_S, missing.since + context.settings.drop_after)
        return False

    async def _conflicting(self, txid: str, mempool: Container[str]) -> str | None:
        """Return another whale that spends one of the same outputs and is in a block or the mempool.

        Returns None if there is none.
        """
        found = await rivals_of(txid, self._outpoints.get(txid, ()), self._context.event_log)
        confirmed = (other for other, last in found.items() if last is Kind.CONFIRMED)
        return next(confirmed, None) or next((other for other in found if other in mempool), None)

    async def _spender(self, txid: str) -> str | None:
        """Return another transaction that spends one of the first outpoints, as electrs reports it.

        Returns None if it reports none.
        """
        for outpoint in islice(self._outpoints.get(txid, ()), SPENT_LIMIT):
            by = await self._context.backend.spender(outpoint)
            if by is not None and by != txid:
                return by
        return None
