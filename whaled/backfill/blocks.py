"""Follows the best chain: each block since the first start is scanned, and what left the chain is undone.

The stored scans build on one another: each run of heights without a gap is part of one chain. So it is enough to find
the newest scan whose block is still in the chain.
"""

import asyncio
from collections.abc import Sequence

import structlog

from whaled.backfill.block_scan import BlockScanner, Progress
from whaled.backfill.context import Context
from whaled.backfill.coverage import Interruptions
from whaled.backfill.first_run import FIRST_KEY, FirstRun, blocks_at_start, chain_below
from whaled.backfill.replacements import Replacements
from whaled.backfill.turns import FAILURES_IN_A_ROW, TURN_S
from whaled.backoff import Backoff
from whaled.model import Block, Kind
from whaled.source import BackendError
from whaled.whales import lifecycle

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Every confirmation up to the offset stored under this key has been verified against the chain.
VERIFIED_KEY = "verified_offset"
EVENTS_PAGE = 500
# Scans of years of blocks are read in pages of this size.
OLD_SCANS_PAGE = 2_000
# At most this many blocks wait for their last responses while the scan continues with others.
OPEN_SCANS_LIMIT = 4


class Blocks:
    """Follows the best chain with requests: no backend reports every reorganisation in its stream."""

    def __init__(
        self, context: Context, first_run: FirstRun, interruptions: Interruptions, replacements: Replacements
    ) -> None:
        self._context = context
        self._first_run = first_run
        self._scanner = BlockScanner(context, interruptions, replacements)
        self._backoff = Backoff(context.monotonic)
        # The blocks of the first start directly below those that are followed, also verified against the chain.
        self._base: dict[int, str] = {}
        # Number of blocks to scan.
        self.behind = 0
        # Whether the scans below the blocks that are followed were verified against the chain.
        self._are_old_scans_verified = False
        # Whether confirmations were undone since the owner last reset this: where the whales are now is unknown.
        self.has_undone = False

    def observe(self, block: Block, now: float) -> None:
        """Take note of a block that the stream announced."""
        previous = Block(
            height=block.height - 1, hash=block.previous_hash or "", previous_hash=None, timestamp=block.timestamp
        )
        self._first_run.observe([previous])
        self._scanner.observe(block, now)
        self.behind += 1  # until `catch_up` counts again

    @property
    def unfetched_whales(self) -> int:
        """Number of whales still to be fetched, of the blocks that are being scanned."""
        return self._scanner.unfetched_whales

    @property
    def is_unfinished(self) -> bool:
        """Return whether the scan of a block waits for responses or for its next turn."""
        return self._scanner.open_scans > 0

    def next_due(self) -> float | None:
        """Return when to retry a block whose scan failed (monotonic), None if there is none."""
        return self._backoff.next_due(lambda height: self._scanner.is_open(int(height)))

    async def catch_up(self) -> bool:
        """Undo stale blocks, then scan missing ones, newest first, until the turn ends.

        Returns False if there is more to do now.

        Raises BackendError; everything that was scanned until then is stored.
        """
        context = self._context
        tip = await context.backend.tip_height()
        tip_hash = await context.backend.block_hash(tip)
        if tip_hash is None:
            return True  # the chain became shorter; the next block causes another call
        low = await self._apply_limit(await self._first_height(tip), tip, tip_hash)
        self._base = chain_below(await blocks_at_start(context.event_log), low)
        scans = await context.event_log.scans(low, tip + context.settings.max_blocks)
        scanned = self._base | {scan.height: scan.hash for scan in scans}
        stale = await self._find_stale(scanned, tip, tip_hash)
        await self._undo_all(stale)
        for height in stale:
            del scanned[height]
        low = min([low, *stale])
        if not scanned:
            self._are_old_scans_verified = False  # no scan that is in the chain builds on them
        # Before blocks above are scanned: afterwards nothing would show whether they build on the old scans.
        await self._undo_old_scans(low)
        missing = [height for height in range(tip, low - 1, -1) if height not in scanned]
        self.behind = len(missing)
        if len(missing) > 1 and not self._scanner.progress.blocks:
            logger.info("block_scan_started", blocks=len(missing), tip=tip)
        self._backoff.retain(str(height) for height in missing)
        self._scanner.retain(missing)
        due = [height for height in missing if self._backoff.is_due(str(height))]
        if not await self._scan_all(due, scanned, tip, tip_hash):
            return False
        if not self.behind:
            progress, self._scanner.progress = self._scanner.progress, Progress()
            if progress.blocks > 1:
                logger.info("block_scan_finished", blocks=progress.blocks, whales=progress.whales, tip=tip)
        await self._undo_unscanned(low, set(scanned.values()))
        return True

    async def _first_height(self, tip: int) -> int:
        """Return the height of the first block to scan. The first call stores it."""
        log = self._context.event_log
        stored = await log.state(FIRST_KEY)
        if stored is not None:
            return int(stored)
        # The tip may have been reported to a start that was killed: blocks since then must be scanned.
        await self._first_run.store()
        reported = await blocks_at_start(log)
        first = min(tip, reported[-1].height if reported else tip) + 1
        scans = await log.newest_scans(self._context.settings.max_blocks)
        if scans:  # the stored height is lost; blocks since these scans must be scanned
            first = min(first, scans[-1].height)
            logger.warning("block_scan_start_lost", height=first)
        else:
            logger.info("block_scan_start_set", height=first)
        await log.set_state(FIRST_KEY, str(first))
        return first

    async def _apply_limit(self, first: int, tip: int, tip_hash: str) -> int:
        """Return the height of the first block to scan within `backfill.max_blocks`, and store it if it is higher."""
        context = self._context
        low = tip - context.settings.max_blocks + 1
        if first >= low:
            return first
        known = len(await context.event_log.scans(first, low - 1))
        if low - first > known:
            # Verify the height of the tip: one wrong response must not skip all blocks to come.
            await context.backend.block(tip_hash, tip)
            logger.warning(
                "block_scan_blocks_skipped",
                blocks=low - first - known,
                first=first,
                last=low - 1,
            )
            context.meter.skipped(low - first - known)
            self._are_old_scans_verified = False
        await context.event_log.set_state(FIRST_KEY, str(low))
        return low

    async def _find_stale(self, scanned: dict[int, str], tip: int, tip_hash: str) -> dict[int, str]:
        """Return the scanned blocks that are no longer in the chain, descending.

        A node that is only behind has not lost the blocks that it has not reached: a block above its tip is stale only
        if a block at or below its tip is.
        """
        stale: dict[int, str] = {}
        for height in sorted(scanned, reverse=True):
            current = None
            if height <= tip:
                current = tip_hash if height == tip else await self._context.backend.block_hash(height)
                if current is None:
                    return {}  # responses come from two nodes that differ: they prove nothing
            if current == scanned[height]:
                break
            stale[height] = scanned[height]
        return stale if min(stale, default=tip + 1) <= tip else {}

    async def _undo_old_scans(self, low: int) -> None:
        """Undo stale blocks below those that are followed.

        A reorganisation during an outage may be deeper than `backfill.max_blocks`. Each run of heights without a gap is
        checked from its top down to the first block that is in the chain.
        """
        if self._are_old_scans_verified:
            return
        context = self._context
        stale: dict[int, str] = {}
        in_chain: int | None = None
        height = low
        while page := await context.event_log.newest_scans(OLD_SCANS_PAGE, height):
            for scan in page:
                height = scan.height
                if height + 1 != in_chain:  # else the block above builds on this one
                    current = await context.backend.block_hash(height)
                    if current is None:
                        return  # the chain became shorter; the next block causes another call
                    if current != scan.hash:
                        stale[height] = scan.hash
                        continue
                in_chain = height
        await self._undo_all(stale)
        self._are_old_scans_verified = True

    async def _undo_all(self, stale: dict[int, str]) -> None:
        """Undo blocks in the order given: from the tip down, as the node disconnects them."""
        for height, block_hash in stale.items():
            await self._undo(height, block_hash)
        if stale:
            self._context.meter.reorganised(len(stale))
            logger.warning("chain_reorganised", depth=len(stale), height=min(stale))

    async def _undo(self, height: int, block_hash: str) -> None:
        """Mark the whales confirmed in a block as pending again, and forget its scan."""
        context = self._context
        whales = await context.event_log.confirmed_in(block_hash)
        await context.commit_valid([lifecycle.pending_again(whale, block_hash, context.clock()) for whale in whales])
        await context.event_log.forget_scan(height)
        if self._base.pop(height, None) is not None:  # the block in its place was mined since the first start
            await context.event_log.set_state(FIRST_KEY, str(height))
        self.has_undone = True

    async def _undo_unscanned(self, low: int, hashes: set[str]) -> None:
        """Undo confirmations in blocks that left the chain before they were scanned.

        The stream reported them, or a scan was interrupted between its commit and the storing of its row.
        """
        context = self._context
        stored = await context.event_log.state(VERIFIED_KEY)
        start = after = int(stored) if stored is not None else 0
        verified: int | None = None
        in_chain: dict[str, bool] = {}
        while events := await context.event_log.between(after, context.event_log.head, EVENTS_PAGE):
            after = events[-1].offset
            for event in events:
                update = event.update
                if event.kind is not Kind.CONFIRMED or update is None or update.block_hash in hashes:
                    continue
                block_hash, height = update.block_hash, update.block_height
                if block_hash is None or height is None:
                    continue
                if block_hash not in in_chain:
                    in_chain[block_hash] = await context.backend.block_hash(height) in {None, block_hash}
                if not in_chain[block_hash]:
                    again = lifecycle.pending_again(event.whale, block_hash, context.clock())
                    self.has_undone = await context.commit_valid([again]) or self.has_undone
                elif verified is None and height >= low:  # not scanned yet: it is verified again after its scan
                    verified = event.offset - 1
        verified = after if verified is None else verified
        if verified != start:
            await context.event_log.set_state(VERIFIED_KEY, str(verified))

    async def _scan_all(self, heights: Sequence[int], scanned: dict[int, str], tip: int, tip_hash: str) -> bool:
        """Scan the blocks at these heights until the turn ends.

        A block that fails waits while the others continue, unless several failed in a row. Returns False if there is
        more to do now. Raises BackendError as `Turns.take` does.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + TURN_S
        failures = 0
        for height in heights:
            if loop.time() >= until or failures == FAILURES_IN_A_ROW:
                return False
            try:
                is_finished = await self._scan(height, scanned, tip, tip_hash)
            except BackendError as error:
                self._scanner.give_up(height)
                if error.is_backend_wide:
                    raise
                failures += 1
                self._context.report_failure(error, self._backoff.failed(str(height), error.retry_after_s))
                continue
            failures = 0
            if is_finished:
                self._backoff.forget(str(height))
            elif not self._scanner.is_all_requested(height):
                return False
            elif self._scanner.open_scans >= OPEN_SCANS_LIMIT:
                return True  # the end of a request wakes the worker
        return failures < FAILURES_IN_A_ROW

    async def _scan(self, height: int, scanned: dict[int, str], tip: int, tip_hash: str) -> bool:
        """Scan the block of the chain at a height. Returns False if the turn ended before the scan was finished."""
        if height == tip:
            block_hash: str | None = tip_hash
        elif height + 1 in scanned:
            block_hash = (await self._context.backend.block(scanned[height + 1])).previous_hash
        else:
            block_hash = await self._context.backend.block_hash(height)
        if block_hash is None:
            return True  # the chain became shorter; the next block causes another call
        block = await self._scanner.scan(block_hash, height)
        if block is None:
            return False
        scanned[height] = block_hash
        self.behind -= 1
        below = scanned.get(height - 1)
        if below is not None and below != block.previous_hash:
            await self._undo(height - 1, scanned.pop(height - 1))
            self.behind += 1
        return True
