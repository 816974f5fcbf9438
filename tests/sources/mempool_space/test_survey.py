"""What a backend is and what it answers, looked at before any of its events is taken."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from whaled.config.sections import UpstreamSettings
from whaled.metrics import Metrics
from whaled.model import Block, UpstreamState
from whaled.registry import Registry
from whaled.retry_after import retry_after_s
from whaled.source import Connected, Lost, MempoolChange, Shortfall, StreamMessage
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.feed import Feed
from whaled.sources.mempool_space.http import RestError, RestFailure, RestMeter
from whaled.sources.mempool_space.identity import LIQUID, NETWORKS, PUBLIC_SIGNET_BLOCK_1, SIGNET, Network, is_too_old
from whaled.sources.mempool_space.link_errors import RETRY_AFTER_LIMIT_S, LinkLostError, LossReason, diagnose
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.rest import Rest
from whaled.sources.mempool_space.routes import ELECTRS_PORTS, Routes, candidates
from whaled.sources.mempool_space.shapes import BackendInfo
from whaled.sources.mempool_space.survey import NETWORK_KEY, Capability, Survey

REGTEST, MAINNET = (next(key for key, name in NETWORKS.items() if name == wanted) for wanted in ("regtest", "mainnet"))
TIP, PARENT = "aa" * 32, "bb" * 32
BLOCKS = (Block(height=200, hash=TIP, previous_hash=PARENT, timestamp=1),)
HTML = "<!DOCTYPE html><pre>Cannot GET</pre>"


class Notes:
    """The state of an event log."""

    def __init__(self, **held: str) -> None:
        self.held = held

    async def state(self, key: str) -> str | None:
        return self.held.get(key)

    async def set_state(self, key: str, value: str) -> None:
        self.held[key] = value


class Server:
    """A backend's REST side, and under `/api/` its electrs; answers are texts by path."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/v1/ws"

    def is_none_mode(self, genesis: str = REGTEST) -> "Server":
        self.answers |= {
            "/api/v1/block-height/0": genesis,
            "/api/v1/block-height/200": TIP,
            "/api/v1/mempool": '{"count":3}',
            "/api/v1/prevouts": "[]",
        }
        return self

    def is_esplora_mode(self, base: str = "/api/") -> "Server":
        self.answers |= {
            "/api/v1/blocks/0": f'[{{"id":"{REGTEST}","height":0}}]',
            "/api/v1/prevouts": "[]",
            f"{base}block-height/0": REGTEST,
            f"{base}block-height/200": TIP,
            f"{base}mempool": '{"count":3}',
        }
        return self

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = self.answers.get(request.path)
        return web.Response(status=404, text=HTML) if answer is None else web.Response(text=answer)


@asynccontextmanager
async def serving(
    stream: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None,
) -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    if stream is not None:
        app.router.add_get("/api/v1/ws", stream)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def surveying(
    url: str, notes: Notes | None = None, *, is_backfilling: bool = True, **more: Any
) -> AsyncIterator[tuple[Survey, Metrics]]:
    upstream = UpstreamSettings(url=url, rest_timeout=5.0, reconnect_max=7.0, **more)
    metrics = Metrics()
    async with Rest.open(upstream, metrics.rest) as rest:
        yield Survey(upstream, rest, notes or Notes(), metrics.survey, is_backfilling=is_backfilling), metrics


def info(version: str = "3.2.1", mode: str = "none") -> BackendInfo:
    return BackendInfo("host", version, mode)


def missing(metrics: Metrics) -> set[str]:
    rendered = metrics.render().decode()
    return {each for each in Capability if f'whaled_upstream_capability{{capability="{each}"}} 0.0' in rendered}


# --- version ---


