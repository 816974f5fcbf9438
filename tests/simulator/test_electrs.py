"""In esplora mode the simulator is a backend that reads electrs, and electrs beside it, as nginx shows both."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import aiohttp
import pytest

from whaled.model import SAT_PER_BTC
from whaled.simulator.backend import Backend, Delta
from whaled.simulator.messages import Messages
from whaled.simulator.scripts import ScriptType
from whaled.simulator.server import Simulator
from whaled.simulator.settings import Mode, SimulatorSettings
from whaled.simulator.transactions import TxKind
from whaled.simulator.txframes import full_tx
from whaled.simulator.world import World
from whaled.sources.mempool_space.rawblock import spenders_in

WHALE = 100 * SAT_PER_BTC
QUIET = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0, mode=Mode.ESPLORA)
NODE = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0)
UNKNOWN = "0" * 64


class Asking:
    """REST of a simulator: `v1` asks the backend, `api` electrs. (status, body)."""

    def __init__(self, sim: Simulator, session: aiohttp.ClientSession) -> None:
        self._sim = sim
        self._session = session

    async def _get(self, url: str) -> tuple[int, Any]:
        async with self._session.get(url) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            if response.content_type == "application/octet-stream":
                return response.status, await response.read()
            return response.status, await response.text()

    async def v1(self, path: str) -> tuple[int, Any]:
        return await self._get(f"{self._sim.rest_url}/{path}")

    async def api(self, path: str) -> tuple[int, Any]:
        return await self._get(f"{self._sim.electrs_url}/{path}")


@asynccontextmanager
async def simulating(settings: SimulatorSettings) -> AsyncIterator[tuple[Simulator, Asking]]:
    async with Simulator(settings) as sim, aiohttp.ClientSession() as session:
        yield sim, Asking(sim, session)


async def test_the_backend_has_no_routes_of_electrs() -> None:
    async with simulating(QUIET) as (sim, ask):
        tx = sim.world.pay(WHALE)
        await sim.poll()
        tip = sim.world.chain.tip.hash
        for path in (
            f"tx/{tx.txid}", f"tx/{tx.txid}/status", f"tx/{tx.txid}/hex", f"tx/{tx.txid}/outspends", "mempool",
            "mempool/txids", "mempool/recent", "blocks/tip/hash", "block-height/900000", f"block/{tip}/txids",
            f"block/{tip}/txs", f"block/{tip}/txs/0", f"block/{tip}/raw", f"block/{tip}/header",
        ):  # fmt: skip
            status, body = await ask.v1(path)
            assert (status, f"<pre>Cannot GET /api/v1/{path}</pre>" in body) == (404, True)
            assert (await ask.api(path))[0] == 200
        for path in (
            f"tx/{tx.txid}/rbf", "blocks", "blocks/tip/height", f"block/{tip}", f"block/{tip}/summary",
            "fees/recommended", "fees/precise", "prices", "init-data", "replacements", "chain-tips", "backend-info",
        ):  # fmt: skip
            assert (await ask.v1(path))[0] == 200
        assert (await ask.v1("init-data"))[1]["backend"] == "esplora"
        assert (await ask.v1("backend-info"))[1]["backend"] == "esplora"


async def test_a_backend_that_reads_its_node_has_no_electrs() -> None:
    async with simulating(NODE) as (sim, ask):
        tx = sim.world.pay(WHALE)
        assert (await ask.v1(f"tx/{tx.txid}"))[0] == 200
        assert (await ask.api(f"tx/{tx.txid}"))[0] == 404


async def test_electrs_sends_transactions_with_their_prevouts() -> None:
    async with simulating(QUIET) as (sim, ask):
        tx = sim.world.transact(TxKind.ALL_SCRIPTS, WHALE)
        _, found = await ask.api(f"tx/{tx.txid}")
        assert list(found) == [
            "txid",
            "version",
            "locktime",
            "vin",
            "vout",
            "size",
            "weight",
            "sigops",
            "fee",
            "status",
        ]
        assert sum(vin["prevout"]["value"] for vin in found["vin"]) == tx.in_sat
        assert found["fee"] == tx.fee
        assert found["status"] == {"confirmed": False}
        for vout, payment in zip(found["vout"], tx.outputs, strict=True):
            assert ("scriptpubkey_address" in vout) == bool(payment.script.address)
        block = sim.world.mine()
        _, status = await ask.api(f"tx/{tx.txid}/status")
        assert (status["block_hash"], status["block_height"]) == (block.hash, block.height)


async def test_electrs_sends_errors_as_plain_text() -> None:
    async with simulating(QUIET) as (sim, ask):
        tip = sim.world.chain.tip.hash
        assert await ask.api(f"tx/{UNKNOWN}") == (404, "Transaction not found")
        assert await ask.api("tx/zz") == (400, "Invalid hex string")
        assert await ask.api(f"tx/{UNKNOWN}/status") == (200, {"confirmed": False})
        assert await ask.api(f"tx/{UNKNOWN}/outspend/0") == (200, {"spent": False})
        assert await ask.api(f"block/{UNKNOWN}") == (404, "Block not found")
        assert await ask.api("block-height/9999999") == (404, "Block not found")
        assert await ask.api(f"block/{tip}/txs/1") == (404, "start index out of range")
        assert await ask.api("nowhere") == (404, 'endpoint does not exist "/nowhere"')


async def test_a_page_of_electrs_starts_at_a_multiple_of_25() -> None:
    async with simulating(QUIET) as (sim, ask):
        sim.world.burst(30)
        block = sim.world.mine()
        _, first = await ask.api(f"block/{block.hash}/txs/0")
        _, second = await ask.api(f"block/{block.hash}/txs/25")
        assert [tx["txid"] for tx in (*first, *second)] == block.txids
        assert await ask.api(f"block/{block.hash}/txs/10") == (400, "start index must be a multipication of 25")


async def test_electrs_names_the_spender_of_an_output() -> None:
    async with simulating(QUIET) as (sim, ask):
        parent = sim.world.pay(WHALE)
        child = sim.world.spend(parent.txid)
        place = child.inputs[0].vout
        _, spend = await ask.api(f"tx/{parent.txid}/outspend/{place}")
        assert spend == {"spent": True, "txid": child.txid, "vin": 0, "status": {"confirmed": False}}
        block = sim.world.mine()
        _, spends = await ask.api(f"tx/{parent.txid}/outspends")
        assert spends[place]["status"]["block_hash"] == block.hash
        assert [each["spent"] for each in spends].count(True) == 1


async def test_electrs_keeps_only_the_txids_of_an_abandoned_block() -> None:
    async with simulating(QUIET) as (sim, ask):
        sim.world.pay(WHALE)
        dead = sim.world.mine()
        sim.world.reorg(1)
        assert await ask.api(f"block/{dead.hash}/txids") == (200, dead.txids)
        assert (await ask.api(f"block/{dead.hash}"))[0] == 404
        assert (await ask.api(f"block/{dead.hash}/raw"))[0] == 404
        assert (await ask.api(f"block/{dead.hash}/status"))[1]["in_best_chain"] is False


@pytest.mark.parametrize("settings", [QUIET, NODE], ids=["electrs", "node"])
async def test_a_raw_block_is_the_block(settings: SimulatorSettings) -> None:
    async with simulating(settings) as (sim, ask):
        whale = sim.world.pay(WHALE)
        for kind in (TxKind.ALL_SCRIPTS, TxKind.CONSOLIDATION, TxKind.BATCH, TxKind.COINJOIN, TxKind.OP_RETURN):
            sim.world.transact(kind, WHALE)
        block = sim.world.mine()
        status, raw = await (ask.api if settings.mode is Mode.ESPLORA else ask.v1)(f"block/{block.hash}/raw")
        assert status == 200
        assert sha256(sha256(raw[:80]).digest()).digest()[::-1].hex() == block.hash
        assert raw[36:68][::-1].hex() == block.merkle_root
        wanted = {f"{coin.txid}:{coin.vout}": tx.txid for tx in block.txs for coin in tx.inputs}
        assert whale.txid in wanted.values()
        assert spenders_in(raw, wanted) == wanted


async def test_a_raw_transaction_hashes_to_its_txid() -> None:
    async with simulating(NODE) as (sim, ask):
        tx = sim.world.pay(WHALE)
        _, text = await ask.v1(f"tx/{tx.txid}/hex")
        assert len(text) == tx.size * 2


def polled(world: World, backend: Backend) -> list[Delta]:
    return [update for update in backend.poll(world.now) if isinstance(update, Delta)]


def esplora() -> tuple[World, Backend]:
    world = World(QUIET, 1e9)
    backend = Backend(world.chain, QUIET, world.now, usd=None)
    polled(world, backend)
    return world, backend


def test_transactions_just_mined_are_added_again_until_electrs_has_the_block() -> None:
    world, backend = esplora()
    tx = world.pay(WHALE)
    polled(world, backend)
    world.now += 2
    world.mine()
    mined, again = polled(world, backend)
    assert tx.txid in mined.mined
    assert [seen.tx.txid for seen in again.added] == [tx.txid]
    assert again.added[0].block is None
    world.now += 2
    assert [delta.removed for delta in polled(world, backend)] == [[tx.txid]]


def test_a_block_that_electrs_has_adds_no_transaction_again() -> None:
    world, backend = esplora()
    world.pay(WHALE)
    polled(world, backend)
    world.mine()
    world.now += 2
    (mined,) = polled(world, backend)
    assert mined.added == ()


@pytest.mark.parametrize("late", [0.0, 2.0])
def test_the_winner_of_a_double_spend_has_the_form_of_its_source(late: float) -> None:
    world, backend = esplora()
    loser = world.pay(WHALE)
    polled(world, backend)
    world.now += 2
    winner = world.rival(loser.txid)
    world.mine([winner])
    world.now += late
    block = next(delta for delta in polled(world, backend) if delta.block is not None)
    ((lost, seen),) = block.replaced
    assert (lost, seen.tx.txid) == (loser.txid, winner.txid)
    frame = bytes(full_tx(seen, electrs=True))
    assert (b'"prevout":null' in frame) == (late == 0.0)
    assert (b'"inner_redeemscript_asm":""' in frame) == (late == 0.0)


def test_the_stream_of_a_backend_on_electrs_has_prevouts_and_no_empty_keys() -> None:
    world, backend = esplora()
    tx = world.transact(TxKind.PAYMENT, WHALE)
    (delta,) = polled(world, backend)
    parts = Messages(backend, world).update(delta)
    assert b'"prevout":null' not in parts["mempool-transactions"]
    assert b'"scriptpubkey_address":""' not in parts["mempool-transactions"]
    is_witness = tx.inputs[0].script.type not in {ScriptType.P2PKH, ScriptType.P2PK, ScriptType.MULTISIG}
    assert (b'"witness"' in parts["mempool-transactions"]) == is_witness
