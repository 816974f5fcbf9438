"""What the backend is asked about transactions and blocks where its stream says nothing: the REST calls of a backfill.

docs/upstream.md has what was measured of each call. Paths are those of a backend that reads its node (none mode). What
an answer says is checked here: whatever a server sends, a call returns what it promises or raises RestError.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from whaled.model import Block, Transaction
from whaled.upstream.families import Relative, Tree, relatives
from whaled.upstream.http import RestError, RestFailure
from whaled.upstream.rest import Rest
from whaled.upstream.transactions import Fee, Number, Rate, Satoshi, Txid, transaction_of

# Beyond so many inputs `tx/:txid` takes longer than any timeout: the backend asks its node for each, in turn.
INPUTS_LIMIT = 100
# The inputs of a replaced transaction are asked for so long; it is told with or without them.
INPUTS_WAIT_S = 5.0
HASH_DIGITS = 64

Hash = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{HASH_DIGITS}}}$")]


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
    block_hash: Hash | None = None
    block_height: Number | None = None


class _Stripped(Struct, gc=False):
    txid: Txid
    value: Satoshi
    fee: Fee = -1
    vsize: Rate = 0.0


class _Header(Struct):
    id: Hash
    height: Number
    timestamp: Number
    previous: Hash | None = msgspec.field(name="previousblockhash", default=None)


class _Rbf(Struct):
    replacements: Tree | None


class Questions:
    """Asks one backend, no faster than `per_second`. Every call may raise RestError, and nothing else."""

    def __init__(self, rest: Rest, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._rest = rest
        self._spacing_s = 1.0 / per_second
        self._monotonic = monotonic
        self._next = 0.0
        self.answered = 0

    async def _turn(self) -> None:
        now = self._monotonic()
        at = max(now, self._next)
        self._next = at + self._spacing_s
        if at > now:
            await asyncio.sleep(at - now)

    async def _get(self, path: str, kind: Any) -> Any:
        await self._turn()
        answer = await self._rest.get(path, kind)
        self.answered += 1
        return answer

    async def mempool(self) -> list[str]:
        """Every txid in the mempool. Straight from the node, so it may be ahead of the stream."""
        txids: list[str] = self._rest.found("mempool/txids", await self._get("mempool/txids", list[Txid]))
        return txids

    async def transaction(self, txid: str) -> Transaction | None:
        """A transaction in full, None if the backend knows none (any more)."""
        path = f"tx/{_quoted(txid)}"
        raw = await self._get(path, msgspec.Raw)
        return None if raw is None else _whole(path, raw, txid)

    async def cached(self, txid: str) -> Transaction | None:
        """A transaction that was replaced within the last day, in full; None if the backend knows none."""
        path = f"tx/{_quoted(txid)}/cached"
        raw = await self._get(path, msgspec.Raw)
        return None if raw is None else await self._rest.prevouts(_whole(path, raw, txid), INPUTS_WAIT_S)

    async def confirmation(self, txid: str) -> Confirmation | None:
        """The block a transaction is in. None says that it is not mined, or not known: `mempool` tells which.

        After a reorganisation the backend may name a block that is no longer in the chain.
        """
        status: _Status | None = await self._get(f"tx/{_quoted(txid)}/status", _Status)
        if status is None or not status.confirmed or status.block_hash is None or status.block_height is None:
            return None
        return Confirmation(status.block_hash, status.block_height)

    async def replacer(self, txid: str) -> str | None:
        """The transaction that took the place of this one, None if the backend knows of none."""
        return next((each.replaced_by for each in await self.family(txid) if each.txid == txid), None)

    async def family(self, txid: str) -> list[Relative]:
        """Every transaction of the tree of replacements that this one is part of, the last one first."""
        found: _Rbf | None = await self._get(f"tx/{_quoted(txid)}/rbf", _Rbf)
        return [] if found is None or found.replacements is None else relatives(found.replacements)

    async def latest_families(self) -> list[list[Relative]]:
        """The trees of the latest replacements (25), newest first; none from a backend without this call."""
        found: list[Tree] | None = await self._get("replacements", list[Tree])
        return [relatives(tree) for tree in found or ()]

    async def tip_height(self) -> int:
        """Height of the best block, straight from the node."""
        await self._turn()
        return await self._rest.tip_height()

    async def block_hash(self, height: int) -> str | None:
        """Hash of the block at a height of the best chain, None above its tip (the backend answers 500 there)."""
        await self._turn()
        path = f"block-height/{height}"
        try:
            found = await self._rest.text(path)
        except RestError as error:
            if error.reason is RestFailure.SERVER_ERROR and height > await self.tip_height():
                return None
            raise
        if found is None:
            # A missing route must not look like a chain without blocks.
            return None if height > await self.tip_height() else self._rest.found(path, found)
        if len(found) != HASH_DIGITS or not set(found) <= set("0123456789abcdef"):
            raise RestError(RestFailure.GARBAGE, f"{path}: no block hash: {found[:HASH_DIGITS]!r}")
        return found

    async def block(self, block_hash: str) -> Block:
        """A block's place in the chain."""
        header: _Header = self._rest.found(f"block/{block_hash}", await self._get(f"block/{block_hash}", _Header))
        if header.id != block_hash:
            raise RestError(RestFailure.GARBAGE, f"block/{block_hash}: another block: {header.id}")
        return Block(height=header.height, hash=header.id, previous_hash=header.previous, timestamp=header.timestamp)

    async def summary(self, block_hash: str) -> list[Summary]:
        """Every transaction of a block with its value, without the coinbase."""
        path = f"block/{block_hash}/summary"
        stripped: list[_Stripped] = self._rest.found(path, await self._get(path, list[_Stripped]))
        if not stripped:
            raise RestError(RestFailure.INCOMPLETE, f"{path}: a block without a coinbase")
        return [
            Summary(each.txid, each.value, each.fee, each.vsize, index)
            for index, each in enumerate(stripped)
            if index > 0
        ]

    async def mined(self, block_hash: str, entry: Summary) -> Transaction:
        """A transaction of a block in full; fee and size are those of the summary.

        From the block's own list, which is quick for any number of inputs and leaves out what those beyond the 13th
        spend; the rest is asked for where that is quick as well, and is unknown where the backend fails over it.
        """
        path = f"block/{block_hash}/txs/{entry.index}"
        page: list[msgspec.Raw] = await self._get(path, list[msgspec.Raw]) or []
        found = next((tx for raw in page if (tx := _whole(path, raw)).txid == entry.txid), None)
        missing = found is None or any(spent.prevout is None for spent in found.inputs)
        if found is None or (missing and len(found.inputs) <= INPUTS_LIMIT):
            found = await self._with_inputs(entry.txid, found)
        fee = entry.fee if entry.fee >= 0 else None
        vsize = entry.vsize or found.vsize
        # No transaction is smaller than 1 vB: by what is, a rate would come out infinite.
        rate = fee / vsize if fee is not None and vsize >= 1.0 else None
        return replace(found, fee_sat=fee, vsize=vsize, fee_rate=rate)

    async def _with_inputs(self, txid: str, found: Transaction | None) -> Transaction:
        try:
            better = await self.transaction(txid) or found
        except RestError as error:
            if found is None or error.reason not in {RestFailure.TIMEOUT, RestFailure.SERVER_ERROR}:
                raise
            better = found
        if better is None:
            raise RestError(RestFailure.INCOMPLETE, f"tx/{txid}: in a block, and the backend does not know it")
        return better


def _quoted(txid: str) -> str:
    """The stream checks only how long a txid is."""
    return quote(txid, safe="")


def _whole(path: str, raw: msgspec.Raw, txid: str | None = None) -> Transaction:
    """A transaction in full. RestError if it cannot be read, or is another one."""
    try:
        found = transaction_of(bytes(raw))
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RestError(RestFailure.GARBAGE, f"{path}: no transaction: {error}") from error
    if txid is not None and found.txid != txid:
        raise RestError(RestFailure.GARBAGE, f"{path}: another transaction: {found.txid[:HASH_DIGITS]}")
    return found
