"""Every block since the first start is scanned for what the stream did not tell; what left the chain is undone.

The scans that are stored stand one upon the other: each run of heights without a hole is a piece of one chain. So it
is enough to find the newest that is still in the chain.
"""

from datetime import datetime

import structlog

from whaled.model import Block, Draft, Kind, Market, Source, Whale
from whaled.reconcile.coverage import Sighting, Spans, covers, scan_of
from whaled.reconcile.losers import Losers
from whaled.reconcile.patience import Patience
from whaled.reconcile.start import FIRST_KEY, Start, blocks_at_start, standing_below
from whaled.reconcile.tools import GENERAL, Tools, say
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.questions import Summary
from whaled.whales import lifecycle

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Every confirmation up to this offset was held against the chain.
VERIFIED_KEY = "verified_offset"
# Blocks scanned in one go; then others have their turn.
BLOCKS_LOT = 5
PAGE = 500
# Years of blocks are looked through so many at a time.
PAST_PAGE = 2_000
# Times of blocks that were heard, remembered until they are scanned.
HEARD_LIMIT = 200
# Before a block that has none before it.
BLOCK_SPACING_S = 600.0


class Blocks:
    """Follows the best chain by asking for it: no backend tells a reorganisation reliably."""

    def __init__(self, tools: Tools, start: Start, spans: Spans, losers: Losers) -> None:
        self._tools = tools
        self._start = start
        self._spans = spans
        self._losers = losers
        self._patience = Patience(tools.monotonic)
        self._heard: dict[str, float] = {}
        # What was there at the first start, just below the blocks that are followed: held against the chain like those.
        self._base: dict[int, str] = {}
        self.behind = 0
        # Scanned, and whales found, since the last time that nothing was missing.
        self._caught_up = self._found = 0
        # What was scanned below the blocks that are followed now is in the chain, as far as it was asked for.
        self._is_past_sound = False
        # Whales went from a dead block to nobody knows where. Whoever has looked sets it back.
        self.has_undone = False

    def heard(self, block: Block, now: float) -> None:
        """The stream brought this block."""
        before = Block(
            height=block.height - 1, hash=block.previous_hash or "", previous_hash=None, timestamp=block.timestamp
        )
        self._start.told([before])
        self._heard[block.hash] = now
        self.behind += 1  # until the next look counts them
        if len(self._heard) > HEARD_LIMIT:
            del self._heard[next(iter(self._heard))]

    def next_due(self) -> float | None:
        """When to ask again for a block that could not be scanned (monotonic)."""
        return self._patience.next_due()

    async def catch_up(self) -> bool:
        """Undo what is dead, then scan a lot of what is missing, newest first. False if there is more to do now.

        Raises RestError; everything that was scanned until then is stored.
        """
        tools = self._tools
        tip = await tools.questions.tip_height()
        tip_hash = await tools.questions.block_hash(tip)
        if tip_hash is None:
            return True  # the chain got shorter: the next block tells
        low = await self._bounded(await self._first(tip), tip, tip_hash)
        self._base = standing_below(await blocks_at_start(tools.log), low)
        scans = await tools.log.scans(low, tip + tools.settings.max_blocks)
        scanned = self._base | {scan.height: scan.hash for scan in scans}
        dead = await self._dead(scanned, tip, tip_hash)
        await self._undo_all(dead)
        for height in dead:
            del scanned[height]
        low = min([low, *dead])
        if not scanned:
            self._is_past_sound = False  # nothing that lives stands upon it
        # Before anything is scanned above: then nobody could tell any more whether it stands upon what is below.
        await self._undo_past(low)
        missing = [height for height in range(tip, low - 1, -1) if height not in scanned]
        self.behind = len(missing)
        if len(missing) > 1 and not self._caught_up:
            log.info("catching up with the chain", blocks=len(missing), tip=tip)
        self._patience.keep(str(height) for height in missing)
        due = [height for height in missing if self._patience.is_due(str(height))]

        async def fill(height: str) -> None:
            await self._fill(int(height), scanned, tip, tip_hash)

        is_done = await tools.each([str(height) for height in due[:BLOCKS_LOT]], fill, self._patience)
        if not is_done or len(due) > BLOCKS_LOT:
            return False
        if not self.behind:
            if self._caught_up > 1:
                log.info("caught up with the chain", blocks=self._caught_up, whales=self._found, tip=tip)
            self._caught_up = self._found = 0
        await self._undo_unscanned(low, set(scanned.values()))
        return True

    async def _first(self, tip: int) -> int:
        stored = await self._tools.log.state(FIRST_KEY)
        if stored is not None:
            return int(stored)
        # The tip that was told, maybe to a start that was killed: a block that came since is not to be missed.
        await self._start.keep()
        told = await blocks_at_start(self._tools.log)
        first = min(tip, told[-1].height if told else tip) + 1
        await self._tools.log.set_state(FIRST_KEY, str(first))
        log.info("first start: blocks are scanned from here on", height=first)
        return first

    async def _bounded(self, first: int, tip: int, tip_hash: str) -> int:
        low = tip - self._tools.settings.max_blocks + 1
        if first >= low:
            return first
        known = len(await self._tools.log.scans(first, low - 1))
        if low - first > known:
            await self._block_at(tip_hash, tip)  # one answer that is wrong must not pass over all that is to come
            log.warning(
                "blocks further back than backfill.max_blocks are not scanned",
                blocks=low - first - known,
                first=first,
                last=low - 1,
            )
            self._tools.meter.skipped(low - first - known)
            self._is_past_sound = False
        await self._tools.log.set_state(FIRST_KEY, str(low))
        return low

    async def _dead(self, scanned: dict[int, str], tip: int, tip_hash: str) -> dict[int, str]:
        """The scans that are not in the chain any more, descending.

        A node that is only behind has not lost what it has not reached: what is above its tip is dead only if
        something below is, too.
        """
        dead: dict[int, str] = {}
        for height in sorted(scanned, reverse=True):
            there = None
            if height <= tip:
                there = tip_hash if height == tip else await self._tools.questions.block_hash(height)
                if there is None:
                    return {}  # two nodes that differ answer in turn: nothing is known
            if there == scanned[height]:
                break
            dead[height] = scanned[height]
        return dead if min(dead, default=tip + 1) <= tip else {}

    async def _undo_past(self, low: int) -> None:
        """Undo what died below the blocks that are followed: a reorganisation while nobody listened may lie deeper than
        `backfill.max_blocks`. Each run of heights without a hole is asked for from its top down, until one is alive.
        """
        if self._is_past_sound:
            return
        tools = self._tools
        dead: dict[int, str] = {}
        alive: int | None = None
        height = low
        while page := await tools.log.newest_scans(PAST_PAGE, height):
            for scan in page:
                height = scan.height
                if height + 1 != alive:  # else that one stands upon this one
                    there = await tools.questions.block_hash(height)
                    if there is None:
                        return  # the chain got shorter: the next block tells
                    if there != scan.hash:
                        dead[height] = scan.hash
                        continue
                alive = height
        await self._undo_all(dead)
        self._is_past_sound = True

    async def _undo_all(self, dead: dict[int, str]) -> None:
        """From the tip down, as the node takes them off."""
        for height, block_hash in dead.items():
            await self._undo(height, block_hash)
        if dead:
            self._tools.meter.reorganised(len(dead))
            log.warning("blocks left the chain", depth=len(dead), height=min(dead))

    async def _undo(self, height: int, block_hash: str) -> None:
        tools = self._tools
        whales = await tools.log.confirmed_in(block_hash)
        await say(tools, [lifecycle.pending_again(whale, block_hash, tools.clock()) for whale in whales])
        await tools.log.forget_scan(height)
        if self._base.pop(height, None) is not None:  # who took its place was mined since
            await tools.log.set_state(FIRST_KEY, str(height))
        self.has_undone = True

    async def _undo_unscanned(self, low: int, hashes: set[str]) -> None:
        """Undo confirmations in blocks that died before they could be scanned: the stream told of them, or a scan was
        cut short between its commit and its row.
        """
        tools = self._tools
        stored = await tools.log.state(VERIFIED_KEY)
        start = after = int(stored) if stored is not None else 0
        verified: int | None = None
        alive: dict[str, bool] = {}
        while events := await tools.log.between(after, tools.log.head, PAGE):
            after = events[-1].offset
            for event in events:
                update = event.update
                if event.kind is not Kind.CONFIRMED or update is None or update.block_hash in hashes:
                    continue
                block_hash, height = update.block_hash, update.block_height
                if block_hash is None or height is None:
                    continue
                if block_hash not in alive:
                    alive[block_hash] = await tools.questions.block_hash(height) in {None, block_hash}
                if not alive[block_hash]:
                    again = lifecycle.pending_again(event.whale, block_hash, tools.clock())
                    self.has_undone = await say(tools, [again]) or self.has_undone
                elif verified is None and height >= low:  # to be scanned yet, and looked at again then
                    verified = event.offset - 1
        verified = after if verified is None else verified
        if verified != start:
            await tools.log.set_state(VERIFIED_KEY, str(verified))

    async def _fill(self, height: int, scanned: dict[int, str], tip: int, tip_hash: str) -> None:
        """Scan the block that belongs at a height."""
        if height == tip:
            block_hash: str | None = tip_hash
        elif height + 1 in scanned:
            block_hash = (await self._tools.questions.block(scanned[height + 1])).previous_hash
        else:
            block_hash = await self._tools.questions.block_hash(height)
        if block_hash is None:
            return  # the chain got shorter: the next block tells
        block = await self._scan(block_hash, height)
        scanned[height] = block_hash
        self.behind -= 1
        below = scanned.get(height - 1)
        if below is not None and below != block.previous_hash:
            await self._undo(height - 1, scanned.pop(height - 1))
            self.behind += 1

    async def _block_at(self, block_hash: str, height: int) -> Block:
        block = await self._tools.questions.block(block_hash)
        if block.height != height:
            raise RestError(RestFailure.GARBAGE, f"block/{block_hash}: height {block.height}, expected {height}")
        return block

    async def _scan(self, block_hash: str, height: int) -> Block:
        tools = self._tools
        block = await self._block_at(block_hash, height)
        entries = await tools.questions.summary(block_hash)
        known = await tools.log.whales(entry.txid for entry in entries)
        now = tools.clock()
        at = self._heard.get(block_hash, float(block.timestamp))
        await say(tools, [lifecycle.confirmed(whale, block, now) for whale in known.values()])
        sightings = [_sighting(whale, at) for whale in known.values()]
        problem: RestError | None = None
        for entry in entries:
            if entry.value >= tools.committer.minimum_sat and entry.txid not in known:
                try:
                    found = await self._missed(block, entry, now)
                except RestError as error:
                    if error.reason in GENERAL:
                        raise
                    problem = problem or error  # the others need not wait for it
                else:
                    await say(tools, found)
                    sightings += [Sighting(None)] * any(draft.kind is Kind.CONFIRMED for draft in found)
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: they would keep each other, and the answer that was read
        is_missed = any(seen.lead_s is None for seen in sightings)
        missed = self._spans.why_missed(await self._before(block) if is_missed else at, at)
        await tools.log.put_scan(scan_of(block.height, block.hash, float(block.timestamp), now, sightings, missed))
        self._heard.pop(block_hash, None)
        self._caught_up += 1
        self._found += sum(seen.lead_s is None for seen in sightings)
        tools.meter.scanned(
            covers(sightings, missed),
            [seen.lead_s for seen in sightings if seen.lead_s is not None and seen.lead_s > 0],
        )
        return block

    async def _missed(self, block: Block, entry: Summary, now: float) -> list[Draft]:
        """What is to be said of a whale that nobody knew: its alert, its confirmation, and those it replaced."""
        tools = self._tools
        transaction = await tools.questions.mined(block.hash, entry)
        market = Market(price=tools.committer.market.price, moment=float(block.timestamp))
        family = await tools.questions.family(entry.txid)
        replaced = [each.txid for each in family if each.replaced_by == entry.txid]
        known = await tools.log.whales(replaced)
        whale = tools.committer.assess(
            transaction,
            source=Source.BLOCK,
            now=now,
            market=market,
            replaces=next((old for old in replaced if old in known), replaced[0] if replaced else None),
        )
        if whale is None:
            return []
        return [
            *await self._losers.drafts(family),
            lifecycle.alerted(whale, now),
            *(lifecycle.replaced(loser, entry.txid, now) for loser in known.values()),
            lifecycle.confirmed(whale, block, now),
        ]

    async def _before(self, block: Block) -> float:
        """When the block before was mined."""
        before = await self._tools.log.scans(block.height - 1, block.height - 1)
        if before:
            return before[0].mined_at
        if block.previous_hash is None:
            return block.timestamp - BLOCK_SPACING_S
        return float((await self._tools.questions.block(block.previous_hash)).timestamp)


def _sighting(whale: Whale, block_at: float) -> Sighting:
    if whale.alert.source is Source.BLOCK:
        return Sighting(None)
    return Sighting(block_at - datetime.fromisoformat(whale.alert.detection_timestamp).timestamp())
