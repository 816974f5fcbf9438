"""What became of whales that are not in the mempool any more. The backend is asked; nothing is guessed."""

from collections.abc import Iterable

import structlog
from msgspec import Struct

from whaled.model import Kind, Whale
from whaled.reconcile.tools import Tools, say
from whaled.whales import lifecycle

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The stream's next message mostly tells more (a block, a replacement); then the backend is asked.
FIRST_LOOK_S = 3.0
# Asked again so soon after a transaction was in no block and in no mempool, until `drop_after` is over.
LOOK_AGAIN_S = 30.0
PAGE = 500
# Whales replaced or dropped are looked for in the mempool this long; nodes forget a transaction after 14 days.
REVIVE_S = 14 * 86400.0
REVIVE_LIMIT = 20_000


class Missing(Struct):
    """A whale that left the mempool: when that was noticed, and when to ask next."""

    whale: Whale
    since: float
    due: float


class Fates:
    """Whales whose fate is not known."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._missing: dict[str, Missing] = {}

    @property
    def unresolved(self) -> int:
        """Whales that left the mempool and of which nothing is known yet."""
        return len(self._missing)

    def next_due(self) -> float | None:
        """When to ask next (Unix seconds)."""
        return min((missing.due for missing in self._missing.values()), default=None)

    async def left(self, txids: Iterable[str]) -> None:
        """These are not in the mempool any more."""
        now = self._tools.clock()
        for txid, whale in (await self._tools.log.whales(txids)).items():
            self._missing.setdefault(txid, Missing(whale, now, now + FIRST_LOOK_S))

    async def compare(self, mempool: set[str]) -> list[str]:
        """Find the whales that should be in the mempool and are not. Returns those that are and should not be."""
        tools = self._tools
        after = 0
        while events := await tools.log.pending(after, PAGE):
            after = events[-1].offset
            await self.left(txid for event in events if (txid := event.whale.alert.transaction_id) not in mempool)
        gone = await tools.log.gone_since(tools.clock() - REVIVE_S, REVIVE_LIMIT)
        return [txid for whale in gone if (txid := whale.alert.transaction_id) in mempool]

    async def look(self) -> None:
        """Ask about those that are due. Raises RestError; they stay due."""
        tools = self._tools
        now = tools.clock()
        due = {txid: missing for txid, missing in self._missing.items() if missing.due <= now}
        if not due:
            return
        histories = await tools.log.histories(due)
        open_ = {
            txid: missing for txid, missing in due.items() if histories.get(txid, [(Kind.ALERT, "")])[-1][0] in OPEN
        }
        for settled in due.keys() - open_.keys():
            del self._missing[settled]  # the stream or a scan has told
        if not open_:
            return
        mempool = set(await tools.questions.mempool())
        for txid, missing in open_.items():
            if txid in mempool:
                del self._missing[txid]
            else:
                await self._ask(txid, missing)

    async def _ask(self, txid: str, missing: Missing) -> None:
        tools = self._tools
        now = tools.clock()
        whale = missing.whale
        place = await tools.questions.confirmation(txid)
        if place is not None and await tools.questions.block_hash(place.block_height) == place.block_hash:
            block = await tools.questions.block(place.block_hash)
            await say(tools, [lifecycle.confirmed(whale, block, tools.clock())])
            del self._missing[txid]
            return
        replacer = await tools.questions.replacer(txid)
        if replacer is not None:
            await say(tools, [lifecycle.replaced(whale, replacer, tools.clock())])
            del self._missing[txid]
        elif now - missing.since >= tools.settings.drop_after:
            await say(tools, [lifecycle.dropped(whale, tools.clock())])
            del self._missing[txid]
        else:
            missing.due = min(now + LOOK_AGAIN_S, missing.since + tools.settings.drop_after)


# The newest word about a whale after which more is to come.
OPEN = (Kind.ALERT, Kind.PENDING)