@pytest.mark.parametrize(
    ("version", "is_old"),
    [
        ("2.5.0", True), ("2.5.0-dev", True), ("v2.4.1", True), ("1.0", True), ("2.99", True),
        ("3.0.0", False), ("3.2.1", False), ("3.4-dev", False), ("v3.0.0-beta", False), ("10.0.0", False),
        ("", False), ("?", False), ("nightly", False), ("2", False), ("99999999.1", False), ("\u0662.\u0665", False),
        ("-1.0", False), ("x" * 100_000, False),
    ],
)  # fmt: skip
def test_only_a_version_that_is_readable_and_below_the_minimum_is_too_old(version: str, is_old: bool) -> None:
    assert is_too_old(version) is is_old


async def test_an_old_backend_is_degraded_and_logged_with_the_minimum_version() -> None:
    async with serving() as server, surveying(server.is_none_mode().url) as (survey, metrics):
        with capture_logs() as lines:
            await survey.connected(info("2.5.0"), BLOCKS)
        assert survey.refusal is None
        assert survey.shortfall is not None
        assert "version '2.5.0', 3.0 or newer is needed: upgrade the backend" in survey.shortfall
        assert missing(metrics) == {"stream"}
        assert lines[-1]["effect"] == survey.shortfall


async def test_a_hostile_version_is_quoted_short() -> None:
    async with serving() as server, surveying(server.is_none_mode().url) as (survey, _):
        await survey.connected(info("2.5." + "9" * 1_000_000), BLOCKS)
        assert len(survey.shortfall or "") < 300


# --- network ---


async def test_the_network_is_stored_at_the_first_connect_and_compared_at_the_next() -> None:
    notes = Notes()
    async with serving() as server:
        async with surveying(server.is_none_mode(MAINNET).url, notes) as (survey, metrics):
            await survey.connected(info(), BLOCKS)
            assert survey.shortfall is None
            assert missing(metrics) == set()
        assert json.loads(notes.held[NETWORK_KEY])["genesis"] == MAINNET
        held = dict(notes.held)
        async with surveying(server.is_none_mode(REGTEST).url, notes) as (survey, _):
            with pytest.raises(LinkLostError) as refused:
                await survey.connected(info(), BLOCKS)
    assert refused.value.reason is LossReason.WRONG_NETWORK
    assert refused.value.detail == (
        "the backend is on regtest, and the event log holds mainnet: set upstream.url to a backend on mainnet, or "
        "eventlog.path to another file for regtest"
    )
    assert refused.value.wait_s == 7.0
    assert notes.held == held


@pytest.mark.parametrize("genesis", LIQUID)
async def test_liquid_is_refused_by_name(genesis: str) -> None:
    notes = Notes()
    async with serving() as server, surveying(server.is_none_mode(genesis).url, notes) as (survey, _):
        with pytest.raises(LinkLostError, match=f"the backend is on {LIQUID[genesis]}, whose amounts are hidden"):
            await survey.connected(info(), BLOCKS)
    assert notes.held == {}


async def test_signets_are_distinguished_by_the_block_after_the_genesis() -> None:
    notes, custom = Notes(), "cc" * 32
    async with serving() as server:
        server.is_none_mode(SIGNET).answers["/api/v1/block-height/1"] = PUBLIC_SIGNET_BLOCK_1
        async with surveying(server.url, notes) as (survey, _):
            await survey.connected(info(), BLOCKS)
        server.answers["/api/v1/block-height/1"] = custom
        async with surveying(server.url, notes) as (survey, _):
            with pytest.raises(
                LinkLostError, match=rf"a signet with block 1 {custom}, and the event log holds signet:"
            ):
                await survey.connected(info(), BLOCKS)


