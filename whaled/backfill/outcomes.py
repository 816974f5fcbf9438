"""What became of whales that are not in the mempool any more. The backend is asked; nothing is guessed."""

import asyncio
from collections.abc import Callable, Container, Iterable
from itertools import islice

from msgspec import Struct

from whaled.backfill.tools import LOT, Tools, commit_valid
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.model import Draft, Kind, Whale
from whaled.tables import Tables
from whaled.upstream.dialect import Delta
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.rawblock import SerialError, spenders_in
from whaled.whales import lifecycle
from whaled.whales.conflicts import rivals_of
from whaled.whales.history import WAITING, History

# The stream's next message mostly tells more (a block, a replacement); then the backend is asked.
FIRST_LOOK_S = 3.0
# Asked again so soon after a transaction was in no block and in no mempool, until `drop_after` is over.
LOOK_AGAIN_S = 30.0
PAGE = 500
# Missing at a time, with what each spends: a node may lose its mempool where the threshold is next to nothing. The
# sweeps find those beyond.
MISSING_LIMIT = 10_000
# Whales replaced or dropped are looked for in the mempool this long; nodes forget a transaction after 14 days.
REVIVE_S = 14 * 86400.0
REVIVE_LIMIT = 20_000
# Who was said to be replaced so long ago or less when whaled starts is looked at again, if it was confirmed before.
RECENT_S = 3600.0
RECENT_LIMIT = 1_000
# Whales that were dropped are watched for a transaction that spends the same; as many as that, the newest.
WATCHED_LIMIT = 1_000
# A frame beyond this is a restarted backend's whole mempool: reading what all of it spends would take seconds.
FRAME_LIMIT_BYTES = 32 * 1024 * 1024
# Before a whale is called dropped, blocks since its alert are searched for what spends the same: a day of them.
SEARCHED_BLOCKS = 144
# The newest ones are searched before that, as soon as the backend does not know what became of a whale, and each new
# block after them: a backend that was restarted does not name what was mined then in its place.
NEWEST_BLOCKS = 6
# Of a missing whale's inputs, as many are looked up at electrs: a replacement mostly spends all of them.
SPENT_LIMIT = 10
# A miner's clock may be this far ahead or behind.
BLOCK_CLOCK_S = 7200.0
# The keys of the searches through blocks, beside the txids of whales.
DROP = "drop"
NEWEST = "newest"


def is_open(history: History) -> bool:
    """Whether that may not be the last word: it waits, or was called replaced after a scan found it in a block. The
    stream is behind the node: it may have been speaking of what was before that block.
    """
    last = [kind for kind, _ in history[-2:]]
    return last[-1] in WAITING or last == [Kind.CONFIRMED, Kind.REPLACED]


class Missing(Struct):
    """A whale that left the mempool: when that was noticed, and when to ask next (monotonic); and the blocks that were
    searched for what replaced it, None before the backend was asked.
    """

    whale: Whale
    since: float
    due: float
    searched: set[str] | None = None

    def is_searched(self, block: str) -> bool:
        """Whether this block is one of them."""
        return self.searched is not None and block in self.searched


