"""What the backend is asked about transactions and blocks where its stream says nothing: the REST calls of a backfill.

docs/upstream.md has what was measured of each call. Paths are those of a backend that reads its node (none mode).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from whaled.model import Block, Transaction
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.rest import Rest
from whaled.upstream.transactions import Satoshi, Txid, transaction_of

# Beyond so many inputs `tx/:txid` takes longer than any timeout: the backend asks its node for each, in turn.
INPUTS_LIMIT = 100


class Confirmation(Struct, frozen=True):
    """Where a transaction is mined, according to the backend."""

    block_hash: str
    block_height: int


class Summary(Struct, frozen=True):
    """A transaction of a block: the sum of its outputs and its fee in satoshi, and its place."""

    txid: str
    value: int
    fee: int
    vsize: float
    index: int


class _Status(Struct):
    confirmed: bool
    block_hash: str | None = None
    block_height: int | None = None


class _Known(Struct):
    status: _Status


class _Stripped(Struct, gc=False):
    txid: Txid
    value: Satoshi
    fee: int = -1
    vsize: float = 0.0


class _Header(Struct):
    id: Txid
    height: Annotated[int, Meta(ge=0)]
    timestamp: Annotated[int, Meta(ge=0)]
    previous: str | None = msgspec.field(name="previousblockhash", default=None)


class _Leaf(Struct):
    txid: str


class _Tree(Struct):
    tx: _Leaf
    replaces: list["_Tree"] = msgspec.field(default_factory=list)


class _Rbf(Struct):
    replacements: _Tree | None = None
    replaces: list[str] | None = None


class Questions:
    """Asks one backend, no faster than `per_second`. Every call may raise RestError."""

    def __init__(self, rest: Rest, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._rest = rest
        self._spacing_s = 1.0 / per_second
        self._monotonic = monotonic
        self._next = 0.0

    async def _turn(self) -> None:
        now = self._monotonic()
        at = max(now, self._next)
        self._next = at + self._spacing_s
        if at > now:
            await asyncio.sleep(at - now)

    async def _get(self, path: str, kind: Any) -> Any:
        await self._turn()
        return await self._rest.get(path, kind)

    async def mempool(self) -> list[str]:
        """Every txid in the mempool. Straight from the node, so it may be ahead of the stream."""
        txids: list[str] = self._rest.found("mempool/txids", await self._get("mempool/txids", list[str]))
        return txids

    async def transaction(self, txid: str) -> Transaction | None:
        """A transaction in full, None if the backend knows none (any more)."""
        raw = await self._get(f"tx/{txid}", msgspec.Raw)
        return None if raw is None else transaction_of(bytes(raw))

    async def confirmation(self, txid: str) -> Confirmation | None:
        """The block a transaction is in. None says that it is not mined, or not known: `mempool` tells which.

        After a reorganisation the backend may name a block that is no longer in the chain.
        """
        status: _Status | None = await self._get(f"tx/{txid}/status", _Status)
        if status is None or not status.confirmed or status.block_hash is None or status.block_height is None:
            return None
        return Confirmation(status.block_hash, status.block_height)

    async def replacer(self, txid: str) -> str | None:
        """The transaction that took the place of this one, None if the backend knows of none."""
        found: _Rbf | None = await self._get(f"tx/{txid}/rbf", _Rbf)
        return None if found is None or found.replacements is None else _parent(found.replacements, txid)

    async def replaced(self, txid: str) -> tuple[str, ...]:
        """The transactions that this one took the place of."""
        found: _Rbf | None = await self._get(f"tx/{txid}/rbf", _Rbf)
        return () if found is None else tuple(found.replaces or ())

    async def tip_height(self) -> int:
        """Height of the best block, straight from the node."""
        await self._turn()
        return await self._rest.tip_height()

    async def block_hash(self, height: int) -> str | None:
        """Hash of the block at a height of the best chain, None above its tip (the backend answers 500 there)."""
        await self._turn()
        try:
            return await self._rest.text(f"block-height/{height}")
        except RestError as error:
            if error.reason is RestFailure.SERVER_ERROR and height > await self.tip_height():
                return None
            raise

    async def block(self, block_hash: str) -> Block:
        """A block's place in the chain."""
        header: _Header = self._rest.found(f"block/{block_hash}", await self._get(f"block/{block_hash}", _Header))
        return Block(height=header.height, hash=header.id, previous_hash=header.previous, timestamp=header.timestamp)

    async def summary(self, block_hash: str) -> list[Summary]:
        """Every transaction of a block with its value, without the coinbase."""
        path = f"block/{block_hash}/summary"
        stripped: list[_Stripped] = self._rest.found(path, await self._get(path, list[_Stripped]))
        return [
            Summary(each.txid, each.value, each.fee, each.vsize, index)
            for index, each in enumerate(stripped)
            if index > 0
        ]

    async def mined(self, block_hash: str, entry: Summary) -> Transaction | None:
        """A transaction of a block in full; fee and size are those of the summary.

        From the block's own list, which is quick for any number of inputs and leaves out what those beyond the 13th
        spend; the rest is asked for where that is quick as well.
        """
        page = await self._get(f"block/{block_hash}/txs/{entry.index}", list[msgspec.Raw])
        found = next((tx for raw in page or () if (tx := transaction_of(bytes(raw))).txid == entry.txid), None)
        missing = found is None or any(spent.prevout is None for spent in found.inputs)
        if found is None or (missing and len(found.inputs) <= INPUTS_LIMIT):
            found = await self.transaction(entry.txid) or found
        if found is None:
            return None
        fee = entry.fee if entry.fee >= 0 else None
        vsize = entry.vsize or found.vsize
        return replace(found, fee_sat=fee, vsize=vsize, fee_rate=fee / vsize if fee is not None and vsize else None)


def _parent(tree: _Tree, txid: str) -> str | None:
    """Whose `replaces` has this txid."""
    for child in tree.replaces:
        if child.tx.txid == txid:
            return tree.tx.txid
        found = _parent(child, txid)
        if found is not None:
            return found
    return None
