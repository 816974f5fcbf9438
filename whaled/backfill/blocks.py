"""Every block since the first start is scanned for what the stream did not tell; what left the chain is undone.

The scans that are stored stand one upon the other: each run of heights without a hole is a piece of one chain. So it
is enough to find the newest that is still in the chain.
"""

import asyncio
from collections.abc import Sequence

import structlog
from msgspec import Struct

from whaled.backfill.coverage import Cover, Sighting, Spans, covers, scan_of
from whaled.backfill.first_run import FIRST_KEY, FirstRun, blocks_at_start, standing_below
from whaled.backfill.replacements import Replacements
from whaled.backfill.tools import GENERAL, Tools, commit_valid
from whaled.backfill.turns import FAILURES_IN_A_ROW, TURN_S, Turns
from whaled.backoff import Backoff
from whaled.model import Block, Draft, Kind, Market, Source, Transaction, Whale
from whaled.upstream.backend import Summary
from whaled.upstream.http import RestError, RestFailure
from whaled.whales import lifecycle

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Every confirmation up to this offset was held against the chain.
VERIFIED_KEY = "verified_offset"
PAGE = 500
# Years of blocks are looked through so many at a time.
PAST_PAGE = 2_000
# Times of blocks that were heard, remembered until they are scanned.
SEEN_LIMIT = 200
# Before a block that has none before it.
BLOCK_SPACING_S = 600.0
# Whales of one block that the backend had never seen are asked about one by one up to here, for what they replaced:
# beyond, those that replaced a whale of the log are known by what they spend.
UNSEEN_LIMIT = 50
# Blocks whose last answers are waited for while the scan goes on with others.
OPENED_LIMIT = 4


class SeenBlock(Struct, frozen=True):
    """When the stream brought a block, and why its whales may be unknown: None if the whole mempool was known."""

    at: float
    excuse: Cover | None


class Opened(Struct):
    """A block that is being scanned. `wanted` are the pages with whales that were not known, by their first index;
    `known` are those that were.
    """

    block: Block
    at: float
    missed: Cover
    wanted: dict[str, list[Summary]]
    known: dict[str, Whale]
    found: int = 0
    problem: RestError | None = None

    @property
    def whales(self) -> int:
        """Whales still to be asked for."""
        return sum(map(len, self.wanted.values()))


