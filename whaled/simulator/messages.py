"""The parts of the backend's messages in its current state. Each part is encoded once for all clients.

A message to a client is one JSON object of the parts that it subscribed to (`websocket-handler.ts` merges them in the
same way). Clients distinguish messages by their keys.
"""

from collections.abc import Iterable
from itertools import islice

from msgspec import Raw

from whaled.simulator import frames, txframes
from whaled.simulator.backend import SHOWN_BLOCKS, Backend, Corrected, Delta, Indicators, Prices, Update
from whaled.simulator.blockframes import block_frame
from whaled.simulator.chain import Block
from whaled.simulator.market import Seen, recommend
from whaled.simulator.world import World

# Encoded blocks kept, more than any message contains.
ENCODED_BLOCKS = 64
# `mempool-blocks.ts`: the last projected block is cut at this multiple of a block's weight.
LAST_BLOCK_SHOWN = 1.2
HOSTNAME = "simulator"

Parts = dict[str, bytes]

STATS = ("mempoolInfo", "vBytesPerSecond", "fees", "da")


def join(parts: Parts) -> bytes:
    """Join parts into one message."""
    return b"{" + b",".join(b'"%s":%s' % (key.encode(), value) for key, value in parts.items()) + b"}"


class Messages:
    """The encoded parts of one backend process. Call `changed` after every poll."""

    def __init__(self, backend: Backend, world: World) -> None:
        self._backend = backend
        self._world = world
        self._cache: Parts = {}
        self._blocks: dict[tuple[str, bool], bytes] = {}
        self._similarity: dict[str, float] = {}

    def changed(self) -> None:
        """Clear the cache: the world or the backend has changed."""
        self._cache.clear()

    def part(self, key: str) -> bytes | None:
        """Return the current value of a part, None if the backend has none (`da` while it starts)."""
        if key not in self._cache:
            value = self._make(key)
            if value is None:
                return None
            self._cache[key] = frames.ENCODER.encode(value)
        return self._cache[key]

    def parts(self, keys: Iterable[str]) -> Parts:
        """Return those of the parts that exist."""
        found = ((key, self.part(key)) for key in keys)
        return {key: value for key, value in found if value is not None}

    def init(self) -> Parts:
        """Return the response to `{"action":"init"}`."""
        return self.parts(
            (
                "mempoolInfo",
                "blocks",
                "mempool-blocks",
                "loadingIndicators",
                "fees",
                "da",
                "backend",
                "vBytesPerSecond",
                "conversions",
                "transactions",
                "backendInfo",
                "rbfSummary",
            )
        )

    def block(self, block: Block) -> Raw:
        """Return the JSON of a block. As in the real backend, `stale` is correct only with a database."""
        stale = self._backend.has_database and block.hash in self._backend.stale
        key = (block.hash, stale)
        if key not in self._blocks:
            frame = block_frame(
                block,
                self._world.settings.network,
                self._backend.limit,
                stale=stale,
                similarity=self._similarity.pop(block.hash, None),
                database=self._backend.has_database,
            )
            self._blocks[key] = frames.ENCODER.encode(frame)
            if len(self._blocks) > ENCODED_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
        return Raw(self._blocks[key])

    def update(self, update: Update) -> Parts:
        """Return the parts of an update. A `Delta` goes to the clients that track it, the others to all clients."""
        match update:
            case Indicators(values):
                return {"loadingIndicators": frames.ENCODER.encode(values)}
            case Prices(values):
                return {"conversions": frames.ENCODER.encode(values)}
            case Corrected(blocks):
                parts = {"blocks": frames.ENCODER.encode([self.block(block) for block in blocks])}
                return parts | self.parts(("da",))
            case Delta():
                return self._delta(update)

    def _delta(self, delta: Delta) -> Parts:
        electrs, behind = self._backend.reads_electrs, self._backend.behind
        full = {
            "sequence": delta.sequence,
            "added": [txframes.full_tx(seen, electrs=electrs, behind=behind) for seen in delta.added],
            "removed": delta.removed,
            "mined": delta.mined,
            "replaced": [
                {"replaced": loser, "by": txframes.full_tx(winner, electrs=electrs)} for loser, winner in delta.replaced
            ],
        }
        # The encoded text is large, and only this message needs it.
        for seen in (*delta.added, *(winner for _, winner in delta.replaced)):
            seen.frame = b""
        short = full | {
            "added": [seen.tx.txid for seen in delta.added],
            "replaced": [{"replaced": loser, "by": winner.tx.txid} for loser, winner in delta.replaced],
        }
        parts = {"mempool-transactions": frames.ENCODER.encode(full), "mempool-txids": frames.ENCODER.encode(short)}
        if delta.block is not None:
            if delta.similarity is not None:
                self._similarity[delta.block.hash] = delta.similarity
            parts["block"] = bytes(self.block(delta.block))
        return parts

    def projected(self, index: int) -> list[Seen]:
        """Return the transactions of a projected block; the last block is truncated."""
        blocks = self._backend.projected
        if index >= len(blocks):
            return []
        room = self._backend.limit * LAST_BLOCK_SHOWN
        shown: list[Seen] = []
        for seen in blocks[index].txs:
            room -= seen.tx.weight
            # With a small `block_weight` one transaction may exceed the limit, but a block is never shown empty.
            if room < 0 and shown:
                break
            shown.append(seen)
        return shown

    @property
    def sequence(self) -> int:
        """Return the sequence of the last delta."""
        return self._backend.sequence

    @property
    def projected_blocks(self) -> int:
        """Return the number of projected blocks that a client can track."""
        return self._world.settings.projected_blocks

    @property
    def has_prevouts(self) -> bool:
        """Return whether transactions of the mempool include their prevouts."""
        return self._backend.reads_electrs

    def _make(self, key: str) -> object:  # noqa: C901, PLR0912 -- a table of the parts
        backend, now = self._backend, self._world.now
        match key:
            case "mempoolInfo":
                txs = (entry.tx for entry in self._world.chain.mempool.values())
                return frames.mempool_info(txs, 300_000_000)
            case "blocks":
                newest = list(islice(reversed(backend.blocks), SHOWN_BLOCKS))
                return [self.block(block) for block in reversed(newest)]
            case "mempool-blocks":
                return frames.mempool_blocks(backend.projected)
            case "loadingIndicators":
                return backend.indicators
            case "fees":
                return frames.fees(recommend(backend.projected, backend.limit, whole=False))
            case "da":
                estimate = backend.adjustment(now)
                return None if estimate is None else frames.difficulty(estimate)
            case "backend":
                return self._world.settings.mode
            case "vBytesPerSecond":
                return backend.bytes_per_second(now)
            case "conversions":
                return backend.prices
            case "transactions":
                return [txframes.stripped(seen) for seen in reversed(backend.latest)]
            case "backendInfo":
                return frames.backend_info(HOSTNAME, self._world.settings.mode)
            case "rbfSummary":
                # It exists from the first change of the mempool on, even if it is empty.
                return backend.rbf.summary() if backend.saw_changes else None
            case _:
                raise AssertionError(f"no part is called {key}")
