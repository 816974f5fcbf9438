"""The scan of single blocks: known whales are confirmed, unknown ones are alerted and confirmed."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from whaled.backfill.context import Context
from whaled.backfill.coverage import Cover, Interruptions, Sighting, covers, scan_of
from whaled.backfill.replacements import Replacements
from whaled.backfill.turns import Turns
from whaled.backoff import Backoff
from whaled.eventlog import notes, queries
from whaled.model import Block, Draft, Kind, Market, Source, Transaction, Whale
from whaled.source import BackendError, Summary
from whaled.whales import lifecycle

# Blocks of the stream to remember until they are scanned.
SEEN_LIMIT = 200
# Assumed time since the previous block, for a block without one.
BLOCK_SPACING_S = 600.0
# The RBF tree of a whale that the backend first saw in the block is requested only while the block has at most this
# many whales left to fetch. Otherwise only whales of the event log are found as replaced, by the outputs both spend.
UNSEEN_LIMIT = 50


class SeenBlock(Struct, frozen=True):
    """The time of a block's announcement, and why its whales may be unknown: None if the mempool was known."""

    at: float
    cause: Cover | None


class OpenScan(Struct):
    """A block that is being scanned.

    `wanted` has the pages with unknown whales that are still to be fetched, by block hash and first index; `known` are
    the whales of the event log.
    """

    block: Block
    at: float
    missed: Cover
    wanted: dict[str, list[Summary]]
    known: dict[str, Whale]
    found: int = 0
    problem: BackendError | None = None

    @property
    def unfetched_whales(self) -> int:
        """Number of whales still to be fetched."""
        return sum(map(len, self.wanted.values()))


class Progress(Struct):
    """Numbers of blocks scanned and of whales found in them that were unknown before."""

    blocks: int = 0
    whales: int = 0


