"""A backend that reads its node and one next to electrs, recorded over one chain, give the same responses.

`data/modes.json.gz` holds answers of two real backends (3.4-dev) over one regtest node: mode none, and mode esplora
behind a front that joins it with an electrs, as nginx does. The electrs is a stand-in after mempool/electrs.
"""

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import pytest
from aiohttp import web

from kit.paths import DATA
from whaled.config.sections import UpstreamSettings
from whaled.model import Transaction
from whaled.registry import Registry
from whaled.source import Confirmation, Summary
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.http import RestMeter
from whaled.sources.mempool_space.rest import Rest

MODES = ("none", "esplora")


@cache
def recording() -> dict[str, Any]:
    raw = gzip.decompress((DATA / "modes.json.gz").read_bytes())
    found: dict[str, Any] = json.loads(raw)
    return found


def about(name: str) -> Any:
    return recording()["about"][name]


@asynccontextmanager
async def asking(mode: str) -> AsyncIterator[Backend]:
    """Requests to the recorded answers of a mode; a path that was not recorded fails the test by its status."""
    answers = recording()["modes"][mode]

    async def answer(request: web.Request) -> web.Response:
        found = answers.get(request.path, {"status": 418, "body": "not recorded", "type": "text/plain"})
        kind = found["type"].partition(";")[0]
        return web.Response(status=found["status"], text=found["body"], content_type=kind)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        async with Rest.open(UpstreamSettings(url=f"ws://127.0.0.1:{port}/api/v1/ws"), RestMeter(Registry())) as rest:
            rest.routes.mode = mode
            rest.routes.esplora = f"http://127.0.0.1:{port}/api/" if mode == "esplora" else None
            yield Backend(rest, 10_000.0)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("mode", MODES)
async def test_the_chain_is_read(mode: str) -> None:
    block_hash, height = about("block"), about("height")
    async with asking(mode) as backend:
        assert await backend.tip_height() == height
        assert await backend.block_hash(height) == block_hash
        assert await backend.block_hash(height + 9) is None
        assert (await backend.block(block_hash)).height == height


@pytest.mark.parametrize("mode", MODES)
async def test_the_mempool_and_the_outcome_of_whales_are_read(mode: str) -> None:
    whale, memory, replaced = about("whale"), about("memory"), about("replaced")
    async with asking(mode) as backend:
        assert set(await backend.mempool()) == {memory, about("by")}
        assert await backend.confirmation(whale) == Confirmation(about("block"), about("height"))
        for gone in (memory, replaced, about("unknown")):
            assert await backend.confirmation(gone) is None
        assert await backend.transaction(about("unknown")) is None
        assert await backend.transaction(replaced) is None
        assert await backend.replacer(replaced) == about("by")
        assert (await backend.latest_families())[0][0].txid == about("by")


async def in_both(name: str) -> list[Transaction]:
    found = []
    for mode in MODES:
        async with asking(mode) as backend:
            transaction = await backend.transaction(about(name))
            assert transaction is not None
            found.append(transaction)
    return found


async def test_a_transaction_of_the_mempool_is_the_same_with_its_inputs_and_its_effective_rate() -> None:
    none, esplora = await in_both("memory")
    assert none.inputs == esplora.inputs
    assert none.outputs == esplora.outputs
    assert all(each.prevout is not None for each in esplora.inputs)
    assert (none.fee_sat, none.fee_rate) == (esplora.fee_sat, esplora.fee_rate)
    assert none.fee_rate is not None


async def test_every_transaction_of_a_block_is_the_same_by_pages_of_either_size() -> None:
    block_hash = about("block")
    blocks = []
    for mode in MODES:
        async with asking(mode) as backend:
            summary = await backend.summary(block_hash)
            assert [entry.txid for entry in summary] == about("txids")[1:]
            pages = backend.pages_of(summary)
            found = [each for page in pages for each in await backend.page(block_hash, page)]
            blocks.append((pages, found))
    (none_pages, none), (esplora_pages, esplora) = blocks
    assert [page[0].index for page in none_pages] == [1, 11, 21]
    assert [page[0].index for page in esplora_pages] == [1, 25]
    for one, other in zip(none, esplora, strict=True):
        assert one is not None
        assert other is not None
        assert (one.txid, one.fee_sat, one.vsize, one.fee_rate) == (
            other.txid,
            other.fee_sat,
            other.vsize,
            other.fee_rate,
        )
        assert one.outputs == other.outputs
        assert [each.txid for each in one.inputs] == [each.txid for each in other.inputs]


async def test_a_place_in_a_page_of_electrs_counts_from_its_own_first_transaction() -> None:
    async with asking("esplora") as backend:
        entry = Summary(None, None, None, 0.0, 7)  # of which the summary knows nothing but the place
        (found,) = await backend.page(about("block"), [entry])
    assert found is not None
    assert found.txid == about("txids")[7]