class Blocks:
    """Follows the best chain by asking for it: no backend tells a reorganisation reliably."""

    def __init__(self, tools: Tools, start: FirstRun, spans: Spans, replacements: Replacements) -> None:
        self._tools = tools
        self._first_run = start
        self._spans = spans
        self._replacements = replacements
        self._backoff = Backoff(tools.monotonic)
        # Nothing waits there: a page that fails makes its block wait.
        self._turns = Turns(tools, Backoff(tools.monotonic), tools.settings.concurrency)
        self._seen_blocks: dict[str, SeenBlock] = {}
        self._opened: dict[int, Opened] = {}
        # What was there at the first start, just below the blocks that are followed: held against the chain like those.
        self._base: dict[int, str] = {}
        self.behind = 0
        # Scanned, and whales found, since the last time that nothing was missing.
        self._caught_up = self._found = 0
        # What was scanned below the blocks that are followed now is in the chain, as far as it was asked for.
        self._is_past_sound = False
        # Whales went from a dead block to nobody knows where. Whoever has looked sets it back.
        self.has_undone = False

    def observe(self, block: Block, now: float) -> None:
        """The stream brought this block."""
        before = Block(
            height=block.height - 1, hash=block.previous_hash or "", previous_hash=None, timestamp=block.timestamp
        )
        self._first_run.observe([before])
        self._seen_blocks[block.hash] = SeenBlock(now, self._spans.excuse())
        self.behind += 1  # until the next look counts them
        if len(self._seen_blocks) > SEEN_LIMIT:
            del self._seen_blocks[next(iter(self._seen_blocks))]

    @property
    def whales(self) -> int:
        """Whales of the blocks that are being scanned, still to be asked for."""
        return sum(opened.whales for opened in self._opened.values())

    @property
    def is_unfinished(self) -> bool:
        """Whether the scan of a block waits for answers that are on their way, or for its next turn."""
        return bool(self._opened)

    def next_due(self) -> float | None:
        """When to ask again for a block that could not be scanned (monotonic)."""
        return self._backoff.next_due(lambda height: int(height) in self._opened)

    async def catch_up(self) -> bool:
        """Undo what is dead, then scan what is missing, newest first, until the turn is over. False if there is more to
        do now.

        Raises RestError; everything that was scanned until then is stored.
        """
        tools = self._tools
        tip = await tools.backend.tip_height()
        tip_hash = await tools.backend.block_hash(tip)
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
            logger.info("catching up with the chain", blocks=len(missing), tip=tip)
        self._backoff.keep(str(height) for height in missing)
        self._opened = {height: self._opened[height] for height in missing if height in self._opened}
        due = [height for height in missing if self._backoff.is_due(str(height))]
        if not await self._fill_all(due, scanned, tip, tip_hash):
            return False
        if not self.behind:
            if self._caught_up > 1:
                logger.info("caught up with the chain", blocks=self._caught_up, whales=self._found, tip=tip)
            self._caught_up = self._found = 0
        await self._undo_unscanned(low, set(scanned.values()))
        return True

    async def _first(self, tip: int) -> int:
        stored = await self._tools.log.state(FIRST_KEY)
        if stored is not None:
            return int(stored)
        # The tip that was shown, maybe to a start that was killed: a block that came since is not to be missed.
        await self._first_run.keep()
        shown = await blocks_at_start(self._tools.log)
        first = min(tip, shown[-1].height if shown else tip) + 1
        scans = await self._tools.log.newest_scans(self._tools.settings.max_blocks)
        if scans:  # the note is lost: what came since they were scanned is not to be missed
            first = min(first, scans[-1].height)
            logger.warning("the note of the first block to scan is lost: blocks are scanned from here on", height=first)
        else:
            logger.info("first start: blocks are scanned from here on", height=first)
        await self._tools.log.set_state(FIRST_KEY, str(first))
        return first

    async def _bounded(self, first: int, tip: int, tip_hash: str) -> int:
        low = tip - self._tools.settings.max_blocks + 1
        if first >= low:
            return first
        known = len(await self._tools.log.scans(first, low - 1))
        if low - first > known:
            await self._block_at(tip_hash, tip)  # one answer that is wrong must not pass over all that is to come
            logger.warning(
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
                there = tip_hash if height == tip else await self._tools.backend.block_hash(height)
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
                    there = await tools.backend.block_hash(height)
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
            logger.warning("blocks left the chain", depth=len(dead), height=min(dead))

    async def _undo(self, height: int, block_hash: str) -> None:
        tools = self._tools
        whales = await tools.log.confirmed_in(block_hash)
        await commit_valid(tools, [lifecycle.pending_again(whale, block_hash, tools.clock()) for whale in whales])
        await tools.log.forget_scan(height)
        if self._base.pop(height, None) is not None:  # who took its place was mined since
            await tools.log.set_state(FIRST_KEY, str(height))
        self.has_undone = True

    async def _undo_unscanned(self, low: int, hashes: set[str]) -> None:
        """Undo confirmations in blocks that died before they could be scanned: the stream shown of them, or a scan was
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
                    alive[block_hash] = await tools.backend.block_hash(height) in {None, block_hash}
                if not alive[block_hash]:
                    again = lifecycle.pending_again(event.whale, block_hash, tools.clock())
                    self.has_undone = await commit_valid(tools, [again]) or self.has_undone
                elif verified is None and height >= low:  # to be scanned yet, and looked at again then
                    verified = event.offset - 1
        verified = after if verified is None else verified
        if verified != start:
            await tools.log.set_state(VERIFIED_KEY, str(verified))

    async def _fill_all(self, heights: Sequence[int], scanned: dict[int, str], tip: int, tip_hash: str) -> bool:
        """Scan the blocks of these heights until the turn is over. One that fails waits and the others go on, unless
        that was several in a row. False if there is more to do now. Raises RestError as `Turns.take` does.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + TURN_S
        failures = 0
        for height in heights:
            if loop.time() >= until or failures == FAILURES_IN_A_ROW:
                return False
            try:
                is_whole = await self._fill(height, scanned, tip, tip_hash)
            except RestError as error:
                self._opened.pop(height, None)
                if error.reason in GENERAL:
                    raise
                failures += 1
                self._tools.complain(error, self._backoff.failed(str(height), error.retry_after_s))
                continue
            failures = 0
            if is_whole:
                self._backoff.forget(str(height))
            elif not self._is_all_asked(height):
                return False
            elif len(self._opened) >= OPENED_LIMIT:
                return True  # the answers come by themselves
        return failures < FAILURES_IN_A_ROW

    def _is_all_asked(self, height: int) -> bool:
        return all(self._turns.is_asking(key) for key in self._opened[height].wanted)

    async def _fill(self, height: int, scanned: dict[int, str], tip: int, tip_hash: str) -> bool:
        """Scan the block that belongs at a height. False if its turn was over before its end."""
        if height == tip:
            block_hash: str | None = tip_hash
        elif height + 1 in scanned:
            block_hash = (await self._tools.backend.block(scanned[height + 1])).previous_hash
        else:
            block_hash = await self._tools.backend.block_hash(height)
        if block_hash is None:
            return True  # the chain got shorter: the next block tells
        block = await self._scan(block_hash, height)
        if block is None:
            return False
        scanned[height] = block_hash
        self.behind -= 1
        below = scanned.get(height - 1)
        if below is not None and below != block.previous_hash:
            await self._undo(height - 1, scanned.pop(height - 1))
            self.behind += 1
        return True

    async def _block_at(self, block_hash: str, height: int) -> Block:
        block = await self._tools.backend.block(block_hash)
        if block.height != height:
            raise RestError(RestFailure.GARBAGE, f"block/{block_hash}: height {block.height}, expected {height}")
        return block

    async def _scan(self, block_hash: str, height: int) -> Block | None:
        """Look through a block, as far as the turn goes. None if there is more of it: the next turn goes on there."""
        opened = self._opened.get(height)
        if opened is None or opened.block.hash != block_hash:
            opened = self._opened[height] = await self._open(block_hash, height)
        block = opened

        async def ask(key: str) -> None:
            try:
                await self._ask_page(block, block.wanted[key])
            except RestError as error:
                if error.reason in GENERAL:
                    raise
                block.problem = error  # the whole block waits, not the page
            else:
                del block.wanted[key]

        await self._turns.take(list(block.wanted), ask)
        if block.problem is not None:
            problem, block.problem = block.problem, None
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: they would keep each other, and the answer that was read
        if block.wanted:
            return None
        del self._opened[height]
        await self._close(block)
        return block.block

    async def _open(self, block_hash: str, height: int) -> Opened:
        """What is in a block. The whales that were known are confirmed."""
        tools = self._tools
        block = await self._block_at(block_hash, height)
        entries = await tools.backend.summary(block_hash)
        known = await tools.log.whales(entry.txid for entry in entries if entry.txid is not None)
        await commit_valid(tools, [lifecycle.confirmed(whale, block, tools.clock()) for whale in known.values()])
        wanted = [entry for entry in entries if entry.txid not in known and self._may_be_whale(entry)]
        seen = self._seen_blocks.get(block_hash)
        at = seen.at if seen is not None else float(block.timestamp)
        if seen is not None:
            missed = seen.excuse or Cover.NEVER_RELAYED
        elif wanted or any(whale.alert.source is Source.BLOCK for whale in known.values()):
            missed = self._spans.why_missed(await self._before(block), at)
        else:
            missed = Cover.NEVER_RELAYED
        pages = {f"{block_hash}/{page[0].index}": page for page in tools.backend.pages_of(wanted)}
        return Opened(block, at, missed, pages, known)

    def _may_be_whale(self, entry: Summary) -> bool:
        """An entry whose value cannot be read may be one."""
        return entry.gross_sat is None or entry.gross_sat >= self._tools.committer.minimum_sat

    async def _close(self, opened: Opened) -> None:
        """Everything that could be asked was."""
        tools = self._tools
        block = opened.block
        sightings = [_sighting(whale, opened.at) for whale in opened.known.values()]
        sightings += [Sighting(None)] * opened.found
        scan = scan_of(block.height, block.hash, float(block.timestamp), tools.clock(), sightings, opened.missed)
        await tools.log.put_scan(scan)
        self._seen_blocks.pop(block.hash, None)
        self._caught_up += 1
        self._found += sum(seen.lead_s is None for seen in sightings)
        tools.meter.scanned(
            covers(sightings, opened.missed),
            [seen.lead_s for seen in sightings if seen.lead_s is not None and seen.lead_s > 0],
        )

    async def _ask_page(self, opened: Opened, entries: Sequence[Summary]) -> None:
        """Alert the whales of a page. Those whose inputs take long come after the others, and last those that are not
        where they should be.
        """
        tools = self._tools
        answers = await tools.backend.page(opened.block.hash, entries)
        slow: list[tuple[Transaction, Summary]] = []
        absent: list[Summary] = []
        drafts: list[Draft] = []
        for transaction, entry in zip(answers, entries, strict=True):
            if transaction is None:
                absent.append(entry)
                continue
            if transaction.gross_sat < tools.committer.minimum_sat:
                continue  # its value could not be read in the summary
            if any(spent.prevout is None for spent in transaction.inputs):
                slow.append((transaction, entry))
            else:
                drafts += await self._missed(opened, transaction, entry)
        await self._alert(opened, drafts)
        for transaction, entry in slow:
            whole = await tools.backend.completed(transaction)
            await self._alert(opened, await self._missed(opened, whole, entry))
        problems: list[RestError] = []
        for entry in absent:
            try:
                transaction = await tools.backend.mined(opened.block.hash, entry)
                await self._alert(opened, await self._missed(opened, transaction, entry))
            except RestError as error:
                if error.reason in GENERAL:
                    raise
                problems.append(error)  # the others need not wait for it
        if problems:
            try:
                raise problems[0]
            finally:
                problems.clear()

    async def _alert(self, opened: Opened, drafts: list[Draft]) -> None:
        if not drafts or await self._is_dead(opened.block):
            return
        await commit_valid(self._tools, drafts)
        opened.found += sum(draft.kind is Kind.CONFIRMED for draft in drafts)

    async def _is_dead(self, block: Block) -> bool:
        """Whether another block has been found at its height: an answer that took long may be older than that."""
        current = self._opened.get(block.height)
        if current is not None:
            return current.block.hash != block.hash
        scans = await self._tools.log.scans(block.height, block.height)
        return bool(scans) and scans[0].hash != block.hash

    async def _missed(self, opened: Opened, transaction: Transaction, entry: Summary) -> list[Draft]:
        """What is to be said of a whale that nobody knew: its alert, its confirmation, and those it replaced."""
        tools = self._tools
        block = opened.block
        now = tools.clock()
        market = Market(price=tools.committer.market.price, moment=float(block.timestamp))
        whale = tools.committer.assess(transaction, source=Source.BLOCK, now=now, market=market)
        if whale is None:
            return []
        family = await tools.backend.family(transaction.txid) if self._may_have_replaced(opened, entry) else []
        whale, replaced = await self._replacements.replaced_by(whale, family, now)
        return [
            *await self._replacements.drafts(family),
            lifecycle.alerted(whale, now),
            *replaced,
            lifecycle.confirmed(whale, block, now),
        ]

    @staticmethod
    def _may_have_replaced(opened: Opened, entry: Summary) -> bool:
        """Whether the backend may know what this one replaced. It flags those that replaced another one in its mempool,
        and not those that it saw in the block first, which won a double spend.
        """
        if entry.is_replacement is False:
            return entry.first_seen is None and opened.whales <= UNSEEN_LIMIT
        return True

    async def _before(self, block: Block) -> float:
        """When the block before was mined."""
        before = await self._tools.log.scans(block.height - 1, block.height - 1)
        if before:
            return before[0].mined_at
        if block.previous_hash is None:
            return block.timestamp - BLOCK_SPACING_S
        return float((await self._tools.backend.block(block.previous_hash)).timestamp)


def _sighting(whale: Whale, block_at: float) -> Sighting:
    if whale.alert.source is Source.BLOCK:
        return Sighting(None)
    return Sighting(block_at - lifecycle.detected_at(whale.alert))