class BlockScanner:
    """Scans blocks, each across as many turns as it needs."""

    def __init__(self, context: Context, interruptions: Interruptions, replacements: Replacements) -> None:
        self._context = context
        self._interruptions = interruptions
        self._replacements = replacements
        # No page ever waits in this backoff: a page that fails makes its whole block wait.
        self._turns = Turns(context, Backoff(context.monotonic), context.settings.concurrency)
        self._seen_blocks: dict[str, SeenBlock] = {}
        self._open: dict[int, OpenScan] = {}
        self.progress = Progress()

    @property
    def unfetched_whales(self) -> int:
        """Number of whales still to be fetched, of the blocks that are being scanned."""
        return sum(scan.unfetched_whales for scan in self._open.values())

    @property
    def open_scans(self) -> int:
        """Number of blocks that are being scanned."""
        return len(self._open)

    def is_open(self, height: int) -> bool:
        """Return whether the block at a height is being scanned."""
        return height in self._open

    def is_all_requested(self, height: int) -> bool:
        """Return whether each page that the open scan at a height still needs has a running request."""
        return all(self._turns.is_running(key) for key in self._open[height].wanted)

    def observe(self, block: Block, now: float) -> None:
        """Remember when the stream announced this block."""
        self._seen_blocks[block.hash] = SeenBlock(now, self._interruptions.current_cause())
        if len(self._seen_blocks) > SEEN_LIMIT:
            del self._seen_blocks[next(iter(self._seen_blocks))]

    def retain(self, heights: Iterable[int]) -> None:
        """Give up all open scans but those at these heights."""
        self._open = {height: self._open[height] for height in heights if height in self._open}

    def give_up(self, height: int) -> None:
        """Give up the open scan at a height, if there is one."""
        self._open.pop(height, None)

    async def scan(self, block_hash: str, height: int) -> Block | None:
        """Scan a block as far as the turn allows.

        Returns None if it is not finished: the next call continues. Raises BackendError.
        """
        opened = self._open.get(height)
        if opened is None or opened.block.hash != block_hash:
            opened = self._open[height] = await self._begin(block_hash, height)
        scan = opened

        async def request(key: str) -> None:
            try:
                await self._fetch_page(scan, scan.wanted[key])
            except BackendError as error:
                if error.is_backend_wide:
                    raise
                scan.problem = error  # the whole block waits, not the page
            else:
                del scan.wanted[key]

        await self._turns.take(list(scan.wanted), request)
        if scan.problem is not None:
            problem, scan.problem = scan.problem, None
            try:
                raise problem
            finally:
                del problem  # its traceback refers to this frame: the cycle would keep the response in memory
        if scan.wanted:
            return None
        del self._open[height]
        await self._finish(scan)
        return scan.block

    async def _begin(self, block_hash: str, height: int) -> OpenScan:
        """Fetch the summary of a block and confirm the known whales in it."""
        context = self._context
        block = await context.backend.block(block_hash, height)
        entries = await context.backend.summary(block_hash)
        txids = [entry.txid for entry in entries if entry.txid is not None]
        known = await context.event_log.read_each(queries.whales, txids)
        await context.commit_valid([lifecycle.confirmed(whale, block, context.clock()) for whale in known.values()])
        wanted = [entry for entry in entries if entry.txid not in known and self._may_be_whale(entry)]
        seen = self._seen_blocks.get(block_hash)
        at = seen.at if seen is not None else float(block.timestamp)
        if seen is not None:
            missed = seen.cause or Cover.NEVER_RELAYED
        elif wanted or any(whale.alert.source is Source.BLOCK for whale in known.values()):
            missed = self._interruptions.why_missed(await self._previous_mined_at(block), at)
        else:
            missed = Cover.NEVER_RELAYED
        pages = {f"{block_hash}/{page[0].index}": page for page in context.backend.pages_of(wanted)}
        return OpenScan(block, at, missed, pages, known)

    def _may_be_whale(self, entry: Summary) -> bool:
        """Return whether an entry may be a whale. One whose value is unreadable may be."""
        return entry.gross_sat is None or entry.gross_sat >= self._context.ingest.minimum_sat

    async def _finish(self, scan: OpenScan) -> None:
        """Store and count a scan whose pages have all been fetched."""
        context = self._context
        block = scan.block
        sightings = [_sighting(whale, scan.at) for whale in scan.known.values()]
        sightings += [Sighting(None)] * scan.found
        row = scan_of(block.height, block.hash, float(block.timestamp), context.clock(), sightings, scan.missed)
        await context.event_log.write(notes.put_scan, row)
        self._seen_blocks.pop(block.hash, None)
        self.progress.blocks += 1
        self.progress.whales += sum(seen.lead_s is None for seen in sightings)
        context.meter.scanned(
            covers(sightings, scan.missed),
            [seen.lead_s for seen in sightings if seen.lead_s is not None and seen.lead_s > 0],
        )

    async def _fetch_page(self, scan: OpenScan, entries: Sequence[Summary]) -> None:
        """Alert the whales of a page.

        First those that the page shows completely, then those whose inputs need another request, last those that the
        page does not show.
        """
        context = self._context
        found = await context.backend.page(scan.block.hash, entries)
        incomplete: list[tuple[Transaction, Summary]] = []
        absent: list[Summary] = []
        drafts: list[Draft] = []
        for transaction, entry in zip(found, entries, strict=True):
            if transaction is None:
                absent.append(entry)
                continue
            if transaction.gross_sat < context.ingest.minimum_sat:
                continue  # its value was unreadable in the summary
            if any(spent.prevout is None for spent in transaction.inputs):
                incomplete.append((transaction, entry))
            else:
                drafts += await self._drafts(scan, transaction, entry)
        await self._commit(scan, drafts)
        for transaction, entry in incomplete:
            whole = await context.backend.completed(transaction)
            await self._commit(scan, await self._drafts(scan, whole, entry))
        problems: list[BackendError] = []
        for entry in absent:
            try:
                transaction = await context.backend.mined(scan.block.hash, entry)
                await self._commit(scan, await self._drafts(scan, transaction, entry))
            except BackendError as error:
                if error.is_backend_wide:
                    raise
                problems.append(error)  # the others need not wait for it
        if problems:
            try:
                raise problems[0]
            finally:
                problems.clear()

    async def _commit(self, scan: OpenScan, drafts: list[Draft]) -> None:
        if not drafts or await self._is_superseded(scan.block):
            return
        await self._context.commit_valid(drafts)
        scan.found += sum(draft.kind is Kind.CONFIRMED for draft in drafts)

    async def _is_superseded(self, block: Block) -> bool:
        """Return whether another block has been found at its height: a slow response may be older than that."""
        current = self._open.get(block.height)
        if current is not None:
            return current.block.hash != block.hash
        scans = await self._context.event_log.read(queries.scans, block.height, block.height)
        return bool(scans) and scans[0].hash != block.hash

    async def _drafts(self, scan: OpenScan, transaction: Transaction, entry: Summary) -> list[Draft]:
        """Return the alert and confirmation of an unknown whale, and the replacements by it; none if it is no whale."""
        context = self._context
        block = scan.block
        now = context.clock()
        market = Market(price=context.ingest.market.price, moment=float(block.timestamp))
        whale = context.ingest.assess(transaction, source=Source.BLOCK, now=now, market=market)
        if whale is None:
            return []
        rbf_tree = await context.backend.family(transaction.txid) if self._may_have_replaced(scan, entry) else []
        whale, replaced = await self._replacements.with_replaced(whale, rbf_tree, now)
        return [
            *await self._replacements.drafts(rbf_tree),
            lifecycle.alerted(whale, now),
            *replaced,
            lifecycle.confirmed(whale, block, now),
        ]

    @staticmethod
    def _may_have_replaced(scan: OpenScan, entry: Summary) -> bool:
        """Return whether the backend may know of a transaction that this one replaced.

        It flags transactions that replaced another one in its mempool, but not those that it first saw in the block,
        which won a double spend.
        """
        if entry.is_replacement is False:
            return entry.first_seen is None and scan.unfetched_whales <= UNSEEN_LIMIT
        return True

    async def _previous_mined_at(self, block: Block) -> float:
        """Return when the previous block was mined (Unix seconds)."""
        previous = await self._context.event_log.read(queries.scans, block.height - 1, block.height - 1)
        if previous:
            return previous[0].mined_at
        if block.previous_hash is None:
            return block.timestamp - BLOCK_SPACING_S
        return float((await self._context.backend.block(block.previous_hash)).timestamp)


def _sighting(whale: Whale, block_at: float) -> Sighting:
    if whale.alert.source is Source.BLOCK:
        return Sighting(None)
    return Sighting(block_at - lifecycle.detected_at(whale.alert))
