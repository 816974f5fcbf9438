"""What became of whales that are not in the mempool any more. The backend is asked; nothing is guessed."""

from collections.abc import Iterable

from msgspec import Struct

from whaled.model import Kind, Whale
from whaled.reconcile.patience import Patience
from whaled.reconcile.tools import LOT, WAITING, History, Tools, say
from whaled.whales import lifecycle

# The stream's next message mostly tells more (a block, a replacement); then the backend is asked.
FIRST_LOOK_S = 3.0
# Asked again so soon after a transaction was in no block and in no mempool, until `drop_after` is over.
LOOK_AGAIN_S = 30.0
PAGE = 500
# Whales replaced or dropped are looked for in the mempool this long; nodes forget a transaction after 14 days.
REVIVE_S = 14 * 86400.0
REVIVE_LIMIT = 20_000
# Who was said to be replaced so long ago or less when whaled starts is looked at again, if it was confirmed before.
RECENT_S = 3600.0
RECENT_LIMIT = 1_000


def is_open(history: History) -> bool:
    """Whether that may not be the last word: it waits, or was called replaced after a scan found it in a block. The
    stream is behind the node: it may have been speaking of what was before that block.
    """
    last = [kind for kind, _ in history[-2:]]
    return last[-1] in WAITING or last == [Kind.CONFIRMED, Kind.REPLACED]


class Missing(Struct):
    """A whale that left the mempool: when that was noticed, and when to ask next (monotonic)."""

    whale: Whale
    since: float
    due: float


class Fates:
    """Whales whose fate is not known. No more than are pending."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._patience = Patience(tools.monotonic)
        self._missing: dict[str, Missing] = {}

    @property
    def unresolved(self) -> int:
        """Whales that left the mempool and of which nothing is known yet."""
        return len(self._missing)

    def next_due(self) -> float | None:
        """When to ask next (monotonic)."""
        return min((missing.due for missing in self._missing.values()), default=None)

    async def left(self, txids: Iterable[str]) -> None:
        """These are not in the mempool any more."""
        now = self._tools.monotonic()
        for txid, whale in (await self._tools.log.whales(txids)).items():
            self._missing.setdefault(txid, Missing(whale, now, now + FIRST_LOOK_S))

    def returned(self, txids: Iterable[str]) -> None:
        """The stream brought these. Who leaves again has all of its grace again."""
        for txid in txids:
            if txid in self._missing:
                self._forget(txid)

    async def begin(self) -> None:
        """What a start takes up again."""
        recent = await self._tools.log.gone_since(self._tools.clock() - RECENT_S, RECENT_LIMIT)
        histories = await self._tools.log.histories(recent)
        await self.left(txid for txid, history in histories.items() if is_open(history))

    async def gone(self) -> dict[str, int]:
        """The whales that should not be in the mempool, and how many events there are about each. To be asked for
        before the mempool is.
        """
        return await self._tools.log.gone_since(self._tools.clock() - REVIVE_S, REVIVE_LIMIT)

    async def compare(self, mempool: set[str]) -> None:
        """Find the whales that should be in the mempool and are not."""
        after = 0
        while events := await self._tools.log.pending(after, PAGE):
            after = events[-1].offset
            await self.left(txid for event in events if (txid := event.whale.alert.transaction_id) not in mempool)

    async def look(self) -> bool:
        """Ask about a lot of those that are due. False if there are more. Raises RestError; they stay due."""
        tools = self._tools
        now = tools.monotonic()
        due = [txid for txid, missing in self._missing.items() if missing.due <= now]
        histories = await tools.log.histories(due)
        # Retention may have taken what was said of it, and with it the whale.
        unsettled = [txid for txid in due if txid in histories and is_open(histories[txid])]
        for txid in set(due) - set(unsettled):
            self._forget(txid)  # the stream or a scan has told
        if not unsettled:
            return True
        mempool = set(await tools.questions.mempool())
        over: list[str] = []

        async def ask(txid: str) -> None:
            if txid in mempool or txid not in self._missing or await self._is_settled(txid):
                self._forget(txid)
            elif txid in self._missing and self._missing[txid].since <= now - tools.settings.drop_after:
                over.append(txid)

        is_done = await tools.each(unsettled[:LOT], ask, self._patience)
        await self._drop(over)
        for txid in unsettled[:LOT]:
            missing = self._missing.get(txid)
            if missing is not None and missing.due <= now:  # not answered
                missing.due = now + LOOK_AGAIN_S
        return is_done and len(unsettled) <= LOT

    async def _drop(self, txids: list[str]) -> None:
        """Their grace is over, and nobody knows what became of them. The answers are seconds old by now, or minutes."""
        if not txids:
            return
        tools = self._tools
        mempool = set(await tools.questions.mempool())
        drafts = [
            lifecycle.dropped(self._missing[txid].whale, tools.clock())
            for txid in txids
            if txid in self._missing and txid not in mempool
        ]
        await say(tools, drafts, self._is_missing)
        for txid in txids:
            self._forget(txid)

    def _is_missing(self, txid: str, _: History) -> bool:
        return txid in self._missing

    def _forget(self, txid: str) -> None:
        self._missing.pop(txid, None)
        self._patience.forget(txid)

    async def _is_settled(self, txid: str) -> bool:
        tools = self._tools
        missing = self._missing[txid]
        whale = missing.whale
        place = await tools.questions.confirmation(txid)
        if place is not None and await tools.questions.block_hash(place.block_height) == place.block_hash:
            block = await tools.questions.block(place.block_hash)
            await say(tools, [lifecycle.confirmed(whale, block, tools.clock())])
            return True
        replacer = await tools.questions.replacer(txid)
        if replacer is not None:
            await say(tools, [lifecycle.replaced(whale, replacer, tools.clock())], self._is_missing)
            return True
        missing.due = min(tools.monotonic() + LOOK_AGAIN_S, missing.since + tools.settings.drop_after)
        return False
