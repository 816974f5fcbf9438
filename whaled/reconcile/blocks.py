"""Every block since the first start is scanned for what the stream did not tell; what left the chain is undone."""

import asyncio
from datetime import datetime

import structlog

from whaled.model import Block, Market, Scan, Source, Whale
from whaled.reconcile.coverage import Sighting, Spans, covers, scan_of
from whaled.reconcile.tools import Tools, say
from whaled.upstream.questions import Summary
from whaled.whales import lifecycle

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

FIRST_KEY = "first_block"
# A price of now says nothing about a block that is older than this.
PRICE_VALID_S = 7200.0
# Times of blocks that were heard, remembered until they are scanned.
HEARD_LIMIT = 200
# Assumed between two blocks where the one before is unknown.
BLOCK_SPACING_S = 600.0


class Blocks:
    """Follows the best chain by asking for it: no backend tells a reorganisation reliably."""

    def __init__(self, tools: Tools, spans: Spans) -> None:
        self._tools = tools
        self._spans = spans
        self._heard: dict[str, float] = {}
        self.behind = 0

    def heard(self, block: Block, now: float) -> None:
        """The stream brought this block."""
        self._heard[block.hash] = now
        if len(self._heard) > HEARD_LIMIT:
            del self._heard[next(iter(self._heard))]

    async def catch_up(self, is_news: asyncio.Event) -> bool:
        """Scan what is missing, newest first. False if news came meanwhile and there is more to do.

        Raises RestError; everything that was scanned until then is stored.
        """
        tools = self._tools
        is_news.clear()
        tip = await tools.questions.tip_height()
        first = await self._first(tip)
        low = await self._bounded(first, tip)
        await self._undo_dead(low, tip)
        scanned = {scan.height for scan in await tools.log.scans(low, tip)}
        missing = [height for height in range(tip, low - 1, -1) if height not in scanned]
        self.behind = len(missing)
        for height in missing:
            block_hash = await tools.questions.block_hash(height)
            if block_hash is None:
                return True  # the chain got shorter: the next block tells
            await self._scan(block_hash)
            self.behind -= 1
            if is_news.is_set() and self.behind:
                return False
        return True

    async def _first(self, tip: int) -> int:
        stored = await self._tools.log.state(FIRST_KEY)
        if stored is not None:
            return int(stored)
        await self._tools.log.set_state(FIRST_KEY, str(tip + 1))
        log.info("first start: blocks are scanned from here on", height=tip + 1)
        return tip + 1

    async def _bounded(self, first: int, tip: int) -> int:
        low = tip - self._tools.settings.max_blocks + 1
        if first >= low:
            return first
        known = len(await self._tools.log.scans(first, low - 1))
        if low - first > known:
            log.warning("blocks further back than backfill.max_blocks are not scanned", blocks=low - first - known)
            self._tools.meter.skipped(low - first - known)
        await self._tools.log.set_state(FIRST_KEY, str(low))
        return low

    async def _undo_dead(self, low: int, tip: int) -> None:
        """Walk back from the newest scanned block to the first that is still in the chain."""
        tools = self._tools
        dead: list[Scan] = []
        top = await tools.log.scans(low, tip + tools.settings.max_blocks)
        for scan in reversed(top):
            if scan.height <= tip and await tools.questions.block_hash(scan.height) == scan.hash:
                break
            dead.append(scan)
        for scan in dead:  # from the tip down, as the node takes them off
            await self._undo(scan)
        if dead:
            tools.meter.reorganised(len(dead))
            log.warning("blocks left the chain", depth=len(dead), height=dead[-1].height)

    async def _undo(self, scan: Scan) -> None:
        tools = self._tools
        whales = await tools.log.confirmed_in(scan.hash)
        await say(tools, [lifecycle.pending_again(whale, scan.hash, tools.clock()) for whale in whales])
        await tools.log.forget_scan(scan.height)

    async def _scan(self, block_hash: str) -> None:
        tools = self._tools
        block = await tools.questions.block(block_hash)
        entries = await tools.questions.summary(block_hash)
        known = await tools.log.whales(entry.txid for entry in entries)
        now = tools.clock()
        at = self._heard.get(block_hash, float(block.timestamp))
        drafts = [lifecycle.confirmed(whale, block, now) for whale in known.values()]
        sightings = [_sighting(whale, at) for whale in known.values()]
        for entry in entries:
            if entry.value >= tools.committer.minimum_sat and entry.txid not in known:
                whale = await self._missed(block, entry, now)
                if whale is not None:
                    drafts += [lifecycle.alerted(whale, now), lifecycle.confirmed(whale, block, now)]
                    sightings.append(Sighting(None))
        await say(tools, drafts)
        missed = self._spans.why_missed(await self._before(block), at)
        await tools.log.put_scan(scan_of(block.height, block.hash, float(block.timestamp), now, sightings, missed))
        self._heard.pop(block_hash, None)
        tools.meter.scanned(
            covers(sightings, missed),
            [seen.lead_s for seen in sightings if seen.lead_s is not None and seen.lead_s > 0],
        )

    async def _missed(self, block: Block, entry: Summary, now: float) -> Whale | None:
        tools = self._tools
        transaction = await tools.questions.mined(block.hash, entry)
        if transaction is None:
            log.warning("a whale of a block cannot be fetched", txid=entry.txid, height=block.height)
            return None
        is_old = now - block.timestamp > PRICE_VALID_S
        market = Market(btc_usd=None if is_old else tools.committer.market.btc_usd)
        return tools.committer.assess(transaction, source=Source.BLOCK, now=now, market=market)

    async def _before(self, block: Block) -> float:
        """When the block before was mined."""
        before = await self._tools.log.scans(block.height - 1, block.height - 1)
        return before[0].mined_at if before else block.timestamp - BLOCK_SPACING_S


def _sighting(whale: Whale, block_at: float) -> Sighting:
    if whale.alert.source is Source.BLOCK:
        return Sighting(None)
    return Sighting(block_at - datetime.fromisoformat(whale.alert.detection_timestamp).timestamp())
