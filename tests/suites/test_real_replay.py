"""Everything that a real backend said is read whole: each recorded frame, and each answer that a backfill asks for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kit.recordings import Answer, Frame, Recording, added, recording
from whaled.config.sections import UpstreamSettings
from whaled.registry import Registry
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.dialect import decode
from whaled.sources.mempool_space.http import RestError, RestMeter
from whaled.sources.mempool_space.rawblock import spenders_in
from whaled.sources.mempool_space.rest import Rest

BACKENDS = ("none", "none-3.2.1", "esplora")
FRAMES = [(name, frame) for name in BACKENDS for frame in recording(name).frames]
UNKNOWN = "0" * 64
# Of blocks that are in these recordings with all that is asked about them.
BLOCKS = ("fees", "doublespend14", "odd3")


@pytest.mark.parametrize(
    ("name", "frame"), FRAMES, ids=[f"{name}-{place}-{frame.label}" for place, (name, frame) in enumerate(FRAMES)]
)
def test_a_real_frame_is_read_completely(name: str, frame: Frame) -> None:
    told = frame.json
    read = decode(frame.raw)
    assert read.skipped == ()
    assert (read.block is not None) == ("block" in told)
    if "mempool-transactions" not in told:
        return
    delta = told["mempool-transactions"]
    assert read.delta is not None
    assert read.delta.malformed == 0
    assert list(read.delta.removed) == delta["removed"]
    assert list(read.delta.mined) == delta["mined"]
    pairs = [(pair.replaced, pair.by) for pair in read.delta.replaced]
    assert pairs == [(pair["replaced"], pair["by"]["txid"]) for pair in delta["replaced"]]
    whole = {tx.txid: tx for tx in read.delta.at_least(0)}
    for tx in (*added(frame), *(pair["by"] for pair in delta["replaced"])):
        found = whole[tx["txid"]]
        assert found.value_sat == sum(vout["value"] for vout in tx["vout"])
        assert [(spent.txid, spent.vout) for spent in found.inputs] == [(vin["txid"], vin["vout"]) for vin in tx["vin"]]
        assert [spent.prevout is None for spent in found.inputs] == [vin["prevout"] is None for vin in tx["vin"]]
        assert len(found.outputs) == len(tx["vout"])
        if not (tx["status"]["confirmed"] and tx["fee"] == 0):  # came between two calls of the node: not known
            assert found.fee_sat == round(tx["fee"])


@asynccontextmanager
async def replaying(name: str) -> AsyncIterator[tuple[Backend, Recording]]:
    """Requests to a server that answers what a real backend answered."""
    found = recording(name)
    by_path = {answer.path: answer for answer in reversed(found.answers) if answer.data is None}

    async def answer(request: web.Request) -> web.Response:
        if request.method == "POST":
            return web.json_response([None] * len(await request.json()))
        known = by_path.get(request.path_qs.removeprefix("/api/v1/"))
        if known is None:
            raise AssertionError(f"{request.path_qs} was not recorded")
        return _response(known)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"127.0.0.1:{runner.addresses[0][1]}/api/v1"
        upstream = UpstreamSettings(url=f"ws://{url}/ws", rest_url=f"http://{url}", rest_timeout=5.0)
        async with Rest.open(upstream, RestMeter(Registry())) as rest:
            yield Backend(rest, 10_000.0), found
    finally:
        await runner.cleanup()


def _response(known: Answer) -> web.Response:
    body = bytes.fromhex(known.body[4:]) if known.body.startswith("hex:") else known.body.encode()
    headers = {"Content-Type": known.type} if known.type else {}
    return web.Response(status=known.status, body=body, headers=headers)


TXIDS = [
    label
    for label, txid in recording("none").txids.items()
    if any(answer.path == f"tx/{txid}" for answer in recording("none").answers)
]


@pytest.mark.slow
@pytest.mark.parametrize("label", TXIDS)
async def test_a_transaction_from_rest_is_read_completely(label: str) -> None:
    async with replaying("none") as (backend, found):
        answer = found.tx(label)
        tx = await backend.transaction(found.txids[label])
        if answer.status == 404:
            assert tx is None
            return
        told = answer.json
        assert tx is not None
        # A mined one that pays nothing looks like one whose fee the backend does not know.
        assert tx.fee_sat == (told["fee"] or None)
        assert tx.value_sat == sum(vout["value"] for vout in told["vout"])
        assert all(spent.prevout is not None for spent in tx.inputs)
        assert tx.is_confirmed == told["status"]["confirmed"]
        place = await backend.confirmation(found.txids[label])
        assert (place.block_hash if place else None) == told["status"].get("block_hash")


# Not odd3 of 3.2.1: it leaves out a transaction whose script it cannot write (an output script that ends in a push).
@pytest.mark.parametrize(("name", "label"), [*(("none", label) for label in BLOCKS), ("none-3.2.1", "fees")])
async def test_a_block_from_rest_is_read_completely(name: str, label: str) -> None:
    async with replaying(name) as (backend, found):
        block_hash = found.blocks[label]
        block = await backend.block(block_hash)
        assert block.hash == block_hash
        lines = found.block(label, "/summary").json[1:]
        entries = await backend.summary(block_hash)
        assert [(each.txid, each.value) for each in entries] == [(line["txid"], line["value"]) for line in lines]
        assert [each.fee for each in entries] == [round(line["fee"]) for line in lines]
        assert [each.first_seen for each in entries] == [line.get("time") for line in lines]
        (page,) = backend.pages_of(entries)
        whole = await backend.page(block_hash, page)
        assert [tx and tx.txid for tx in whole] == [line["txid"] for line in lines]
        assert [tx and tx.fee_sat for tx in whole] == [round(line["fee"]) for line in lines]
        assert [tx and tx.value_sat for tx in whole] == [line["value"] for line in lines]


@pytest.mark.parametrize("label", BLOCKS)
async def test_a_raw_block_from_rest_has_the_spender_of_each_outpoint(label: str) -> None:
    async with replaying("none") as (backend, found):
        raw = await backend.raw_block(found.blocks[label])
        assert raw is not None
        wanted = {
            f"{vin['txid']}:{vin['vout']}": tx["txid"]
            for tx in found.block(label, "/txs").json[1:]
            for vin in tx["vin"]
        }
        assert spenders_in(raw, wanted) == wanted


async def test_trees_of_replacements_are_read_completely() -> None:
    async with replaying("none") as (backend, found):
        names = found.txids
        assert await backend.replacer(names["rbf1_a"]) == names["rbf1_b"]
        assert await backend.replacer(names["rbf2_b"]) == names["rbf2_c"]
        # Not named by the backend: a package took its place, and the coin was free again.
        assert await backend.replacer(names["pkg_old"]) is None
        told = found.answer("replacements").json
        assert [family[0].txid for family in await backend.latest_families()] == [tree["tx"]["txid"] for tree in told]


async def test_a_replaced_transaction_is_read_completely() -> None:
    async with replaying("none") as (backend, found):
        for label in ("rbf1_a", "rbf2_b", "ds_loser", "evict_parent"):
            told = found.tx(label, "/cached").json
            tx = await backend.cached(found.txids[label])
            assert tx is not None
            assert (tx.txid, tx.fee_sat) == (told["txid"], told["fee"])
        assert await backend.cached(found.txids["evict_child"]) is None


async def test_requests_for_unknown_ids_return_nothing() -> None:
    async with replaying("none") as (backend, _):
        assert await backend.transaction(UNKNOWN) is None
        assert await backend.confirmation(UNKNOWN) is None
        assert await backend.cached(UNKNOWN) is None
        assert await backend.family(UNKNOWN) == []
        with pytest.raises(RestError):
            await backend.summary(UNKNOWN)


async def test_the_mempool_from_rest_is_read_completely() -> None:
    async with replaying("none") as (backend, found):
        told = next(each for each in found.answers if each.path == "mempool/txids")
        assert await backend.mempool() == told.json
