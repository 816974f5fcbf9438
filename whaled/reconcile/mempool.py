"""The mempool as a whole: what was in it before the stream told changes, and what the stream left out."""

from collections import OrderedDict
from collections.abc import Iterable

import structlog

from whaled.model import Kind, Source
from whaled.reconcile.tools import Tools, say
from whaled.upstream.dialect import Delta, Snapshot
from whaled.whales import lifecycle

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

BEGAN_KEY = "began_at"
# Asked about at once; news may come between two lots.
LOT = 20
# Whales to ask about. A mempool of 300,000 has some hundred; who lowers the threshold to nothing gets the rest later.
CANDIDATES_LIMIT = 50_000
# Transactions of unknown value to ask about; the next sweep finds those beyond.
TAIL_LIMIT = 50_000
# The node knows a transaction before the backend's stream tells it: what is only ahead comes by itself.
TAIL_AFTER_S = 10.0
# Of a txid, enough to recognise it: with a million in memory two are alike once in 10^7 mempools.
KEY_DIGITS = 15


class Mempool:
    """Which transactions have been looked at, and which are still to be asked for.

    The projected blocks of a snapshot give the value of every transaction in them; what is in the mempool and in none
    of them, and was not in the stream either, has to be fetched one by one.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._candidates: OrderedDict[str, None] = OrderedDict()
        self._tail: OrderedDict[str, None] = OrderedDict()
        self._tail_from = 0.0
        self._judged: set[int] = set()

    @property
    def candidates(self) -> int:
        """Whales to ask for."""
        return len(self._candidates)

    @property
    def tail(self) -> int:
        """Transactions of unknown value to ask for."""
        return len(self._tail)

    def snapshot(self, part: Snapshot) -> None:
        """A projected block."""
        self._judged.update(key(stripped.txid) for stripped in part.transactions)
        for txid in part.at_least(self._tools.committer.minimum_sat):
            self._candidate(txid)

    def streamed(self, delta: Delta) -> None:
        """What the stream told was judged when it came."""
        self._judged.update(key(glance.txid) for glance in delta.added)

    def _candidate(self, txid: str) -> None:
        self._candidates[txid] = None
        if len(self._candidates) > CANDIDATES_LIMIT:
            self._judged.discard(key(self._candidates.popitem(last=False)[0]))

    def sweep(self, txids: list[str]) -> None:
        """Compare with the whole mempool: what is in it and was never looked at is asked for."""
        keys = {key(txid): txid for txid in txids}
        self._judged &= keys.keys()
        for found, txid in keys.items():
            if found not in self._judged and len(self._tail) < TAIL_LIMIT:
                self._tail[txid] = None
        self._tail_from = self._tools.clock() + TAIL_AFTER_S

    def next_due(self) -> float | None:
        """When to ask for those of unknown value (Unix seconds), None if there are none."""
        return self._tail_from if self._tail else None

    async def ask_for_candidates(self) -> bool:
        """Ask for a lot of those that are whales. False if there are more. Raises RestError; nothing is lost then."""
        lot = list(self._candidates)[:LOT]
        known = await self._tools.log.whales(lot)
        for txid in lot:
            if txid in known:
                await self._revive(txid)
            else:
                await self._fetch(txid)
            del self._candidates[txid]
        return not self._candidates

    async def ask_for_tail(self) -> bool:
        """Ask for a lot of those of unknown value. False if there are more. Raises RestError; nothing is lost then."""
        if self._tools.clock() < self._tail_from:
            return True
        for txid in list(self._tail)[:LOT]:
            if key(txid) not in self._judged:
                await self._fetch(txid)
                self._judged.add(key(txid))
            self._tail.pop(txid, None)
        return not self._tail

    async def _fetch(self, txid: str) -> None:
        tools = self._tools
        transaction = await tools.questions.transaction(txid)
        # Gone meanwhile, or mined: then it is in a block that is scanned.
        if transaction is None or transaction.is_confirmed or transaction.value_sat < tools.committer.minimum_sat:
            return
        if not tools.settings.first_mempool and await self._is_older(transaction.first_seen):
            return
        replaced = await tools.questions.replaced(txid)
        known = await tools.log.whales(replaced)
        now = tools.clock()
        whale = tools.committer.assess(
            transaction,
            source=Source.SNAPSHOT,
            now=now,
            market=tools.committer.market,
            replaces=next((old for old in replaced if old in known), replaced[0] if replaced else None),
        )
        if whale is not None:
            told = [lifecycle.replaced(loser, txid, now) for loser in known.values()]
            await say(tools, [lifecycle.alerted(whale, now), *told])

    async def _is_older(self, first_seen: int | None) -> bool:
        """Whether the backend had a transaction before whaled's first start."""
        began = await self._tools.log.state(BEGAN_KEY)
        return first_seen is not None and began is not None and first_seen < float(began)

    async def _revive(self, txid: str) -> None:
        """A whale that is in the mempool although it was said to be gone."""
        tools = self._tools
        history = (await tools.log.histories([txid])).get(txid, [])
        if history and history[-1][0] in {Kind.REPLACED, Kind.DROPPED}:
            whale = (await tools.log.whales([txid]))[txid]
            await say(tools, [lifecycle.pending_again(whale, "", tools.clock())])

    async def revive(self, txids: Iterable[str]) -> None:
        """Whales that are in the mempool although they were said to be gone."""
        for txid in txids:
            await self._revive(txid)


def key(txid: str) -> int:
    """A txid in 8 bytes instead of 64 letters."""
    return int(txid[:KEY_DIGITS], 16)