async def test_without_rest_the_log_is_trusted_for_the_url_it_was_checked_with_only() -> None:
    async with serving() as server:
        noted = json.dumps({"genesis": MAINNET, "url": server.url, "block_1": None})
        async with surveying(server.url, Notes(network=noted)) as (survey, metrics):
            await survey.connected(info(), BLOCKS)
            assert survey.refusal is None
            assert missing(metrics) == {"network", "chain", "mempool", "prevouts"}
        other = json.dumps({"genesis": MAINNET, "url": "ws://other/", "block_1": None})
        async with surveying(server.url, Notes(network=other)) as (survey, _):
            with pytest.raises(LinkLostError, match=r"cannot be determined by REST, and .*mainnet.* from ws://other/"):
                await survey.connected(info(), BLOCKS)


async def test_a_note_that_cannot_be_read_is_written_again() -> None:
    notes = Notes(network="{")
    async with serving() as server, surveying(server.is_none_mode().url, notes) as (survey, _):
        await survey.connected(info(), BLOCKS)
    assert json.loads(notes.held[NETWORK_KEY])["genesis"] == REGTEST


def test_networks_are_named() -> None:
    assert str(Network(SIGNET)) == "signet"
    assert str(Network("dd" * 32)) == f"a network with genesis block {'dd' * 32}"
    assert Network(SIGNET, "a").same_as(Network(SIGNET))
    assert not Network(SIGNET, "a").same_as(Network(SIGNET, "b"))


# --- capabilities ---


async def test_a_web_page_for_every_path_is_not_accepted() -> None:
    async with serving() as server, surveying(server.url) as (survey, metrics):
        server.answers = {
            f"/api/v1/{path}": HTML for path in ("block-height/0", "mempool", "mempool/txids", "blocks/0")
        }
        await survey.connected(info(), BLOCKS)
        assert missing(metrics) == {"network", "chain", "mempool", "prevouts"}
        assert "chain: blocks cannot be scanned" in (survey.shortfall or "")


@pytest.mark.parametrize(
    ("path", "answer"),
    [("mempool", '{"count":1,"x":%s}'), ("blocks/0", '[{"id":"aa","height":0,"x":%s}]')],
)
async def test_a_deeply_nested_response_is_not_accepted(path: str, answer: str) -> None:
    async with serving() as server, surveying(server.url) as (survey, metrics):
        server.answers[f"/api/v1/{path}"] = answer % ("[" * 100_000 + "]" * 100_000)
        await survey.connected(info(), BLOCKS)
        assert {"network", "mempool"} <= missing(metrics)


async def test_the_list_of_txids_is_counted_if_the_count_is_unavailable() -> None:
    async with serving() as server, surveying(server.is_none_mode().url) as (survey, metrics):
        del server.answers["/api/v1/mempool"]
        server.answers["/api/v1/mempool/txids"] = json.dumps(["ab" * 32] * 10_000)
        await survey.connected(info(), BLOCKS)
        assert missing(metrics) == set()


async def test_without_a_backfill_only_the_stream_is_needed() -> None:
    async with serving() as server, surveying(server.url, is_backfilling=False) as (survey, _):
        await survey.connected(info(), BLOCKS)
        assert survey.shortfall is None


async def test_a_backend_that_never_answers_delays_the_link_by_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.sources.mempool_space.survey.CONNECT_WAIT_S", 0.05)
    released = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/ws"
        async with surveying(url) as (survey, _), asyncio.timeout(5):
            await survey.connected(info(), BLOCKS)
            assert survey.shortfall is not None
        released.set()


# --- esplora mode ---


async def test_electrs_is_found_next_to_the_backend() -> None:
    async with serving() as server, surveying(server.is_esplora_mode().url) as (survey, metrics):
        with capture_logs() as lines:
            await survey.connected(info(mode="esplora"), BLOCKS)
        assert missing(metrics) == set()
        assert survey.shortfall is None
    assert lines[-1]["esplora"] == f"http://127.0.0.1:{server.port}/api/"


