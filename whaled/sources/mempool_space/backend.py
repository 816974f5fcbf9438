"""The REST calls of the backfill: transactions and blocks that the stream does not deliver.

docs/upstream.md has the measurements of each call. Paths are those of a backend that reads its node (none mode); in
esplora mode `Routes` directs the calls that only electrs answers to electrs. This module validates every response:
whatever a server sends, a call returns what it promises or raises RestError.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec.structs import replace

from whaled.model import Block, Transaction
from whaled.source import Confirmation, Relative, Summary
from whaled.sources.mempool_space.fields import UNREADABLE, Txid, read
from whaled.sources.mempool_space.http import RestError, RestFailure
from whaled.sources.mempool_space.rawblock import SerialError, spenders_in
from whaled.sources.mempool_space.rbf import relatives
from whaled.sources.mempool_space.responses import (
    HASH_DIGITS,
    CpfpResponse,
    HeaderResponse,
    OutspendResponse,
    RbfResponse,
    StatusResponse,
    as_mined,
    bare_transaction,
    family_of,
    summary_of,
    with_addresses,
    with_computed_fee,
)
from whaled.sources.mempool_space.rest import INPUTS_LIMIT, Rest
from whaled.sources.mempool_space.transactions import transaction_of

# Time limit for fetching the inputs of a replaced transaction; its alert is published with or without them.
INPUTS_WAIT_S = 5.0
# Number and spacing of the repeated requests to electrs for a block that it has not indexed yet.
INDEX_TRIES = 4
INDEX_WAIT_S = 0.5


class Backend:
    """A client of one backend that sends at most `per_second` requests a second and `at_once` at the same time.

    Every call may raise RestError, and no other error.
    """

    def __init__(
        self, rest: Rest, per_second: float, at_once: int = 4, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._rest = rest
        # One slot fewer than the REST client has, so that the inputs of a live whale never wait for the backfill.
        self._slots = asyncio.Semaphore(max(1, min(at_once, rest.concurrency - 1)))
        self._spacing_s = 1.0 / per_second
        self._monotonic = monotonic
        self._next = 0.0
        self.answered = 0
        self.inputs_limit = INPUTS_LIMIT

    async def _wait_turn(self) -> None:
        now = self._monotonic()
        at = max(now, self._next)
        self._next = at + self._spacing_s
        if at > now:
            await asyncio.sleep(at - now)

    async def _get(self, path: str, kind: Any) -> Any:
        async with self._slot():
            answer = await self._rest.get(path, kind)
        self.answered += 1
        return answer

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Wait for the rate limit and for a free slot, and hold the slot."""
        await self._wait_turn()
        async with self._slots:
            yield

    async def mempool(self) -> list[str]:
        """Return every txid in the mempool. The list comes from the node itself, so it may be ahead of the stream."""
        txids: list[str] = self._rest.found("mempool/txids", await self._get("mempool/txids", list[Txid]))
        return txids

    async def transaction(self, txid: str) -> Transaction | None:
        """Return a transaction of the mempool in full; None if the backend does not know it (any more)."""
        found = await self._full(txid)
        if found is None or found.fee_rate is not None or not self._rest.routes.is_esplora:
            return found
        # electrs does not compute ancestors, so the effective rate comes from the backend itself.
        known: CpfpResponse | None = await self._get(f"cpfp/{_quoted(txid)}", CpfpResponse)
        return found if known is None or known.rate is None else replace(found, fee_rate=known.rate)

    async def _full(self, txid: str) -> Transaction | None:
        path = f"tx/{_quoted(txid)}"
        raw = await self._get(path, msgspec.Raw)
        return None if raw is None else _whole(path, raw, txid)

    async def bare(self, txid: str) -> Transaction | None:
        """Return a transaction as serialised: outputs without addresses, no prevouts, no fee.

        It takes one call to the node, however many inputs there are. None if the backend does not know the transaction.
        """
        path = f"tx/{_quoted(txid)}/hex"
        async with self._slot():
            text = await self._rest.text(path)
        if text is None:
            return None
        try:
            found = bare_transaction(text)
        except ValueError as error:
            raise RestError(RestFailure.GARBAGE, f"{path}: not a transaction: {error}") from error
        if found.txid != txid:
            raise RestError(RestFailure.GARBAGE, f"{path}: another transaction: {found.txid}")
        return found

    async def large(self, txid: str) -> Transaction | None:
        """Return a transaction that has too many inputs for the backend to look up, as far as it can be completed.

        None if the backend does not know it.
        """
        bare = await self.bare(txid)
        if bare is None:
            return None
        (found,) = await self._rest.prevouts([bare], INPUTS_WAIT_S)
        return with_computed_fee(with_addresses(found))

    async def cached(self, txid: str) -> Transaction | None:
        """Return a transaction in full that was replaced within the last day; None if the backend does not know it."""
        path = f"tx/{_quoted(txid)}/cached"
        raw = await self._get(path, msgspec.Raw)
        if raw is None:
            return None
        (found,) = await self._rest.prevouts([_whole(path, raw, txid)], INPUTS_WAIT_S)
        return found

    async def confirmation(self, txid: str) -> Confirmation | None:
        """Return the block that contains a transaction; None if it is not mined or not known.

        Only `mempool` distinguishes the two. After a reorganisation the backend may name a block that is no longer in
        the chain.
        """
        status: StatusResponse | None = await self._get(f"tx/{_quoted(txid)}/status", StatusResponse)
        return None if status is None else status.confirmation

    async def is_in_chain(self, place: Confirmation) -> bool:
        """Return whether the block of a confirmation is in the best chain.

        The height in a confirmation is one too low while the backend is a block behind its node.
        """
        return (
            await self.block_hash(place.block_height) == place.block_hash
            or await self.block_hash(place.block_height + 1) == place.block_hash
        )

    async def replacer(self, txid: str) -> str | None:
        """Return the txid of the transaction that replaced this one; None if the backend knows of none."""
        return next((each.replaced_by for each in await self.family(txid) if each.txid == txid), None)

    async def spender(self, outpoint: str) -> str | None:
        """Return the txid of the transaction that spends an output (`model.outpoint`).

        None if the output is unspent, and without electrs, which alone answers this.
        """
        txid, _, vout = outpoint.partition(":")
        path = f"tx/{_quoted(txid)}/outspend/{_quoted(vout)}"
        if not self._rest.routes.is_electrs(path):
            return None
        found: OutspendResponse | None = await self._get(path, OutspendResponse)
        return None if found is None else found.txid

    async def family(self, txid: str) -> list[Relative]:
        """Return every transaction in this transaction's tree of replacements, the latest first."""
        found: RbfResponse | None = await self._get(f"tx/{_quoted(txid)}/rbf", RbfResponse)
        return [] if found is None or found.replacements is None else relatives(found.replacements)

    async def latest_families(self) -> list[list[Relative]]:
        """Return the trees of the latest replacements (25), newest first; empty from a backend without this call.

        A tree that cannot be read is left out.
        """
        found: list[msgspec.Raw] | None = await self._get("replacements", list[msgspec.Raw])
        families = [family for raw in found or () if (family := family_of(raw)) is not None]
        if found and not families:
            raise RestError(RestFailure.GARBAGE, "replacements: no tree in it can be read")
        return families

    async def tip_height(self) -> int:
        """Return the height of the best block that the backend has; its node may be ahead."""
        async with self._slot():
            return await self._rest.tip_height()

    async def block_hash(self, height: int) -> str | None:
        """Return the hash of the block at a height of the best chain; None above its tip.

        The backend responds to a height above the tip with status 500.
        """
        path = f"block-height/{height}"
        try:
            async with self._slot():
                found = await self._rest.text(path)
        except RestError as error:
            if error.reason is RestFailure.SERVER_ERROR and height > await self.tip_height():
                return None
            raise
        if found is None:
            # A missing route must not look like a chain without blocks.
            if height > await self.tip_height():
                return None
            found = self._rest.found(path, await self._when_indexed(path))
        if len(found) != HASH_DIGITS or not set(found) <= set("0123456789abcdef"):
            raise RestError(RestFailure.GARBAGE, f"{path}: not a block hash: {found[:HASH_DIGITS]!r}")
        return found

    async def _when_indexed(self, path: str) -> str | None:
        """Return the response of electrs for a block that the backend has already announced but electrs is indexing."""
        found = None
        tries = INDEX_TRIES if self._rest.routes.is_electrs(path) else 0
        while found is None and tries > 0:
            tries -= 1
            await asyncio.sleep(INDEX_WAIT_S)
            await self._wait_turn()
            found = await self._rest.text(path)
        return found

    async def block(self, block_hash: str, height: int | None = None) -> Block:
        """Return a block's position in the chain. Raises RestError if `height` is given and is not its height."""
        path = f"block/{block_hash}"
        header: HeaderResponse = self._rest.found(path, await self._get(path, HeaderResponse))
        if header.id != block_hash:
            raise RestError(RestFailure.GARBAGE, f"{path}: another block: {header.id}")
        if height is not None and header.height != height:
            raise RestError(RestFailure.GARBAGE, f"{path}: height {header.height}, expected {height}")
        return header.block

    async def summary(self, block_hash: str) -> list[Summary]:
        """Return the summary of every transaction in a block except the coinbase."""
        path = f"block/{block_hash}/summary"
        stripped: list[msgspec.Raw] = self._rest.found(path, await self._get(path, list[msgspec.Raw]))
        if not stripped:
            raise RestError(RestFailure.INCOMPLETE, f"{path}: a block without a coinbase")
        found = [summary_of(raw, index) for index, raw in enumerate(stripped)]
        if all(each.txid is None and each.value is None for each in found):
            raise RestError(RestFailure.GARBAGE, f"{path}: no transaction in it can be read")
        return found[1:]

    def pages_of(self, entries: Iterable[Summary]) -> list[list[Summary]]:
        """Group entries of a block into the smallest number of `page` calls that return all of them."""
        routes = self._rest.routes
        pages: list[list[Summary]] = []
        for entry in sorted(entries, key=lambda each: each.index):
            if pages and entry.index < routes.page_of(pages[-1][0].index) + routes.page:
                pages[-1].append(entry)
            else:
                pages.append([entry])
        return pages

    async def page(self, block_hash: str, entries: Sequence[Summary]) -> list[Transaction | None]:
        """Return the transactions of one group of `pages_of`, in full, with fee and size from the summary.

        The entry is None for a transaction that is not in the response or cannot be read: `mined` fetches it alone.
        The list of the block is quick for any number of inputs, but lacks the prevouts beyond the 13th input:
        `completed` fetches those.
        """
        start = self._rest.routes.page_of(entries[0].index)
        path = f"block/{block_hash}/txs/{start}"
        raws: list[msgspec.Raw] = await self._get(path, list[msgspec.Raw]) or []
        listed = [read(raw, transaction_of, None) for raw in raws]
        if listed and not any(listed):
            raise RestError(RestFailure.GARBAGE, f"{path}: no transaction in it can be read")
        by_txid = {transaction.txid: transaction for transaction in listed if transaction is not None}
        places = dict(enumerate(listed))
        # Without a txid in the summary, the position in the list identifies the transaction.
        found = (
            places.get(entry.index - start) if entry.txid is None else by_txid.get(entry.txid) for entry in entries
        )
        return [
            None if transaction is None else as_mined(transaction, entry)
            for transaction, entry in zip(found, entries, strict=True)
        ]

    async def mined(self, block_hash: str, entry: Summary) -> Transaction:
        """Return a transaction of a block that its page lacked. Raises RestError if the backend does not know it."""
        found = await self._full(entry.txid) if entry.txid is not None else None
        if found is None:
            what = f"block/{block_hash}: transaction {entry.index}"
            raise RestError(RestFailure.INCOMPLETE, f"{what} is in its summary, and the backend does not know it")
        return as_mined(found, entry)

    async def completed(self, transaction: Transaction) -> Transaction:
        """Return a mined transaction with its prevouts if the backend provides them quickly; otherwise unchanged."""
        missing = any(spent.prevout is None for spent in transaction.inputs)
        if not missing or len(transaction.inputs) > INPUTS_LIMIT:
            return transaction
        try:
            better = await self._full(transaction.txid)
        except RestError as error:
            if error.reason not in {RestFailure.TIMEOUT, RestFailure.SERVER_ERROR}:
                raise
            return transaction
        if better is None or len(better.inputs) != len(transaction.inputs):
            return transaction
        found = replace(transaction, inputs=better.inputs)
        return found if found.fee_sat is not None else with_computed_fee(found)

    async def raw_block(self, block_hash: str) -> bytes | None:
        """Return a block in its network serialisation; None from a backend without this call."""
        async with self._slot():
            return await self._rest.raw(f"block/{block_hash}/raw")

    async def spenders(self, block_hash: str, outpoints: Iterable[str]) -> dict[str, str] | None:
        """Return the transactions of a block that spend one of these outpoints (`model.outpoint`): txid by outpoint.

        None from a backend without `raw_block`.
        """
        raw = await self.raw_block(block_hash)
        if raw is None:
            return None
        try:
            # In a thread: reading a block takes a tenth of a second, which would block the event loop.
            return await asyncio.to_thread(spenders_in, raw, outpoints)
        except SerialError as error:
            raise RestError(RestFailure.GARBAGE, f"block/{block_hash}/raw: {error}") from error


def _quoted(txid: str) -> str:
    """Quote a txid for a URL: the stream decoder checks only its length."""
    return quote(txid, safe="")


def _whole(path: str, raw: msgspec.Raw, txid: str | None = None) -> Transaction:
    """Return a transaction in full. Raises RestError if it cannot be read or has another txid."""
    try:
        found = transaction_of(raw)
    except UNREADABLE as error:
        raise RestError(RestFailure.GARBAGE, f"{path}: not a transaction: {error}") from error
    if txid is not None and found.txid != txid:
        raise RestError(RestFailure.GARBAGE, f"{path}: another transaction: {found.txid[:HASH_DIGITS]}")
    return found
