"""The mempool backend: polls its node and reports the changes, with the quirks of the real backend.

File names in comments refer to the backend's source. Like the real one, it knows only what its polls observed: it never
reports a transaction that came and went between two polls.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct

from whaled.simulator.chain import Block, Chain
from whaled.simulator.frames import ENCODER
from whaled.simulator.market import Adjustment, Projected, Seen, adjustment, prices, project
from whaled.simulator.rbf import RbfHistory
from whaled.simulator.settings import Mode, SimulatorSettings
from whaled.simulator.transactions import Tx
from whaled.simulator.txframes import classified, mined_rate, sigops, unrounded

# `blocks.ts`: blocks shown at the start. If more than MOST_BLOCKS_AT_ONCE are new, the backend skips to the last 8.
SHOWN_BLOCKS = 8
MOST_BLOCKS_AT_ONCE = 16
# `mempool.ts:98`: after this many failed polls the backend is out of sync.
FAILED_POLLS = 5
# `blocks.ts`: summaries kept from when the block was read, four times the blocks shown.
SUMMARIES_KEPT = 32
# Electrs reads its node twice a second: until then it does not know a block, and reports its transactions as pending.
ELECTRS_LAG_S = 0.5
# `common.ts:83`: replaced transactions are searched among those that left within this many updates.
LOSERS_REMEMBERED = 10
# With a database: blocks sent again after a reorganisation.
CORRECTED_BLOCKS = 32
LATEST_TXS = 6
RATE_WINDOW_S = 150


class Delta(Struct, frozen=True, kw_only=True):
    """The contents of one `mempool-transactions` message, with the block that caused it, if any."""

    sequence: int
    block: Block | None = None
    added: Sequence[Seen] = ()
    removed: Sequence[str] = ()
    mined: Sequence[str] = ()
    replaced: Sequence[tuple[str, Seen]] = ()
    similarity: float | None = None


class Indicators(Struct, frozen=True):
    """`loadingIndicators`, pushed to all clients."""

    values: dict[str, int]


class Corrected(Struct, frozen=True):
    """`blocks` and `da` after a reorganisation, with a database."""

    blocks: Sequence[Block]


class Prices(Struct, frozen=True):
    """`conversions`, pushed to all clients."""

    values: dict[str, int]


Update = Delta | Indicators | Corrected | Prices


class Backend:
    """One process of the backend, which polls `chain`. `usd` None means that the price is not known yet."""

    def __init__(self, chain: Chain, settings: SimulatorSettings, now: float, *, usd: int | None) -> None:
        self._chain = chain
        self.settings = settings
        self.limit = settings.weight_of_block
        self.reads_electrs = settings.mode is Mode.ESPLORA
        self.has_database = settings.database
        self.sequence = 0
        self.in_sync = False
        self.indicators: dict[str, int] = {"mempool": 0}
        self.mempool: dict[str, Seen] = {}
        self.blocks: deque[Block] = deque(maxlen=settings.keep_blocks)
        self.stale: deque[str] = deque(maxlen=settings.keep_blocks)
        self.projected: list[Projected] = []
        self.latest: deque[Seen] = deque(maxlen=LATEST_TXS)
        self.rbf = RbfHistory()
        self.summaries: dict[str, bytes] = {}
        self.saw_changes = False
        self.prices = prices(usd, int(now), database=settings.database)
        self._price_due = now + settings.price_interval
        self._height: int | None = None
        self._failed = 0
        self._uid = 0
        self._losers: deque[list[Seen]] = deque(maxlen=LOSERS_REMEMBERED)
        self._spenders: dict[tuple[str, int], str] = {}
        self._arrived: deque[tuple[float, float]] = deque()
        self._still_pending: list[str] = []

    def load_cache(self, old: "Backend") -> None:
        """Load the mempool and blocks of the previous process, but not its sequence or replacements."""
        self.mempool = dict(old.mempool)
        self._spenders = {coin.outpoint: txid for txid, seen in self.mempool.items() for coin in seen.tx.inputs}
        self.blocks.extend(old.blocks)
        self._height = old.blocks[-1].height if old.blocks else None
        self._uid = max((seen.uid or 0 for seen in self.mempool.values()), default=0)

    # --- state ---

    @property
    def height(self) -> int:
        """Return the height of the last block read."""
        return self._height or 0

    @property
    def behind(self) -> int:
        """Return the number of the node's blocks that are not read yet."""
        return max(0, self._chain.tip.height - self.height)

    def bytes_per_second(self, now: float) -> int:
        """Return the recent rate of arrivals in vB per second (`vBytesPerSecond`)."""
        return round(sum(vsize for at, vsize in self._arrived if at >= now - RATE_WINDOW_S) / RATE_WINDOW_S)

    def adjustment(self, now: float) -> Adjustment | None:
        """Return the difficulty adjustment, None while fewer than two blocks are known."""
        return adjustment(self.blocks[-1], self.blocks[0], now) if len(self.blocks) > 1 else None

    # --- polling ---

    def poll(
        self,
        now: float,
        *,
        usd: int | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[Update]:
        """Poll the node: getrawmempool, then blocks, then `meanwhile()`, then the new transactions of the mempool.

        Yields each update while the backend is in the state that the update describes. After blocks the backend polls
        again at once (`index.ts`), so changes of the mempool may follow. `usd` is the current price, which the backend
        reads once per `price_interval`.
        """
        raw = list(self._chain.mempool)
        self._failed = 0
        self._still_pending = []
        if now >= self._price_due and self.settings.usd is not None:
            self._price_due = now + self.settings.price_interval
            self.prices = prices(usd, int(now), database=self.has_database)
            yield Prices(self.prices)
        handled = False
        for update in self._read_blocks(now):
            handled = True
            yield update
        if not self.in_sync:
            yield Indicators(dict(self.indicators))
        if handled:
            raw = [*self._chain.mempool, *self._still_pending]
        meanwhile()
        change = self._read_mempool(raw, now)
        if change is not None:
            yield change
        if not self.in_sync:
            self.in_sync = True
            self.indicators = {}
            yield Indicators({})

    def fail(self) -> list[Update]:
        """Record a poll to which the node did not respond, and return the updates."""
        self._failed += 1
        if self._failed < FAILED_POLLS:
            return []
        self.in_sync = False
        self.indicators = {"mempool": 99}
        return [Indicators(dict(self.indicators))]

    def _next_sequence(self) -> int:
        if self.in_sync:
            self.sequence += 1
        return self.sequence

    # --- blocks ---

    def _read_blocks(self, now: float) -> Iterator[Update]:
        tip = self._chain.tip.height
        if self._height is None or tip - self._height > MOST_BLOCKS_AT_ONCE:
            self._height = tip - SHOWN_BLOCKS
        while self._height < tip:
            block = self._chain.block_at(self._height + 1)
            if block is None:
                raise AssertionError(f"the node has no block at {self._height + 1}, the tip is {tip}")
            if self.has_database and self.blocks and block.previous != self.blocks[-1].hash:
                yield from self._correct(block)
            self._height += 1
            yield self._read_block(block, now)

    def _correct(self, newest: Block) -> list[Update]:
        """Replace stale blocks. With a database, a reorganisation is detected at the first block above the old tip."""
        if newest.height != self.blocks[-1].height + 1:
            return []  # blocks were skipped, which looks like a reorganisation here
        for place, known in enumerate(self.blocks):
            real = self._chain.block_at(known.height)
            if real is not None and real.hash != known.hash:
                self.stale.append(known.hash)
                self.blocks[place] = real
        return [Corrected(list(self.blocks)[-CORRECTED_BLOCKS:])]

    def _read_block(self, block: Block, now: float) -> Delta:
        txids = block.txids
        replaced: list[tuple[str, Seen]] = []
        inside = set(txids)
        # Electrs does not know the block yet: the backend reads unknown transactions from the node, and electrs still
        # lists the known ones as pending, so the next poll adds them again.
        lags = self.reads_electrs and block.found_at > now - ELECTRS_LAG_S
        if lags:
            self._still_pending += [txid for txid in txids if txid in self.mempool]
        brought = {tx.txid: self.mempool.get(tx.txid) or self._unseen(tx, block, lags=lags) for tx in block.txs}
        self._summarise(block, list(brought.values()))
        for tx in block.txs[1:]:
            losers = {self._spenders.get(coin.outpoint) for coin in tx.inputs} - {None, tx.txid}
            for loser in sorted(txid for txid in losers if txid is not None and txid not in inside):
                winner = brought[tx.txid]
                winner.is_replacement = True
                winner.frame = b""
                replaced.append((loser, winner))
                self.rbf.note(self.mempool[loser], winner, now, mined=True)
        similarity = self._similarity(inside) if self.in_sync else None
        for txid in txids:
            mined = self.mempool.pop(txid, None)
            if mined is not None:
                self._unspend(mined)
        self.rbf.mined(txids)
        self.blocks.append(block)
        self._project()
        sequence = self._next_sequence()
        return Delta(sequence=sequence, block=block, mined=txids, replaced=replaced, similarity=similarity)

    def _unseen(self, tx: Tx, block: Block, *, lags: bool) -> Seen:
        """Return a transaction that was never in the backend's mempool: without mempool fields, with the node's fee."""
        is_from_node = lags or not self.reads_electrs
        fee = unrounded(tx.fee) if is_from_node else tx.fee
        seen = Seen(tx, fee, None, None, 0.0, block=block, is_from_node=is_from_node)
        seen.sigops = sigops(tx, prevouts=not is_from_node)
        seen.rate = mined_rate(seen)
        return seen

    def _summarise(self, block: Block, brought: Sequence[Seen]) -> None:
        lines = [
            classified(seen, mined_rate(seen), prevouts=self.reads_electrs and not seen.is_from_node)
            for seen in brought
        ]
        self.summaries[block.hash] = ENCODER.encode(lines)
        if len(self.summaries) > SUMMARIES_KEPT:
            del self.summaries[next(iter(self.summaries))]

    def _similarity(self, txids: set[str]) -> float:
        """Return the share of the projected block that was mined, by weight."""
        if not self.projected:
            return 1.0
        expected = self.projected[0]
        return sum(seen.tx.weight for seen in expected.txs if seen.tx.txid in txids) / expected.weight

    # --- the mempool ---

    def _read_mempool(self, raw: Sequence[str], now: float) -> Delta | None:
        present = set(raw)
        removed = [seen for txid, seen in self.mempool.items() if txid not in present]
        added = [seen for seen in (self._fetch(txid, now) for txid in raw if txid not in self.mempool) if seen]
        if not added and not removed:
            return None
        self.saw_changes = True
        for seen in removed:
            del self.mempool[seen.tx.txid]
            self._unspend(seen)
            seen.uid = None
        for seen in added:
            self.mempool[seen.tx.txid] = seen
            self._spenders.update((coin.outpoint, seen.tx.txid) for coin in seen.tx.inputs)
            self.latest.append(seen)
        self._arrived.append((now, sum(seen.tx.vsize for seen in added)))
        while self._arrived[0][0] < now - RATE_WINDOW_S:
            self._arrived.popleft()
        self._losers.append(removed)
        self._project()
        replaced = self._match(added, now)
        # The real backend sorts by `order`, not by arrival.
        added.sort(key=lambda seen: seen.tx.txid[::-1])
        return Delta(
            sequence=self._next_sequence(),
            added=added,
            removed=[seen.tx.txid for seen in removed],
            replaced=replaced,
        )

    def _fetch(self, txid: str, now: float) -> Seen | None:
        """Fetch a new transaction, None if it has left since its txid was read.

        One that was mined since then has no fee and no time.
        """
        entry = self._chain.mempool.get(txid)
        block = None
        tx: Tx | None
        if entry is not None:
            tx = entry.tx
        else:
            tx, block = self._chain.find(txid), self._chain.confirmed.get(txid)
            if tx is None:
                return None
        if self.reads_electrs:
            block = None  # electrs lists it, so it is pending there
        self._uid += 1
        return Seen(
            tx,
            0 if block else tx.fee,
            self._uid,
            None if block else int(now),
            0.0 if block else entry.score if entry else tx.rate,
            self._txs(self._chain.ancestors(txid)) if entry and entry.parents else (),
            self._txs(self._chain.descendants(txid)) if entry and entry.children else (),
            block,
            sigops=sigops(tx, prevouts=self.reads_electrs),
        )

    def _txs(self, txids: Iterable[str]) -> tuple[Tx, ...]:
        return tuple(self._chain.mempool[txid].tx for txid in sorted(txids))

    def _match(self, added: Sequence[Seen], now: float) -> list[tuple[str, Seen]]:
        """Return pairs of replaced txid and replacement, which share an input; the latter has a higher fee and rate."""
        lost: dict[tuple[str, int], list[Seen]] = {}
        for update in self._losers:
            for loser in update:
                for coin in loser.tx.inputs:
                    lost.setdefault(coin.outpoint, []).append(loser)
        if not lost:
            return []
        pairs: list[tuple[str, Seen]] = []
        for seen in added:
            losers = {loser.tx.txid: loser for coin in seen.tx.inputs for loser in lost.get(coin.outpoint, ())}
            for txid, loser in losers.items():
                if txid != seen.tx.txid and seen.fee > loser.fee and seen.tx.rate > loser.tx.rate:
                    seen.is_replacement = True
                    pairs.append((txid, seen))
                    self.rbf.note(loser, seen, now)
        return pairs

    def _unspend(self, seen: Seen) -> None:
        for coin in seen.tx.inputs:
            if self._spenders.get(coin.outpoint) == seen.tx.txid:
                del self._spenders[coin.outpoint]

    def _project(self) -> None:
        for txid, seen in self.mempool.items():
            entry = self._chain.mempool.get(txid)
            if entry is not None:
                seen.rate = entry.score
            seen.is_known_replacement = seen.is_replacement
        self.projected = project(list(self.mempool.values()), self.limit, self.settings.projected_blocks)
