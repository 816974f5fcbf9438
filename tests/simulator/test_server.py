"""The simulator over real sockets: the conversation, the REST answers, and each fault."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from whaled.errors import ListenError
from whaled.simulator import faults
from whaled.simulator.faults import PAYLOADS, Garbage, RestMode
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.truth import Fate

WHALE = 10_000_000_000
QUIET = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0, start=1_800_000_000.0)
# Around the whole of a conversation: who runs into it hangs.
LONG_S = 30.0


@asynccontextmanager
async def listening(sim: Simulator, *, path: str = "/api/v1/ws", track: bool = True) -> AsyncIterator[ClientConnection]:
    url = f"ws://127.0.0.1:{sim.port}{path}"
    async with asyncio.timeout(LONG_S):
        async with connect(url, proxy=None, max_size=2**28, ping_interval=None) as client:
            if track:
                await client.send('{"track-mempool":true}')
                await ask(client, {"action": "ping"})
            yield client


async def read(client: ClientConnection) -> dict[str, Any]:
    answer = json.loads(await client.recv())
    assert isinstance(answer, dict)
    return answer


async def ask(client: ClientConnection, said: object) -> dict[str, Any]:
    await client.send(json.dumps(said))
    return await read(client)


async def delta(client: ClientConnection) -> dict[str, Any]:
    while True:
        frame = await read(client)
        if "mempool-transactions" in frame:
            part = frame["mempool-transactions"]
            assert set(part) == {"sequence", "added", "removed", "mined", "replaced"}
            return dict(part)


@asynccontextmanager
async def rest() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LONG_S)) as session:
        yield session


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with session.get(url) as response:
        body = await response.text()
        return response.status, json.loads(body) if body and response.content_type == "application/json" else body


async def closed(client: ClientConnection) -> int:
    """Code the connection ends with: 1005 without a code, 1006 without a close frame."""
    with suppress(ConnectionClosed):
        while True:
            await client.recv()
    await client.wait_closed()
    assert client.close_code is not None
    return client.close_code


# --- the conversation ---


@pytest.mark.parametrize("path", ["/", "/ws", "/api/v1/ws", "/nonsense?x=1", "/api/v1/mempool"])
async def test_the_stream_is_on_any_path_and_uncompressed(path: str) -> None:
    async with Simulator(QUIET) as sim, listening(sim, path=path, track=False) as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        assert await ask(client, {"action": "ping"}) == {"pong": True}


async def test_init_returns_everything_and_want_only_new_parts() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        init = await ask(client, {"action": "init"})
        assert [block["height"] for block in init["blocks"]] == list(range(899_993, 900_001))
        assert init["loadingIndicators"] == {}
        assert "da" in init
        assert init["conversions"]["USD"] == 65_000
        assert set(await ask(client, {"action": "want", "data": ["stats"]})) == {
            "mempoolInfo",
            "vBytesPerSecond",
            "fees",
            "da",
        }
        assert set(await ask(client, {"action": "want", "data": ["stats", "blocks"]})) == {"blocks"}


async def test_want_replaces_the_previous_subscription() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        await ask(client, {"action": "want", "data": ["blocks"]})
        await ask(client, {"action": "want", "data": ["mempool-blocks"]})
        sim.world.pay(WHALE)
        sim.world.mine()
        await sim.poll()
        assert set(await read(client)) == {"mempool-blocks", "mempool-transactions"}


async def test_one_message_carries_all_that_is_due() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        await ask(client, {"action": "want", "data": ["blocks", "stats", "mempool-blocks"]})
        sim.world.pay(WHALE)
        await sim.poll()
        frame = await read(client)
        assert frame["mempoolInfo"]["size"] == 1
        assert frame["transactions"][0]["value"] == WHALE
        assert frame["mempool-blocks"][0]["nTx"] == 1
        assert frame["mempool-transactions"]["added"][0]["vin"][0]["prevout"] is None
        block = sim.world.mine()
        await sim.poll()
        frame = await read(client)
        assert frame["block"]["id"] == block.hash
        assert frame["mempool-transactions"]["mined"] == block.txids
        assert "transactions" not in frame


async def test_every_subscriber_gets_every_sequence() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as one, listening(sim) as two:
        for step in range(1, 6):
            sim.world.pay(WHALE)
            await sim.poll()
            assert (await delta(one))["sequence"] == (await delta(two))["sequence"] == step


async def test_tracked_txids_are_the_same_delta_in_short() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        await client.send('{"track-mempool-txids":true}')
        await ask(client, {"action": "ping"})
        first = sim.world.pay(WHALE)
        await sim.poll()
        assert (await read(client))["mempool-txids"]["added"] == [first.txid]
        second = sim.world.replace(first.txid)
        await sim.poll()
        assert (await read(client))["mempool-txids"]["replaced"] == [{"replaced": first.txid, "by": second.txid}]


async def test_a_projected_block_comes_at_once_with_the_stream_s_sequence() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        tx = sim.world.pay(WHALE)
        await sim.poll()
        sequence = (await delta(client))["sequence"]
        block = (await ask(client, {"track-mempool-block": 0}))["projected-block-transactions"]
        assert (block["index"], block["sequence"]) == (0, sequence)
        assert [each[:4] for each in block["blockTransactions"]] == [[tx.txid, tx.fee, tx.vsize, WHALE]]
        assert (await ask(client, {"track-mempool-block": 5}))["projected-block-transactions"][
            "blockTransactions"
        ] == []
        await client.send('{"track-mempool-block":-1}')
        sim.world.pay(WHALE)
        await ask(client, {"action": "ping"})
        await sim.poll()
        assert set(await read(client)) == {"mempool-transactions"}


async def test_changes_of_a_projected_block_follow() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        first = sim.world.pay(WHALE, rate=2.0)
        await sim.poll()
        await ask(client, {"track-mempool-block": 0})
        child = sim.world.spend(first.txid, rate=50.0)
        await sim.poll()
        change = (await read(client))["projected-block-transactions"]["delta"]
        assert [each[0] for each in change["added"]] == [child.txid]
        assert [each[0] for each in change["changed"]] == [first.txid]
        second = sim.world.replace(first.txid, rate=100.0)
        await sim.poll()
        change = (await read(client))["projected-block-transactions"]["delta"]
        assert ([each[0] for each in change["added"]], sorted(change["removed"])) == (
            [second.txid],
            sorted([first.txid, child.txid]),
        )


@pytest.mark.parametrize(
    "said", ["[]", "7", '"x"', '{"action":"dance"}', '{"track-mempool":"yes"}', '{"action":"want"}']
)
async def test_unknown_messages_are_ignored(said: str) -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        await client.send(said)
        assert await ask(client, {"action": "ping"}) == {"pong": True}
        sim.world.pay(WHALE)
        await sim.poll()
        assert await ask(client, {"action": "ping"}) == {"pong": True}


@pytest.mark.parametrize("said", ["{", "null", ""])
async def test_invalid_json_ends_the_connection_without_a_code(said: str) -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        await client.send(said)
        assert await closed(client) == 1005


async def test_fifty_thousand_bytes_pass_and_one_more_does_not() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        frame = '{"action":"ping"}'
        await client.send(frame + " " * (50_000 - len(frame)))
        assert await read(client) == {"pong": True}
        await client.send(frame + " " * (50_001 - len(frame)))
        assert await closed(client) == 1009


async def test_the_hundred_and_first_message_within_ten_seconds_ends_the_connection() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        for _ in range(100):
            assert await ask(client, {"action": "ping"}) == {"pong": True}
        await client.send('{"action":"ping"}')
        assert await closed(client) == 1005


async def test_binary_frames_count_as_text_and_pings_are_answered() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        await client.send(b'{"action":"ping"}')
        assert await read(client) == {"pong": True}
        await (await client.ping())


async def test_more_than_ten_megabytes_unread_cut_the_client_off_without_a_close_frame() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        client.transport.pause_reading()
        for _ in range(10_000_000 // len(PAYLOADS[Garbage.DEEP]) + 2):
            sim.send_garbage(Garbage.DEEP)
        client.transport.resume_reading()
        assert await closed(client) == 1006


# --- REST ---


async def test_rest_answers_agree_with_the_truth() -> None:
    settings = replace(QUIET, rate=5, block_interval=20, whale_share=0.3, events=3)
    async with Simulator(settings) as sim, rest() as session:
        for _ in range(60):
            await sim.poll()
        for record in sim.truth.whales()[-60:]:
            status, answer = await get(session, f"{sim.rest_url}/tx/{record.txid}/status")
            match record.fate:
                case Fate.CONFIRMED:
                    assert (answer["block_height"], answer["block_hash"]) == (record.height, record.block_hash)
                case Fate.PENDING:
                    assert (status, answer) == (200, {"confirmed": False})
                case _:
                    assert status == 404
            status, answer = await get(session, f"{sim.rest_url}/tx/{record.txid}")
            if status == 200:
                assert sum(each["prevout"]["value"] for each in answer["vin"]) == record.in_sat
                assert sum(each["value"] for each in answer["vout"]) == record.out_sat
                assert answer["fee"] == record.fee_sat
        _, txids = await get(session, f"{sim.rest_url}/mempool/txids")
        assert {record.txid for record in sim.truth.records() if record.fate is Fate.PENDING} == set(txids)


async def test_a_block_s_summary_has_every_transaction_with_its_value() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        tx = sim.world.pay(WHALE)
        block = sim.world.mine()
        await sim.poll()
        _, summary = await get(session, f"{sim.rest_url}/block/{block.hash}/summary")
        assert [each["txid"] for each in summary] == block.txids
        assert summary[1]["value"] == WHALE
        assert (await get(session, f"{sim.rest_url}/block/{block.hash}/txids"))[1] == block.txids
        assert (await get(session, f"{sim.rest_url}/block/{block.hash}"))[1]["height"] == block.height
        _, page = await get(session, f"{sim.rest_url}/block/{block.hash}/txs/1")
        assert [each["txid"] for each in page] == [tx.txid]
        assert (await get(session, f"{sim.rest_url}/block/{block.hash}/txs/2"))[1] == []
        assert (await get(session, f"{sim.rest_url}/blocks/tip/height")) == (200, str(block.height))
        assert (await get(session, f"{sim.rest_url}/blocks/tip/hash")) == (200, block.hash)
        assert (await get(session, f"{sim.rest_url}/block-height/{block.height}")) == (200, block.hash)
        assert (await get(session, f"{sim.rest_url}/block-height/{block.height + 1}"))[0] == 500
        _, blocks = await get(session, f"{sim.rest_url}/blocks/{block.height - 1}")
        assert [each["height"] for each in blocks] == [*range(block.height - 1, block.height - 9, -1)][: len(blocks)]


async def test_prevouts_are_known_until_the_spender_is_mined() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        tx = sim.world.pay(WHALE)
        child = sim.world.spend(tx.txid)
        await sim.poll()
        wanted = [{"txid": coin.txid, "vout": coin.vout} for each in (tx, child) for coin in each.inputs]

        async def prevouts(body: object) -> tuple[int, Any]:
            async with session.post(f"{sim.rest_url}/prevouts", json=body) as response:
                return response.status, await response.json()

        _, found = await prevouts(wanted)
        assert [each["prevout"]["value"] for each in found] == [tx.in_sat, child.in_sat]
        assert [each["unconfirmed"] for each in found] == [False, True]
        assert found[0]["prevout"]["scriptpubkey"] == tx.inputs[0].script.hex
        sim.world.mine()
        await sim.poll()
        assert await prevouts(wanted) == (200, [None, None])
        assert (await prevouts(wanted[:1] * 100))[0] == 200
        assert (await prevouts(wanted[:1] * 101))[0] == 400
        assert (await prevouts({"txid": 1}))[0] == 400


async def test_replaced_transactions_are_gone_but_remembered() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        first = sim.world.pay(WHALE)
        await sim.poll()
        second = sim.world.replace(first.txid)
        await sim.poll()
        assert (await get(session, f"{sim.rest_url}/tx/{first.txid}"))[0] == 404
        assert (await get(session, f"{sim.rest_url}/tx/{first.txid}/cached"))[1]["txid"] == first.txid
        assert (await get(session, f"{sim.rest_url}/tx/{second.txid}/cached"))[1]["txid"] == second.txid
        assert (await get(session, f"{sim.rest_url}/tx/{'0' * 64}/cached"))[0] == 204
        _, history = await get(session, f"{sim.rest_url}/tx/{first.txid}/rbf")
        assert (history["replacements"]["tx"]["txid"], history["replaces"]) == (second.txid, None)
        _, history = await get(session, f"{sim.rest_url}/tx/{second.txid}/rbf")
        assert history["replaces"] == [first.txid]
        _, trees = await get(session, f"{sim.rest_url}/replacements")
        assert [tree["tx"]["txid"] for tree in trees] == [second.txid]
        unknown = {"replacements": None, "replaces": None}
        assert (await get(session, f"{sim.rest_url}/tx/{'00' * 32}/rbf"))[1] == unknown


async def test_a_transaction_only_in_an_abandoned_branch_is_unconfirmed_but_not_in_the_mempool() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        tx = sim.world.pay(WHALE)
        dead = sim.world.mine()
        await sim.poll()
        sim.world.reorg(1, double_spend=[tx.txid])
        await sim.poll()
        assert await get(session, f"{sim.rest_url}/tx/{tx.txid}/status") == (200, {"confirmed": False})
        assert (await get(session, f"{sim.rest_url}/mempool/txids"))[1] == []
        _, blocks = await get(session, f"{sim.rest_url}/blocks")
        assert dead.hash in [block["id"] for block in blocks]
        assert (await get(session, f"{sim.rest_url}/block/{dead.hash}"))[1]["stale"] is False
        _, tips = await get(session, f"{sim.rest_url}/chain-tips")
        assert [(tip["hash"], tip["status"]) for tip in tips] == [
            (sim.world.chain.tip.hash, "active"),
            (dead.hash, "valid-fork"),
        ]


async def test_the_other_rest_responses_match_the_stream() -> None:
    async with Simulator(QUIET) as sim, rest() as session, listening(sim, track=False) as client:
        tx = sim.world.pay(WHALE)
        await sim.poll()
        init = await ask(client, {"action": "init"})
        for path, part in {
            "prices": "conversions",
            "backend-info": "backendInfo",
            "difficulty-adjustment": "da",
            "fees/precise": "fees",
            "fees/mempool-blocks": "mempool-blocks",
        }.items():
            assert await get(session, f"{sim.rest_url}/{path}") == (200, init[part])
        assert (await get(session, f"{sim.rest_url}/init-data"))[1] == init
        assert (await get(session, f"{sim.rest_url}/fees/recommended"))[1]["fastestFee"] == 1
        assert init["fees"]["fastestFee"] == 1.5
        assert (await get(session, f"{sim.rest_url}/mempool"))[1]["count"] == 1
        assert (await get(session, f"{sim.rest_url}/mempool/recent"))[1][0]["value"] == WHALE
        times = f"{sim.rest_url}/transaction-times?txId[]={tx.txid}&txId[]={'00' * 32}"
        assert (await get(session, times))[1] == [1_800_000_002, 0]
        assert (await get(session, f"{sim.rest_url}/address/x"))[0] == 405
        assert (await get(session, f"{sim.rest_url}/nonsense"))[0] == 404


# --- faults ---


async def test_a_dropped_link_ends_without_a_close_frame_and_the_sequence_goes_on() -> None:
    async with Simulator(QUIET) as sim:
        async with listening(sim) as client:
            sim.drop_link()
            assert await closed(client) == 1006
        sim.world.pay(WHALE)
        await sim.poll()
        async with listening(sim) as client:
            sim.world.pay(WHALE)
            await sim.poll()
            assert (await delta(client))["sequence"] == 2


async def test_a_stalled_backend_sends_nothing_until_it_resumes() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        sim.stall()
        tx = sim.world.pay(WHALE)
        await sim.poll()
        pong = asyncio.ensure_future(await client.ping())
        await client.send('{"action":"ping"}')
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.recv()
        assert not pong.done()
        sim.resume()
        assert await read(client) == {"pong": True}
        await pong
        await sim.poll()
        assert (await delta(client))["added"][0]["txid"] == tx.txid


@pytest.mark.parametrize("turns", range(5))
async def test_a_restart_ends_connections_that_were_accepted_a_moment_before(turns: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        async with Simulator(QUIET) as sim, asyncio.timeout(LONG_S):
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", sim.port))
            for _ in range(turns):
                await asyncio.sleep(0)
            await sim.restart()
            with suppress(ConnectionResetError):
                assert await loop.sock_recv(client, 1) == b""


async def test_a_restart_sends_an_early_subscriber_everything_again_at_sequence_zero() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        async with listening(sim) as client:
            tx = sim.world.pay(WHALE)
            await sim.poll()
            await sim.restart(cache=False, resend=True)
            await delta(client)
            assert await closed(client) == 1006
        async with listening(sim) as client:
            assert (await get(session, f"{sim.rest_url}/fees/precise"))[0] == 503
            init = await ask(client, {"action": "init"})
            assert (init["blocks"], init["loadingIndicators"]) == ([], {"mempool": 0})
            assert "da" not in init
            assert init["conversions"]["USD"] == -1
            await sim.poll()
            told = [await delta(client) for _ in range(9)]
            assert {each["sequence"] for each in told} == {0}
            assert [len(each["mined"]) for each in told] == [1] * 8 + [0]
            assert [each["txid"] for each in told[-1]["added"]] == [tx.txid]
            assert await read(client) == {"loadingIndicators": {}}
            assert (await get(session, f"{sim.rest_url}/fees/precise"))[0] == 200


@pytest.mark.parametrize("cache", [True, False])
async def test_a_restart_without_resend_omits_what_was_missed(cache: bool) -> None:
    async with Simulator(QUIET) as sim:
        sim.world.pay(WHALE)
        await sim.poll()
        sim.world.pay(WHALE)
        await sim.restart(cache=cache, resend=False)
        async with listening(sim) as client:
            await sim.poll()
            later = sim.world.pay(WHALE)
            await sim.poll()
            told = await delta(client)
            assert ([each["txid"] for each in told["added"]], told["sequence"]) == ([later.txid], 1)


@pytest.mark.parametrize("kind", list(Garbage))
async def test_garbage_is_sent_unchanged(kind: Garbage) -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        sim.send_garbage(kind)
        assert await client.recv(decode=False) == PAYLOADS[kind]


@pytest.mark.slow
async def test_a_burst_comes_in_one_message() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        sim.burst(2_000)
        await sim.poll()
        text = await client.recv()
        assert len(text) > 2**21
        assert len(json.loads(text)["mempool-transactions"]["added"]) == 2_000


async def test_a_reorganisation_shows_as_an_unknown_previous_block() -> None:
    async with Simulator(QUIET) as sim, listening(sim, track=False) as client:
        await ask(client, {"action": "want", "data": ["blocks"]})
        old = sim.world.chain.tip.hash
        sim.reorg(1)
        await sim.poll()
        block = (await read(client))["block"]
        assert block["previousblockhash"] != old
        sim.reorg(2, database=True)
        await sim.poll()
        corrected = await read(client)
        assert set(corrected) == {"blocks", "da"}
        assert corrected["blocks"][-1]["id"] == (await read(client))["block"]["previousblockhash"]


async def test_a_lost_node_shows_in_the_loading_indicators_only() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        tx = sim.world.pay(WHALE)
        await sim.poll()
        await delta(client)
        sim.lose_bitcoind(forget=True)
        for _ in range(6):
            await sim.poll()
        assert await read(client) == await read(client) == {"loadingIndicators": {"mempool": 99}}
        sim.find_bitcoind()
        await sim.poll()
        told = await delta(client)
        assert (told["removed"], told["sequence"]) == ([tx.txid], 1)
        assert await read(client) == {"loadingIndicators": {}}


async def test_rest_fails_the_requested_number_of_times_and_then_works() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        url = f"{sim.rest_url}/blocks/tip/height"
        sim.fail_rest(status=503, times=2)
        assert [(await get(session, url))[0] for _ in range(3)] == [503, 503, 200]
        sim.fail_rest(RestMode.SLOW, seconds=0.01)
        assert (await get(session, url))[0] == 200
        sim.fail_rest(RestMode.TIMEOUT)
        with pytest.raises(TimeoutError):
            async with session.get(url, timeout=aiohttp.ClientTimeout(total=0.05)):
                pass
        assert (await get(session, url))[0] == 200


async def test_a_late_block_adds_a_confirmed_transaction_without_fee() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        tx = sim.world.pay(WHALE)
        sim.late_block()
        await sim.poll()
        (added,) = (await delta(client))["added"]
        assert (added["txid"], added["fee"], added["status"]["confirmed"]) == (tx.txid, 0, True)
        assert "firstSeen" not in added
        await sim.poll()
        assert tx.txid in (await delta(client))["mined"]


# --- control over HTTP ---


async def test_a_whale_of_an_exact_amount_can_be_sent_over_http() -> None:
    async with Simulator(QUIET) as sim, rest() as session, listening(sim) as client:
        async with session.post(f"{sim.control_url}/send", json={"btc": 123.45678901}) as response:
            record = await response.json()
        await sim.poll()
        (added,) = (await delta(client))["added"]
        assert (added["txid"], record["out_sat"]) == (record["txid"], 12_345_678_901)
        assert sum(vout["value"] for vout in added["vout"]) == 12_345_678_901
        async with session.get(f"{sim.control_url}/truth", params={"whales": 1}) as response:
            lines = [json.loads(line) for line in (await response.text()).splitlines()]
        assert [line["txid"] for line in lines] == [record["txid"]]
        async with session.get(sim.control_url) as response:
            assert (await response.json())["mempool"] == 1


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("send", {"btc": -1}, "$.btc"),
        ("send", {"btc": 1, "colour": "red"}, "colour"),
        ("fault", {"fault": "earthquake"}, "earthquake"),
        ("fault", {"fault": "burst", "n": 0}, "$.n"),
        ("fault", {"fault": "reorg", "depth": 900}, "use 1 to"),
    ],
)
async def test_an_impossible_action_over_http_is_refused_with_the_reason(path: str, body: object, says: str) -> None:
    async with (
        Simulator(QUIET) as sim,
        rest() as session,
        session.post(f"{sim.control_url}/{path}", json=body) as answer,
    ):
        assert answer.status == 400
        assert says in (await answer.json())["error"]


@pytest.mark.parametrize("fault", [*faults.ROUTINE, faults.FailRest(mode=RestMode.TIMEOUT)], ids=repr)
async def test_every_routine_fault_can_be_requested_over_http(fault: faults.AnyFault) -> None:
    short = {key: 0.01 for key in ("seconds", "down") if hasattr(fault, key)}
    async with Simulator(QUIET) as sim, rest() as session:
        async with listening(sim):
            body = json.loads(faults.encode(replace(fault, **short)))
            async with session.post(f"{sim.control_url}/fault", json=body) as response:
                assert await response.json() == {"done": body}
        async with session.get(sim.control_url) as response:
            assert response.status == 200


# --- by itself ---


async def test_by_itself_it_polls_the_clock_and_serves_an_early_subscriber() -> None:
    settings = SimulatorSettings(port=0, rate=50, poll_interval=0.02, block_interval=0.2, early_subscriber=True)
    async with Simulator(settings) as sim, listening(sim, track=False) as client:
        await client.send('{"action":"want","data":["blocks"]}')
        await client.send('{"track-mempool":true}')
        first = await delta(client)
        assert (first["sequence"], len(first["mined"])) == (0, 1)
        sequence = 0
        while sequence < 10:
            sequence = (await delta(client))["sequence"]


@pytest.mark.slow
async def test_faults_come_by_themselves_if_wanted() -> None:
    settings = SimulatorSettings(port=0, rate=20, poll_interval=0.05, fault_every=1)
    async with Simulator(settings) as sim, listening(sim) as client:
        # The default seed chooses a restart first.
        assert await closed(client) in (1005, 1006)


async def test_exceptions_of_the_body_are_raised_unchanged() -> None:
    with pytest.raises(KeyError):
        async with Simulator(replace(QUIET, manual=False)):
            raise KeyError("mine")


async def test_a_port_that_is_taken_is_named() -> None:
    async with Simulator(QUIET) as sim:
        with pytest.raises(ListenError, match=f"port {sim.port}.*choose another --port"):
            async with Simulator(replace(QUIET, port=sim.port)):
                pass


@pytest.mark.slow
@pytest.mark.long
async def test_twenty_times_mainnet_leaves_most_of_a_core_free() -> None:
    settings = SimulatorSettings(port=0, rate=140, poll_interval=0.5, block_interval=5)
    async with Simulator(settings) as sim, listening(sim) as client:
        begun, seconds, used = time.monotonic(), 3.0, time.process_time()
        while time.monotonic() < begun + seconds:
            await delta(client)
        # The client's own decoding counts here too.
        assert (time.process_time() - used) / seconds < 0.3


@pytest.mark.slow
async def test_two_thousand_transactions_are_made_and_encoded_within_a_second() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client:
        begun = time.process_time()
        sim.burst(2_000)
        await sim.poll()
        assert time.process_time() - begun < 1
        assert len((await delta(client))["added"]) == 2_000


async def test_a_backend_behind_its_node_names_the_right_block_at_too_low_a_height() -> None:
    async with Simulator(QUIET) as sim, rest() as session:
        tx = sim.world.pay(WHALE)
        await sim.poll()
        block = sim.world.mine()
        url = f"{sim.rest_url}/tx/{tx.txid}/status"
        status = (await get(session, url))[1]
        assert (status["block_hash"], status["block_height"]) == (block.hash, block.height - 1)
        await sim.poll()
        assert (await get(session, url))[1]["block_height"] == block.height


async def test_a_page_of_a_block_reports_its_progress_to_every_client() -> None:
    async with Simulator(QUIET) as sim, listening(sim) as client, rest() as session:
        sim.world.pay(WHALE)
        block = sim.world.mine()
        await sim.poll()
        await delta(client)
        key = f"blocktxs-{block.hash}"
        await get(session, f"{sim.rest_url}/block/{block.hash}/txs/0")
        assert [(await read(client))["loadingIndicators"] for _ in range(3)] == [{key: 0}, {key: 50}, {}]
        await get(session, f"{sim.rest_url}/block/{block.hash}/txs/99")
        assert (await read(client))["loadingIndicators"] == {key: 0}