class Outcomes:
    """Whales whose fate is not known: `MISSING_LIMIT` at most."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._backoff = Backoff(tools.monotonic)
        self._turns = Turns(tools, self._backoff, tools.settings.concurrency)
        self._missing: dict[str, Missing] = {}
        # Those of which nothing is known when their grace is over. Blocks are searched before they are called dropped,
        # which takes long.
        self._over: dict[str, None] = {}
        self._searching = Turns(tools, self._backoff, 1)
        # Whether the newest blocks are to be searched for what replaced whales that the backend does not know of.
        self._is_search_due = False
        # Which whale spends an outpoint, of those that are missing or were dropped, and the other way round.
        self._watched: dict[str, str] = {}
        self._coins: dict[str, list[str]] = {}
        # Those of them that were dropped, the newest last.
        self._dropped: dict[str, None] = {}
        # Transactions of the stream that spend what a watched whale spends: whale, and the other one.
        self._spent: dict[str, str] = {}
        self._tables = Tables(self._missing, self._watched, self._coins)

    @property
    def unresolved(self) -> int:
        """Whales that left the mempool and of which nothing is known yet."""
        return len(self._missing)

    def next_due(self) -> float | None:
        """When to ask next (monotonic)."""
        if self._spent:
            return self._tools.monotonic()
        dues = [
            max(missing.due, self._backoff.due(txid))
            for txid, missing in self._missing.items()
            if txid not in self._over and not self._turns.is_asking(txid)
        ]
        for key, is_due in ((DROP, bool(self._over)), (NEWEST, self._is_search_due)):
            if is_due and not self._searching.is_asking(key):
                dues.append(max(self._tools.monotonic(), self._backoff.due(key)))
        return min(dues, default=None)

    def streamed(self, delta: Delta) -> None:
        """Look for transactions that spend what a watched whale spends. A backend does not name every pair: not where
        the fee of the new one is lower by itself (package RBF), nor after a restart.
        """
        if self._watched and delta.added_count and len(delta.frame) <= FRAME_LIMIT_BYTES:
            for outpoint, by in delta.spending(self._watched).items():
                if self._watched[outpoint] != by:
                    self._spent[self._watched[outpoint]] = by

    async def left(self, txids: Iterable[str]) -> None:
        """These are not in the mempool any more."""
        now = self._tools.monotonic()
        whales = await self._tools.log.whales(txids)
        room = max(0, MISSING_LIMIT - len(self._missing))
        new = dict(islice(((txid, whale) for txid, whale in whales.items() if txid not in self._missing), room))
        await self._watch(new)
        for txid, whale in new.items():
            self._missing.setdefault(txid, Missing(whale, now, now + FIRST_LOOK_S))

    async def _watch(self, txids: Iterable[str]) -> None:
        for txid, outpoints in (await self._tools.log.outpoints(txids)).items():
            self._watched.update(dict.fromkeys(outpoints, txid))
            self._coins[txid] = outpoints

    def _unwatch(self, txid: str) -> None:
        for outpoint in self._coins.pop(txid, ()):
            if self._watched.get(outpoint) == txid:  # else another whale spends it as well
                del self._watched[outpoint]
        self._dropped.pop(txid, None)
        self._spent.pop(txid, None)

    def _watch_dropped(self, txids: Iterable[str]) -> None:
        """These stay watched, the newest last; those that were dropped long before them do not."""
        for txid in txids:
            self._dropped.pop(txid, None)
            self._dropped[txid] = None
        while len(self._dropped) > WATCHED_LIMIT:
            oldest = next(iter(self._dropped))
            del self._dropped[oldest]
            if oldest not in self._missing:
                self._unwatch(oldest)

    def returned(self, txids: Iterable[str]) -> None:
        """The stream brought these. Who leaves again has all of its grace again."""
        for txid in txids:
            if txid in self._missing:
                self._forget(txid)
                self._unwatch(txid)

    async def begin(self) -> None:
        """What a start takes up again."""
        recent = await self._tools.log.gone_since(self._tools.clock() - RECENT_S, RECENT_LIMIT)
        histories = await self._tools.log.histories(recent)
        await self.left(txid for txid, history in histories.items() if is_open(history))
        gone = await self.gone()
        histories = await self._tools.log.histories(gone)
        dropped = [txid for txid in gone if txid in histories and histories[txid][-1][0] is Kind.DROPPED]
        await self._watch(dropped[:WATCHED_LIMIT])
        self._watch_dropped(reversed(dropped[:WATCHED_LIMIT]))

    async def gone(self) -> dict[str, int]:
        """The whales that should not be in the mempool, and how many events there are about each. To be asked for
        before the mempool is.
        """
        return await self._tools.log.gone_since(self._tools.clock() - REVIVE_S, REVIVE_LIMIT)

    async def compare(self, mempool: set[str], is_shown: Callable[[str], bool]) -> None:
        """Find the whales that should be in the mempool and are not, neither in the stream's (`is_shown`) nor in that
        which REST answers from: behind a load balancer these are two.
        """
        after = 0
        while events := await self._tools.log.pending(after, PAGE):
            after = events[-1].offset
            pending = (event.whale.alert.transaction_id for event in events)
            await self.left([txid for txid in pending if txid not in mempool and not is_shown(txid)])

    async def look(self) -> bool:
        """Ask about those that are due, as far as the turn goes. False if there are more. Raises RestError; they stay
        due.
        """
        tools = self._tools
        self._tables.shrink()
        await self._replace_spent()
        now = tools.monotonic()
        due = [
            txid
            for txid, missing in self._missing.items()
            if missing.due <= now
            and self._backoff.is_due(txid)
            and txid not in self._over
            and not self._turns.is_asking(txid)
        ]
        histories = await tools.log.histories(due)
        # Retention may have taken what was said of it, and with it the whale.
        unsettled = [txid for txid in due if txid in histories and is_open(histories[txid])]
        for txid in set(due) - set(unsettled):
            self._forget(txid)  # the stream or a scan has told
            self._unwatch(txid)
        is_done = await self._ask_about(unsettled, now) if unsettled else True
        if self._is_search_due and self._backoff.is_due(NEWEST):
            await self._searching.take([NEWEST], self._search_newest)
        if self._over and self._backoff.is_due(DROP):
            await self._searching.take([DROP], self._drop)
        return is_done

    async def _ask_about(self, unsettled: list[str], now: float) -> bool:
        tools = self._tools
        mempool = set(await tools.backend.mempool())

        async def ask(txid: str) -> None:
            missing = self._missing.get(txid)
            if missing is None or txid in mempool or await self._is_settled(txid, missing, mempool):
                if self._missing.get(txid) is missing:  # it may have come back and left again
                    self._forget(txid)
                    self._unwatch(txid)
            elif self._missing.get(txid) is missing:
                if missing.searched is None:
                    missing.searched = set()
                self._is_search_due = True
                if missing.since <= now - tools.settings.drop_after:
                    self._over[txid] = None

        is_done = await self._turns.take(unsettled[:LOT], ask)
        for txid in unsettled[:LOT]:
            missing = self._missing.get(txid)
            if missing is not None and missing.due <= now:  # not answered
                missing.due = now + LOOK_AGAIN_S
        return is_done and len(unsettled) <= LOT

    async def _replace_spent(self) -> None:
        """Whales whose coins other transactions of the mempool spend."""
        spent, self._spent = self._spent, {}
        if not spent:
            return
        whales = await self._tools.log.whales(spent)
        now = self._tools.clock()
        await commit_valid(self._tools, [lifecycle.replaced(whale, spent[txid], now) for txid, whale in whales.items()])
        for txid in spent:
            self._forget(txid)
            self._unwatch(txid)

    async def _drop(self, _: str) -> None:
        """Their grace is over, and nobody knows what became of them. The answers are seconds old by now, or minutes."""
        tools = self._tools
        held = {txid: self._missing[txid] for txid in self._over if txid in self._missing}
        replaced = await self._replaced_in_blocks(held, SEARCHED_BLOCKS)
        mempool = set(await tools.backend.mempool())
        drafts = [
            replaced.get(txid) or lifecycle.dropped(missing.whale, tools.clock())
            for txid, missing in held.items()
            if txid not in mempool
        ]
        await commit_valid(tools, drafts, lambda txid, _: self._missing.get(txid) is held[txid])
        for txid, missing in held.items():
            self._over.pop(txid, None)
            if self._missing.get(txid) is missing:
                self._forget(txid)
                if txid in replaced or txid in mempool:
                    self._unwatch(txid)
                else:
                    self._watch_dropped([txid])

    async def _search_newest(self, _: str) -> None:
        """Search blocks that were not searched before for what replaced whales that the backend does not know of."""
        self._is_search_due = False
        held = {txid: missing for txid, missing in self._missing.items() if missing.searched is not None}
        try:
            replaced = await self._replaced_in_blocks(held, NEWEST_BLOCKS)
        except RestError:
            self._is_search_due = True
            raise
        await commit_valid(self._tools, list(replaced.values()), lambda txid, _: self._missing.get(txid) is held[txid])
        for txid in replaced:
            if self._missing.get(txid) is held[txid]:
                self._forget(txid)
                self._unwatch(txid)

    async def _replaced_in_blocks(self, held: dict[str, Missing], limit: int) -> dict[str, Draft]:
        """Those of these whales whose coins a transaction in a block spends that the backend never showed: it was sent
        straight to a miner, or mined while the link was down. The newest blocks scanned since the oldest alert are
        read, unless they were searched for all of these before.
        """
        tools = self._tools
        wanted = {outpoint: txid for txid in held for outpoint in self._coins.get(txid, ())}
        alerted = [lifecycle.detected_at(missing.whale.alert) for missing in held.values()]
        found: dict[str, Draft] = {}
        if not wanted or not alerted:
            return found
        for scan in await tools.log.newest_scans(limit):
            if scan.mined_at < min(alerted) - BLOCK_CLOCK_S or len(found) == len(held):
                break
            if all(missing.is_searched(scan.hash) for missing in held.values()):
                continue
            raw = await tools.backend.raw_block(scan.hash)
            if raw is None:
                break  # a backend without this call
            spenders = await _spenders_in(scan.hash, raw, wanted)
            for outpoint, by in spenders.items():
                txid = wanted[outpoint]
                if by != txid:
                    found[txid] = lifecycle.replaced(held[txid].whale, by, tools.clock())
            for missing in held.values():
                if missing.searched is not None:
                    missing.searched.add(scan.hash)
        return found

    def _forget(self, txid: str) -> None:
        self._missing.pop(txid, None)
        self._over.pop(txid, None)
        self._backoff.forget(txid)

    async def _is_settled(self, txid: str, missing: Missing, mempool: Container[str]) -> bool:
        tools = self._tools
        whale = missing.whale
        place = await tools.backend.confirmation(txid)
        if place is not None and await tools.backend.is_in_chain(place):
            block = await tools.backend.block(place.block_hash)
            await commit_valid(tools, [lifecycle.confirmed(whale, block, tools.clock())])
            return True
        replacer = await tools.backend.replacer(txid) or await self._rival(txid, mempool) or await self._spender(txid)
        if replacer is not None:
            draft = lifecycle.replaced(whale, replacer, tools.clock())
            await commit_valid(tools, [draft], lambda txid, _: self._missing.get(txid) is missing)
            return True
        missing.due = min(tools.monotonic() + LOOK_AGAIN_S, missing.since + tools.settings.drop_after)
        return False

    async def _rival(self, txid: str, mempool: Container[str]) -> str | None:
        """Another whale that spends the same and is in the mempool or in a block, None if there is none."""
        found = await rivals_of(txid, self._coins.get(txid, ()), self._tools.log)
        confirmed = (rival for rival, last in found.items() if last is Kind.CONFIRMED)
        return next(confirmed, None) or next((rival for rival in found if rival in mempool), None)

    async def _spender(self, txid: str) -> str | None:
        """Another transaction that spends one of the first outpoints, where electrs tells it; None if it does not."""
        for outpoint in islice(self._coins.get(txid, ()), SPENT_LIMIT):
            by = await self._tools.backend.spender(outpoint)
            if by is not None and by != txid:
                return by
        return None


async def _spenders_in(block: str, raw: bytes, wanted: Iterable[str]) -> dict[str, str]:
    try:
        # Off the event loop: a block takes a tenth of a second to read.
        return await asyncio.to_thread(spenders_in, raw, wanted)
    except SerialError as error:
        raise RestError(RestFailure.GARBAGE, f"block/{block}/raw: {error}") from error
