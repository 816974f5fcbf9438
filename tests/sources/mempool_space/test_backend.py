"""The REST calls of the backfill: responses of the simulated backend, and invalid ones."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from kit.backfill import Front, world
from kit.whales import BTC
from whaled.config.sections import UpstreamSettings
from whaled.registry import Registry
from whaled.simulator.server import Simulator
from whaled.simulator.settings import Mode
from whaled.simulator.transactions import TxKind
from whaled.source import Summary
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.http import RestError, RestFailure, RestMeter
from whaled.sources.mempool_space.rest import Rest

TXID, HASH = "ab" * 32, "cd" * 32


@asynccontextmanager
async def asking(per_second: float = 10_000.0) -> AsyncIterator[tuple[Backend, Simulator, Front]]:
    """Requests to a simulated backend behind a proxy."""
    front = Front()
    async with world() as (sim, _), front.before(sim):
        upstream = UpstreamSettings(url=sim.url, rest_url=front.url, rest_timeout=5.0)
        async with Rest.open(upstream, RestMeter(Registry())) as rest:
            yield Backend(rest, per_second), sim, front


async def test_a_mempool_transaction_is_read_in_full() -> None:
    async with asking() as (backend, sim, _):
        tx = sim.world.pay(150 * BTC)
        await sim.poll()
        assert tx.txid in await backend.mempool()
        found = await backend.transaction(tx.txid)
        assert found is not None
        assert (found.txid, found.value_sat, found.fee_sat) == (tx.txid, 150 * BTC, tx.fee)
        assert all(spent.prevout is not None for spent in found.inputs)
        assert not found.is_confirmed
        assert found.first_seen is not None
        assert await backend.confirmation(tx.txid) is None
        assert await backend.family(tx.txid) == []
        assert await backend.replacer(tx.txid) is None


async def test_requests_for_unknown_ids_return_nothing() -> None:
    async with asking() as (backend, sim, _):
        assert await backend.transaction(TXID) is None
        assert await backend.cached(TXID) is None
        assert await backend.confirmation(TXID) is None
        assert await backend.replacer(TXID) is None
        assert await backend.latest_families() == []
        assert await backend.block_hash(sim.world.chain.tip.height + 1) is None


async def test_a_block_is_read_with_its_position_values_and_transactions() -> None:
    async with asking() as (backend, sim, _):
        txs = [sim.world.pay(sat * BTC) for sat in (150, 3, 200)]
        await sim.poll()
        before = sim.world.chain.tip
        mined = sim.world.mine()
        assert await backend.tip_height() == before.height  # the backend's, which has not looked yet
        await sim.poll()
        assert await backend.tip_height() == mined.height
        assert await backend.block_hash(mined.height) == mined.hash
        block = await backend.block(mined.hash)
        assert (block.height, block.hash, block.previous_hash) == (mined.height, mined.hash, before.hash)
        entries = {entry.txid: entry for entry in await backend.summary(mined.hash)}
        assert entries.keys() == {tx.txid for tx in txs}
        for tx in txs:
            entry = entries[tx.txid]
            assert (entry.value, entry.fee) == (tx.out_sat, tx.fee)
            (found,) = await backend.page(mined.hash, [entry])
            assert found is not None
            assert (found.txid, found.value_sat, found.fee_sat) == (tx.txid, tx.out_sat, tx.fee)
            assert all(spent.prevout is not None for spent in found.inputs)
            place = await backend.confirmation(tx.txid)
            assert place is not None
            assert (place.block_hash, place.block_height) == (mined.hash, mined.height)


async def test_a_transaction_with_many_inputs_is_completed_without_requesting_it() -> None:
    async with asking() as (backend, sim, front):
        whale = sim.world.transact(TxKind.CONSOLIDATION, 150 * BTC)
        await sim.poll()
        mined = sim.world.mine()
        (entry,) = (each for each in await backend.summary(mined.hash) if each.txid == whale.txid)
        front.spoil(f"tx/{whale.txid}", 500)
        (listed,) = await backend.page(mined.hash, [entry])
        assert listed is not None
        found = await backend.completed(listed)
        assert found.value_sat == whale.out_sat
        assert len(found.inputs) == len(whale.inputs)


async def test_a_chain_of_replacements_is_read_completely() -> None:
    async with asking() as (backend, sim, _):
        first = sim.world.pay(150 * BTC)
        await sim.poll()
        second = sim.world.replace(first.txid)
        await sim.poll()
        third = sim.world.replace(second.txid)
        await sim.poll()
        expected = {third.txid: None, second.txid: third.txid, first.txid: second.txid}
        for txid, winner in expected.items():
            family = await backend.family(txid)
            assert {each.txid: each.replaced_by for each in family} == expected
            assert family[0].txid == third.txid
            assert await backend.replacer(txid) == winner
        assert await backend.latest_families() == [await backend.family(first.txid)]
        loser = await backend.cached(first.txid)
        assert loser is not None
        assert loser.value_sat == first.out_sat
        assert (await backend.cached(third.txid) or loser).txid == third.txid  # whoever replaced is kept too
        assert await backend.cached("0" * 64) is None
        values = {each.txid: each.value for each in await backend.family(first.txid)}
        assert values[first.txid] == first.out_sat


Ask = Callable[[Backend], Awaitable[object]]
ENTRY = Summary(TXID, 5, 1, 1.0, 1)
CALLS: dict[str, tuple[str, Ask]] = {
    "mempool": ("mempool/txids", lambda backend: backend.mempool()),
    "transaction": (f"tx/{TXID}", lambda backend: backend.transaction(TXID)),
    "cached": (f"tx/{TXID}/cached", lambda backend: backend.cached(TXID)),
    "confirmation": (f"tx/{TXID}/status", lambda backend: backend.confirmation(TXID)),
    "family": (f"tx/{TXID}/rbf", lambda backend: backend.family(TXID)),
    "latest": ("replacements", lambda backend: backend.latest_families()),
    "tip": ("blocks/tip/height", lambda backend: backend.tip_height()),
    "hash": ("block-height/900000", lambda backend: backend.block_hash(900_000)),
    "block": (f"block/{HASH}", lambda backend: backend.block(HASH)),
    "summary": (f"block/{HASH}/summary", lambda backend: backend.summary(HASH)),
    "page": (f"block/{HASH}/txs/1", lambda backend: backend.page(HASH, [ENTRY])),
}
GARBAGE = {
    "page": b"<html></html>",
    "nothing": b"",
    "text": b'"text"',
    "object": b"{}",
    "numbers": b"[7]",
    "nested": b"[" * 100_000,
    "nested trees": b'{"replacements":' + b'{"tx":{"txid":"%s"},"replaces":[' % (b"a" * 64) * 50_000,
    "bytes": bytes(range(256)),
}


@pytest.mark.slow
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("call", CALLS)
async def test_a_nonsensical_response_is_a_failure_and_nothing_else(call: str, garbage: str) -> None:
    path, ask = CALLS[call]
    async with asking() as (backend, _, front):
        front.spoil(path, 200, GARBAGE[garbage])
        with pytest.raises(RestError) as failure:
            await ask(backend)
        assert failure.value.reason is RestFailure.GARBAGE


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("transaction", b'{"txid":"%s","vin":[],"vout":[{"value":1}]}' % (b"ee" * 32)),
        ("transaction", b'{"txid":"%s","vin":[],"vout":[{"value":-1}]}' % TXID.encode()),
        ("block", b'{"id":"%s","height":1,"timestamp":1}' % (b"ee" * 32)),
        ("block", b'{"id":"%s","height":-1,"timestamp":1}' % HASH.encode()),
        ("hash", b"cd" * 31),
        ("hash", b"zz" * 32),
        ("block", b'{"id":"%s","height":1,"timestamp":1%s}' % (HASH.encode(), b"0" * 400)),
        ("block", b'{"id":"%s","height":1%s,"timestamp":1}' % (HASH.encode(), b"0" * 30)),
        ("tip", b"1" + b"0" * 400),
        ("family", b'{"replacements":{"tx":{"txid":"%s","time":1e300}}}' % TXID.encode()),
        ("latest", b'[{"tx":{"txid":"%s"},"time":-1}]' % TXID.encode()),
        ("mempool", b'["short"]'),
        ("confirmation", b'{"confirmed":true,"block_hash":"../../x","block_height":1}'),
        ("confirmation", b'{"confirmed":true,"block_hash":"%s","block_height":1%s}' % (HASH.encode(), b"0" * 30)),
    ],
)
async def test_a_response_about_another_object_is_a_failure(call: str, answer: bytes) -> None:
    path, ask = CALLS[call]
    async with asking() as (backend, _, front):
        front.spoil(path, 200, answer)
        with pytest.raises(RestError) as failure:
            await ask(backend)
        assert failure.value.reason is RestFailure.GARBAGE


@pytest.mark.parametrize("call", ["mempool", "tip", "hash", "block", "summary"])
async def test_a_route_that_is_missing_is_a_failure_and_not_an_empty_answer(call: str) -> None:
    path, ask = CALLS[call]
    async with asking() as (backend, _, front):
        front.spoil(path, 404)
        with pytest.raises(RestError) as failure:
            await ask(backend)
        assert failure.value.reason is RestFailure.NOT_FOUND
        assert path in str(failure.value)


async def test_an_impossibly_small_transaction_has_no_fee_rate() -> None:
    """It would be infinite in memory, and null in the log and for clients."""
    async with asking() as (backend, _, front):
        front.spoil("block/.*/txs/1", 200, b'[{"txid":"%s","vin":[],"vout":[{"value":5}]}]' % TXID.encode())
        (found,) = await backend.page(HASH, [Summary(TXID, 5, 1_000, 5e-324, 1)])
        assert found is not None
        assert (found.fee_sat, found.fee_rate) == (1_000, None)


UNKNOWN = Summary(TXID, 5, None, 0.0, 1)
COINBASE = b'{"txid":"%s","value":1,"fee":0,"vsize":1}' % (b"00" * 32)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # What backends send since 3.0: a fee multiplied from BTC, and -1 with a rate below 0 above 12 inputs.
        (b'"value":5,"fee":13229.999999999998,"vsize":140.25,"rate":94.3', Summary(TXID, 5, 13230, 140.25, 1)),
        (b'"value":5,"fee":-1,"vsize":1018.5,"rate":-0.00098', Summary(TXID, 5, None, 1018.5, 1)),
        (b'"value":5.000000000001,"fee":1,"vsize":1', Summary(TXID, 5, 1, 1.0, 1)),
        # What none has sent yet.
        (b'"value":5,"fee":1%s' % (b"0" * 400), UNKNOWN),
        (b'"value":5,"fee":null,"vsize":1e300,"flags":"?","time":-1', UNKNOWN),
        (b'"value":5,"vsize":"7"', UNKNOWN),
        (b'"value":null,"fee":1,"vsize":1', Summary(TXID, None, 1, 1.0, 1)),
        (b'"fee":1,"vsize":1,"time":1.5,"flags":262145', Summary(TXID, None, 1, 1.0, 1, 1.5, is_replacement=True)),
        (b'"value":5,"time":0,"flags":1', Summary(TXID, 5, None, 0.0, 1, None, is_replacement=False)),
    ],
)
async def test_a_malformed_field_of_a_summary_loses_only_that_field(fields: bytes, expected: Summary) -> None:
    async with asking() as (backend, _, front):
        other = b'{"txid":"%s","value":7,"fee":1,"vsize":1}' % (b"ee" * 32)
        entry = b'{"txid":"%s",%s}' % (TXID.encode(), fields)
        front.spoil("block/.*/summary", 200, b"[%s,%s,7,%s]" % (COINBASE, entry, other))
        found = await backend.summary(HASH)
        assert found[0] == expected
        assert found[1] == Summary(None, None, None, 0.0, 2)
        assert found[2] == Summary("ee" * 32, 7, 1, 1.0, 3)


async def test_a_transaction_of_more_than_twelve_inputs_first_seen_in_its_block_is_read() -> None:
    async with asking() as (backend, _, front):
        raw = b'{"txid":"%s","vin":[],"vout":[{"value":5}],"fee":-1,"effectiveFeePerVsize":-0.0011}' % TXID.encode()
        front.spoil("block/.*/txs/1", 200, b"[%s]" % raw)
        (found,) = await backend.page(HASH, [Summary(TXID, 5, None, 0.0, 1)])
        assert found is not None
        assert (found.value_sat, found.fee_sat, found.fee_rate) == (5, None, None)


async def test_the_fee_of_a_mined_transaction_follows_from_its_inputs_once_they_are_known() -> None:
    async with asking() as (backend, _, front):
        spent = [b'{"txid":"%s","vout":%d,"sequence":0,"prevout":%s}' % (b"cc" * 32, n, b"%s") for n in range(2)]
        known = b",".join(each % b'{"value":5,"scriptpubkey":"51"}' for each in spent)
        unknown = b",".join(each % b"null" for each in spent)
        raw = b'{"txid":"%s","vin":[%s],"vout":[{"value":7}],"fee":-1,"vsize":2}'
        front.spoil("block/.*/txs/1", 200, b"[%s]" % (raw % (TXID.encode(), unknown)))
        front.spoil(f"tx/{TXID}", 200, raw % (TXID.encode(), known))
        (listed,) = await backend.page(HASH, [Summary(TXID, 7, None, 0.0, 1)])
        assert listed is not None
        found = await backend.completed(listed)
        assert (found.fee_sat, found.fee_rate) == (3, 1.5)


async def test_an_entry_without_a_txid_is_found_by_its_place() -> None:
    async with asking() as (backend, _, front):
        page = b",".join(b'{"txid":"%s","vin":[],"vout":[{"value":%d}]}' % (b"%02d" % n * 32, n) for n in (1, 2))
        front.spoil("block/.*/txs/4", 200, b"[%s]" % page)
        entries = [Summary("01" * 32, 1, 0, 1.0, 4), Summary(None, None, None, 0.0, 5)]
        assert [found and found.txid for found in await backend.page(HASH, entries)] == ["01" * 32, "02" * 32]
        front.restore()
        front.spoil("block/.*/txs/4", 200, b'[%s,{"txid":7}]' % page.partition(b",{")[0])
        assert [found and found.txid for found in await backend.page(HASH, entries)] == ["01" * 32, None]


@pytest.mark.parametrize(
    ("mode", "pages"), [("none", [[1, 10], [11, 20], [21, 30]]), ("esplora", [[1, 10, 11, 20, 21], [30]])]
)
async def test_entries_are_requested_in_the_fewest_pages(mode: str, pages: list[list[int]]) -> None:
    upstream = UpstreamSettings()
    entries = [Summary(f"{index:064x}", 1, 0, 1.0, index) for index in (30, 1, 10, 11, 20, 21)]
    async with Rest.open(upstream, RestMeter(Registry())) as rest:
        rest.routes.mode = mode
        found = Backend(rest, 1.0).pages_of(entries)
    assert [[entry.index for entry in page] for page in found] == pages


async def test_an_unreadable_tree_loses_only_itself() -> None:
    async with asking() as (backend, _, front):
        front.spoil("replacements", 200, b'[{"tx":{"txid":"%s"}},{"tx":7},null]' % TXID.encode())
        assert [[each.txid for each in family] for family in await backend.latest_families()] == [[TXID]]


async def test_a_block_without_a_coinbase_is_an_invalid_response() -> None:
    async with asking() as (backend, _, front):
        front.spoil("block/.*/summary", 200, b"[]")
        with pytest.raises(RestError) as failure:
            await backend.summary(HASH)
        assert failure.value.reason is RestFailure.INCOMPLETE


async def test_a_whale_of_a_block_that_no_request_returns_is_a_failure() -> None:
    async with asking() as (backend, _, front):
        front.spoil("block/.*/txs/1", 404)
        front.spoil(f"tx/{TXID}", 404)
        with pytest.raises(RestError) as failure:
            await backend.mined(HASH, ENTRY)
        assert failure.value.reason is RestFailure.INCOMPLETE


async def test_an_invalid_txid_stays_within_its_path_segment() -> None:
    async with asking() as (backend, _, front):
        with pytest.raises(RestError, match="Invalid transaction ID"):
            await backend.transaction("../" * 21 + "?")
        (path,) = front.requested
        assert path.startswith("tx/")
        assert path.count("/") == 1


async def test_requests_are_no_faster_than_allowed() -> None:
    async with asking(per_second=50.0) as (backend, _, _):
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(10):
                tasks.create_task(backend.tip_height())
        assert time.monotonic() - began >= 9 / 50.0


async def test_only_electrs_reports_which_transaction_spends_an_output() -> None:
    async with world(mode=Mode.ESPLORA) as (sim, _):
        spender = sim.world.pay(150 * BTC)
        await sim.poll()
        spent, unspent = spender.inputs[0], f"{spender.txid}:0"
        async with Rest.open(UpstreamSettings(url=sim.url), RestMeter(Registry())) as rest:
            backend = Backend(rest, 10_000.0)
            outpoint = f"{spent.txid}:{spent.vout}"
            assert await backend.spender(outpoint) is None  # not requested: the mode is not known
            rest.routes.mode, rest.routes.esplora = "esplora", f"{sim.electrs_url.rstrip('/')}/"
            assert await backend.spender(outpoint) == spender.txid
            assert await backend.spender(unspent) is None
            assert await backend.spender(f"{TXID}:4294967295") is None
            assert backend.answered == 3