async def test_electrs_is_used_at_its_configured_url() -> None:
    async with serving() as server, serving() as electrs:
        electrs.is_esplora_mode(base="/deep/")
        server.is_esplora_mode(base="/unused/")
        async with surveying(server.url, esplora_url=f"http://127.0.0.1:{electrs.port}/deep") as (survey, metrics):
            await survey.connected(info(mode="esplora"), BLOCKS)
            assert missing(metrics) == set()
    assert "/deep/mempool" in electrs.asked


async def test_an_electrs_of_another_chain_is_not_used() -> None:
    async with serving() as server, surveying(server.is_esplora_mode().url) as (survey, metrics):
        server.answers["/api/block-height/200"] = "ee" * 32
        await survey.connected(info(mode="esplora"), BLOCKS)
        assert missing(metrics) == {"chain", "mempool"}  # the network is told by the backend itself
        assert "esplora mode: set upstream.esplora_url" in (survey.shortfall or "")


async def test_a_block_of_an_abandoned_branch_does_not_hide_electrs() -> None:
    async with serving() as server, surveying(server.is_esplora_mode().url) as (survey, metrics):
        server.answers |= {"/api/block-height/200": "ee" * 32, "/api/block-height/199": PARENT}
        await survey.connected(info(mode="esplora"), BLOCKS)
        assert missing(metrics) == set()


def test_electrs_is_searched_for_in_few_places_and_on_loopback_only() -> None:
    here = candidates(UpstreamSettings(url="ws://127.0.0.1:8999/api/v1/ws"))
    assert here == ("http://127.0.0.1:8999/api/", *(f"http://127.0.0.1:{port}/" for port in ELECTRS_PORTS))
    assert candidates(UpstreamSettings(url="ws://[::1]:8999"))[1] == "http://[::1]:3000/"
    there = UpstreamSettings(url="wss://mempool.space/testnet4/api/v1/ws")
    assert candidates(there) == ("https://mempool.space/testnet4/api/",)
    assert len(candidates(UpstreamSettings(proxy="http://127.0.0.1:1"))) == 1
    assert candidates(UpstreamSettings(esplora_url="http://h:3000")) == ("http://h:3000/",)
    assert candidates(UpstreamSettings(rest_url="http://h/elsewhere")) == ()


def test_each_request_goes_to_the_server_that_has_the_route_in_esplora_mode() -> None:
    routes = Routes("http://b/api/v1/", mode="esplora", esplora="http://e/")
    for path in (
        "mempool", "mempool/txids", "tx/ab", "tx/ab/status", "tx/ab/outspends", "block-height/7", "blocks/tip/hash",
        "block/ab/txids", "block/ab/txs/25", "block/ab/txs", "block/ab/raw",
    ):  # fmt: skip
        assert routes.url(path) == f"http://e/{path}"
    for path in (
        "tx/ab/rbf", "tx/ab/cached", "replacements", "block/ab", "block/ab/summary", "blocks/tip/height", "blocks/0",
        "prevouts", "fees/precise", "prices",
    ):  # fmt: skip
        assert routes.url(path) == f"http://b/api/v1/{path}"
    assert routes.page_of(49) == 25
    routes.esplora = None
    assert routes.url("mempool/txids") is None
    routes.mode = "none"
    assert routes.url("mempool/txids") == "http://b/api/v1/mempool/txids"
    assert routes.page_of(49) == 49


async def test_a_route_without_a_server_is_an_error_without_a_request() -> None:
    async with serving() as server, Rest.open(UpstreamSettings(url=server.url), RestMeter(Registry())) as rest:
        rest.routes.mode = "esplora"
        with pytest.raises(RestError, match=r"block-height/7: in esplora mode .* set upstream\.esplora_url") as caught:
            await rest.text("block-height/7")
        assert caught.value.reason is RestFailure.NOT_FOUND
    assert server.asked == []


async def test_a_block_that_electrs_is_still_indexing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.sources.mempool_space.backend.INDEX_WAIT_S", 0.0)
    async with serving() as server, Rest.open(UpstreamSettings(url=server.url), RestMeter(Registry())) as rest:
        rest.routes.mode, rest.routes.esplora = "esplora", f"http://127.0.0.1:{server.port}/api/"
        backend = Backend(rest, 10_000.0)
        server.answers["/api/v1/blocks/tip/height"] = "201"
        with pytest.raises(RestError, match=r"/api/block-height/201: HTTP 404; is this the electrs of the backend\?"):
            await backend.block_hash(201)
        assert server.asked.count("/api/block-height/201") == 5
        assert await backend.block_hash(202) is None


# --- the link ---


def init_frame(version: str, mode: str) -> str:
    return json.dumps(
        {
            "backendInfo": {"hostname": "h", "version": version, "backend": mode},
            "blocks": [{"id": TIP, "height": 200, "timestamp": 1, "previousblockhash": PARENT}],
            "da": {"progressPercent": 1},
            "loadingIndicators": {},
        }
    )


@asynccontextmanager
async def linked(server_info: tuple[str, str], notes: Notes) -> AsyncIterator[tuple[Server, Any, Survey, Metrics]]:
    """A feed with a surveyor, on a backend that answers init and then pings."""

    async def stream(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if "init" in message.data:
                await socket.send_str(init_frame(*server_info))
            if "ping" in message.data:
                await socket.send_str('{"pong":true}')
        return socket

    async with serving(stream) as server:
        upstream = UpstreamSettings(
            url=server.url, ping_interval=0.01, stale_after=5.0, reconnect_initial=0.001, reconnect_max=0.002
        )
        metrics = Metrics()
        async with Rest.open(upstream, metrics.rest) as rest:
            survey = Survey(upstream, rest, notes, metrics.survey)
            feed = Feed(upstream, metrics.feed, surveyor=survey)
            async with asyncio.timeout(10), aclosing(feed.messages()) as messages:
                yield server, messages, survey, metrics


async def until(messages: Any, kind: type[StreamMessage]) -> Any:
    async for message in messages:
        if isinstance(message, kind):
            return message
        assert not (kind is Lost and isinstance(message, MempoolChange)), "a refused backend's frame was passed on"
    raise AssertionError("the feed ended")


async def test_nothing_of_another_network_reaches_the_log_and_the_link_is_tried_again() -> None:
    noted = json.dumps({"genesis": MAINNET, "url": "ws://there", "block_1": None})
    async with linked(("3.2.1", "none"), Notes(network=noted)) as (server, messages, _, _metrics):
        server.is_none_mode(REGTEST)
        for _ in range(2):
            assert (await until(messages, Lost)).reason is LossReason.WRONG_NETWORK
        server.is_none_mode(MAINNET)
        assert isinstance(await until(messages, Connected), Connected)


async def test_a_missing_part_degrades_the_state_until_it_is_available() -> None:
    async with linked(("3.2.1", "esplora"), Notes()) as (server, messages, survey, metrics):
        short = await until(messages, Shortfall)
        assert "chain" in short.why
        await until(messages, MempoolChange)
        assert metrics_state(metrics) is UpstreamState.DEGRADED
        server.is_esplora_mode()
        await survey.connected(info(mode="esplora"), BLOCKS)
        assert await until(messages, Shortfall) == Shortfall(None)
        assert metrics_state(metrics) is UpstreamState.CONNECTED


async def test_rest_that_comes_up_after_the_stream_is_found_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.sources.mempool_space.survey.RECHECK_FIRST_S", 0.01)
    async with linked(("3.2.1", "none"), Notes()) as (server, messages, survey, _):
        again = asyncio.create_task(survey.run())
        assert (await until(messages, Shortfall)).why is not None
        server.is_none_mode()
        assert await until(messages, Shortfall) == Shortfall(None)
        again.cancel()


async def test_a_network_that_the_recheck_finds_wrong_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.sources.mempool_space.survey.RECHECK_FIRST_S", 0.01)
    notes = Notes()
    async with linked(("3.2.1", "none"), notes) as (server, messages, survey, _):
        notes.held[NETWORK_KEY] = json.dumps({"genesis": MAINNET, "url": server.url, "block_1": None})
        again = asyncio.create_task(survey.run())
        await until(messages, MempoolChange)
        server.is_none_mode(REGTEST)
        async for message in messages:
            if isinstance(message, Lost):
                assert message.reason is LossReason.WRONG_NETWORK
                break
        again.cancel()


def metrics_state(metrics: Metrics) -> UpstreamState:
    rendered = metrics.render().decode()
    (state,) = [each for each in UpstreamState if f'whaled_upstream_state{{state="{each}"}} 1.0' in rendered]
    return state


async def test_a_network_that_is_found_wrong_later_ends_the_link() -> None:
    noted = json.dumps({"genesis": MAINNET, "url": "", "block_1": None})
    notes = Notes()
    async with linked(("3.2.1", "none"), notes) as (server, messages, survey, _):
        await until(messages, MempoolChange)
        notes.held[NETWORK_KEY] = noted
        server.is_none_mode(REGTEST)
        with pytest.raises(LinkLostError):
            await survey.connected(info(), BLOCKS)
        async for message in messages:
            if isinstance(message, Lost):
                assert message.reason is LossReason.WRONG_NETWORK
                break


# --- a server that asks to come later ---


def refused(status: int, **headers: str) -> LinkLostError:
    response = Response(status, "", Headers({name.replace("_", "-"): value for name, value in headers.items()}))
    return diagnose(InvalidStatus(response), UpstreamSettings())


@pytest.mark.parametrize(
    ("status", "header", "wait_s", "says"),
    [
        (429, "60", 60.0, "HTTP 429: too many requests or connections from here; Retry-After of 60 s"),
        (503, "7", 7.0, "HTTP 503: not at the moment; Retry-After of 7 s"),
        (429, "0", 0.0, "Retry-After of 0 s"),
        (429, "86400", RETRY_AFTER_LIMIT_S, "Retry-After of 86400 s, of which whaled waits 300 s"),
        (429, "9" * 400, RETRY_AFTER_LIMIT_S, "of which whaled waits 300 s"),
        (429, "soon", 0.0, "no Retry-After, so the usual delays apply"),
        (429, "-5", 0.0, "no Retry-After"),
        (429, "1.5", 1.5, "Retry-After of 1.5 s"),
    ],
)
def test_the_servers_retry_after_is_honoured_up_to_a_limit(status: int, header: str, wait_s: float, says: str) -> None:
    lost = refused(status, Retry_After=header)
    assert (lost.reason, lost.wait_s) == (LossReason.BUSY, wait_s)
    assert says in lost.detail


def test_a_retry_after_date_is_understood() -> None:
    lost = refused(503, Retry_After=formatdate(time.time() + 100, usegmt=True))
    assert lost.reason is LossReason.BUSY
    assert 95 < lost.wait_s <= 100


def test_a_date_without_a_zone_is_gmt_in_any_local_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "XXX-9")
        time.tzset()
        assert retry_after_s(["Sat, 01 Jan 2000 00:00:00"], 946_684_790.0) == 10.0
    time.tzset()


def test_a_503_without_a_time_is_an_absent_backend() -> None:
    assert refused(503).reason is LossReason.HANDSHAKE
    assert refused(429).reason is LossReason.BUSY


async def test_the_next_attempt_follows_the_servers_retry_after() -> None:
    async def full(_request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "40"})

    async with serving(full) as server:
        upstream = UpstreamSettings(url=server.url, reconnect_initial=0.001, reconnect_max=0.002)
        async with aclosing(Feed(upstream, FeedMeter(Registry())).messages()) as messages:
            lost = await anext(messages)
    assert isinstance(lost, Lost)
    assert 40 < lost.next_delay_s < 41
