"""The REST client against real HTTP servers; transactions and outputs come from the recording."""

import asyncio
import gc
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from itertools import cycle
from traceback import walk_tb
from typing import Any

import msgspec
import pytest
from aiohttp import web
from multidict import CIMultiDict
from structlog.testing import capture_logs

from kit.odd_answers import ODD, answering
from kit.paths import DATA
from whaled.config.sections import UpstreamSettings
from whaled.errors import ConfigError
from whaled.model import Input, Output, Transaction
from whaled.registry import Registry
from whaled.sources.mempool_space.address import rest_base
from whaled.sources.mempool_space.http import RestError, RestFailure, RestMeter
from whaled.sources.mempool_space.rest import Rest
from whaled.urls import without_secrets

RECORDING = DATA / "regtest-1.jsonl.gz"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@cache
def recorded() -> tuple[dict[str, Any], ...]:
    """Every transaction the backend sent as `added`."""
    found: list[dict[str, Any]] = []
    with gzip.open(RECORDING, "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["dir"] == "in":
                found += json.loads(entry["raw"]).get("mempool-transactions", {}).get("added", [])
    return tuple(found)


def consolidation() -> dict[str, Any]:
    """The recorded transaction with 1100 inputs."""
    return max(recorded(), key=lambda tx: len(tx["vin"]))


def small() -> dict[str, Any]:
    return next(tx for tx in recorded() if len(tx["vin"]) == 1)


def decoded(raw: dict[str, Any]) -> Transaction:
    return Transaction(
        txid=raw["txid"],
        inputs=tuple(Input(vin["txid"], vin["vout"], vin["sequence"]) for vin in raw["vin"]),
        outputs=tuple(
            Output(vout["value"], vout["scriptpubkey"], vout["scriptpubkey_address"] or None) for vout in raw["vout"]
        ),
        fee_sat=raw["fee"],
        vsize=raw["vsize"],
    )


class Recorder(RestMeter):
    """The metrics of one client, which also remembers the order of what it counts."""

    def __init__(self) -> None:
        super().__init__(Registry())
        self.requests: list[RestFailure | None] = []
        self.unknown: list[RestFailure] = []
        self.skews: list[float] = []

    def clock_skew(self, seconds: float) -> None:
        super().clock_skew(seconds)
        self.skews.append(seconds)

    def requested(self, failure: RestFailure | None, seconds: float) -> None:
        assert seconds >= 0
        super().requested(failure, seconds)
        self.requests.append(failure)

    def inputs_unknown(self, failure: RestFailure) -> None:
        super().inputs_unknown(failure)
        self.unknown.append(failure)


class Backend:
    """An HTTP server whose answers a test sets by path below /api/v1/; anything else is 404, as the backend has it."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.url = ""
        self.busy = 0
        self.most_busy = 0
        self.released = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/api/v1/")
        self.asked.append(f"{request.method} {path}")
        if request.can_read_body:
            self.bodies.append(await request.json())
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            answer = self.answers.get(path)
            if answer is None:
                return web.Response(status=404)
            return await answer(request)
        finally:
            self.busy -= 1

    def says(self, path: str, *responses: Any, status: int = 200) -> None:
        """Answer with these in turn, the last one from then on."""
        rest: Iterator[Any] = iter(responses)
        last: list[Any] = []

        async def answer(request: web.Request) -> web.StreamResponse:
            last[:] = [next(rest, *last)]
            response = last.pop() if isinstance(last[0], web.Response) else web.json_response(last[0], status=status)
            assert isinstance(response, web.Response)
            return response

        self.answers[path] = answer

    def keeps_silent(self, path: str) -> asyncio.Event:
        """Never answer; the event says that a question arrived."""
        arrived = asyncio.Event()

        async def silent(request: web.Request) -> web.StreamResponse:
            arrived.set()
            await self.released.wait()
            return web.Response()

        self.answers[path] = silent
        return arrived

    def holding(self, path: str, *, until_busy: int) -> asyncio.Event:
        """Answer as before, but only once so many questions have come together; the event says that they did."""
        answer, together = self.answers[path], asyncio.Event()

        async def held(request: web.Request) -> web.StreamResponse:
            if self.busy == until_busy:
                together.set()
            await together.wait()
            return await answer(request)

        self.answers[path] = held
        return together

    def knows(self, tx: dict[str, Any], *, unspent: bool) -> dict[tuple[str, int], dict[str, Any]]:
        """Have an output for each input of `tx`, and answer `prevouts` (if unspent) and `tx/:txid` from them."""
        outputs = cycle(vout for each in recorded()[:200] for vout in each["vout"])
        spent = {(vin["txid"], vin["vout"]): next(outputs) for vin in tx["vin"]}

        async def prevouts(request: web.Request) -> web.StreamResponse:
            asked = await request.json()
            if len(asked) > 100:
                return web.json_response({"error": "Too many outpoints requested"}, status=400)
            return web.json_response(
                [
                    {"prevout": spent[each["txid"], each["vout"]], "unconfirmed": False} if unspent else None
                    for each in asked
                ]
            )

        async def whole(request: web.Request) -> web.StreamResponse:
            filled = [{**vin, "prevout": spent[vin["txid"], vin["vout"]]} for vin in tx["vin"]]
            return web.json_response({**tx, "vin": filled})

        self.answers["prevouts"] = prevouts
        self.answers[f"tx/{tx['txid']}"] = whole
        return spent


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    server = Backend()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = runner.addresses[0][1] and f"ws://127.0.0.1:{runner.addresses[0][1]}/ws/track-mempool-tx"
    try:
        yield server
    finally:
        server.released.set()
        await runner.cleanup()


@pytest.fixture
def meter() -> Recorder:
    return Recorder()


@asynccontextmanager
async def client(url: str, meter: Recorder, *, limit_bytes: int = 1 << 20, **settings: Any) -> AsyncIterator[Rest]:
    given = {"url": url, "rest_timeout": 5.0, **settings}
    async with (
        asyncio.timeout(10),
        Rest.open(UpstreamSettings(**given), meter, response_limit_bytes=limit_bytes) as rest,
    ):
        yield rest


# --- where ---


@pytest.mark.parametrize(
    ("url", "rest_url", "base"),
    [
        ("ws://127.0.0.1:8999/api/v1/ws", None, "http://127.0.0.1:8999/api/v1/"),
        ("ws://localhost:8999/ws/track-mempool-tx", None, "http://localhost:8999/api/v1/"),
        ("wss://mempool.example", None, "https://mempool.example/api/v1/"),
        ("wss://mempool.example/testnet4/api/v1/ws", None, "https://mempool.example/testnet4/api/v1/"),
        ("ws://127.0.0.1:8999", "http://[::1]:80", "http://[::1]:80/api/v1/"),
        ("ws://127.0.0.1:8999", "https://h/mempool/api/v1", "https://h/mempool/api/v1/"),
    ],
)
def test_the_rest_base_follows_from_the_websocket_url(url: str, rest_url: str | None, base: str) -> None:
    assert rest_base(UpstreamSettings(url=url, rest_url=rest_url)) == base


@pytest.mark.parametrize("url", ["http://127.0.0.1:8999", "ws://", "ws://h:99999", "ws://[::1", "127.0.0.1:8999"])
def test_a_url_that_can_never_work_is_the_operators_fault(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^upstream\.url: found .* write it like ws://127.0.0.1:8999/api/v1/ws$"):
        rest_base(UpstreamSettings(url=url))
    with pytest.raises(ConfigError, match=r"^upstream\.rest_url: found "):
        rest_base(UpstreamSettings(rest_url=url.replace("http://", "ftp://")))


def test_a_shown_url_holds_no_secrets() -> None:
    assert without_secrets("wss://me:secret@host:1/api/v1/ws?token=secret") == "wss://host:1/api/v1/ws"


# --- simple questions ---


async def test_the_simple_calls_answer_in_types(backend: Backend, meter: Recorder) -> None:
    backend.says("blocks/tip/height", web.Response(text="263"))
    backend.says("blocks/tip/hash", web.Response(text="00ff\n"))
    backend.says("mempool/txids", ["aa", "bb"])
    async with client(backend.url, meter) as rest:
        assert await rest.tip_height() == 263
        assert await rest.text("blocks/tip/hash") == "00ff"
        assert await rest.get("mempool/txids", list[str]) == ["aa", "bb"]
    assert meter.requests == [None] * 3


async def test_404_returns_nothing(backend: Backend, meter: Recorder) -> None:
    async with client(backend.url, meter) as rest:
        assert await rest.get("tx/ff/status", dict[str, Any]) is None
    assert backend.asked == ["GET tx/ff/status"]
    assert meter.requests == [None]


async def test_a_server_without_the_api_is_named(backend: Backend, meter: Recorder) -> None:
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError, match=r"tip/height: HTTP 404; is this a mempool backend\? upstream.rest_url"):
            await rest.tip_height()


# --- failures ---


async def test_a_request_is_repeated_after_the_retry_after_of_a_429(backend: Backend, meter: Recorder) -> None:
    later = format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True)  # already over
    backend.says(
        "blocks/tip/height",
        web.Response(status=429, headers={"Retry-After": "0"}),
        web.Response(status=429, headers={"Retry-After": later}),
        web.Response(text="263"),
    )
    async with client(backend.url, meter) as rest:
        assert await rest.tip_height() == 263
    assert meter.requests == [RestFailure.RATE_LIMITED, RestFailure.RATE_LIMITED, None]


async def test_a_retry_after_that_comes_twice_is_the_longer_one(backend: Backend, meter: Recorder) -> None:
    headers = CIMultiDict([("Retry-After", "3600"), ("Retry-After", "soon"), ("Retry-After", "7200")])
    backend.says("blocks/tip/height", web.Response(status=429, headers=headers))
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError) as caught:
            await rest.tip_height()
    assert caught.value.retry_after_s == 7200


@pytest.mark.slow
@pytest.mark.parametrize("head", ODD.values(), ids=ODD.keys())
async def test_a_malformed_response_is_a_failed_request(meter: Recorder, head: bytes) -> None:
    async with answering(head) as place, client(f"ws://{place}", meter, rest_timeout=1.0) as rest:
        with pytest.raises(RestError):
            await rest.tip_height()


@pytest.mark.parametrize("seconds", ["3600", "9" * 400])
async def test_a_retry_after_beyond_the_total_time_is_not_waited_for(
    backend: Backend, meter: Recorder, seconds: str
) -> None:
    backend.says("blocks/tip/height", web.Response(status=429, headers={"Retry-After": seconds}))
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError) as caught:
            await rest.tip_height()
    assert caught.value.reason is RestFailure.RATE_LIMITED
    assert caught.value.retry_after_s == float(seconds)
    assert len(backend.asked) == 1


async def test_a_request_is_repeated_a_bounded_number_of_times_after_500(backend: Backend, meter: Recorder) -> None:
    broken = [
        web.Response(status=500, text="Block height out of range", headers={"Retry-After": "0"}) for _ in range(9)
    ]
    backend.says("block-height/999", *broken)
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError, match=r"block-height/999: HTTP 500: Block height out of range") as caught:
            await rest.text("block-height/999")
    assert caught.value.status == 500
    assert meter.requests == [RestFailure.SERVER_ERROR] * 3


async def test_a_request_is_not_repeated_after_400(backend: Backend, meter: Recorder) -> None:
    backend.says("address/x", {"error": "Address lookups require an address index"}, status=405)
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError) as caught:
            await rest.get("address/x", dict[str, Any])
    assert caught.value.reason is RestFailure.CLIENT_ERROR
    assert len(backend.asked) == 1


async def test_a_redirect_is_reported_and_not_followed(backend: Backend, meter: Recorder) -> None:
    backend.says(
        "blocks/tip/height",
        web.Response(status=301, headers={"Location": "https://user:pw@elsewhere.example/api/v1/blocks/tip/height"}),
    )
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError, match=r"301 redirects to https://elsewhere.example/.*set upstream.rest_url"):
            await rest.tip_height()


async def test_a_silent_server_is_a_timeout(backend: Backend, meter: Recorder) -> None:
    backend.keeps_silent("blocks/tip/height")
    async with client(backend.url, meter, rest_timeout=0.05) as rest:
        with pytest.raises(RestError, match=r"no response within upstream\.rest_timeout"):
            await rest.tip_height()
    assert set(meter.requests) == {RestFailure.TIMEOUT}


async def test_an_unreachable_server_is_reported(meter: Recorder) -> None:
    listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    async with client(f"ws://127.0.0.1:{port}", meter, rest_timeout=0.05) as rest:
        with pytest.raises(RestError, match="Connect call failed") as caught:
            await rest.tip_height()
    assert caught.value.reason is RestFailure.UNREACHABLE


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><title>mempool</title>", b'{"vin": "\xff"}', b"", b'{"a":'])
async def test_garbage_is_reported_with_its_beginning(backend: Backend, meter: Recorder, body: bytes) -> None:
    backend.says("blocks/tip/height", web.Response(body=body))
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError, match="the answer begins with") as caught:
            await rest.tip_height()
    assert caught.value.reason is RestFailure.GARBAGE


async def test_a_giant_body_is_cut_off(backend: Backend, meter: Recorder) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    backend.answers["mempool/txids"] = endless
    async with client(backend.url, meter, limit_bytes=200_000) as rest:
        with pytest.raises(RestError, match="exceeds 200000 bytes") as caught:
            await rest.get("mempool/txids", list[str])
    assert caught.value.reason is RestFailure.TOO_BIG


async def test_a_partial_response_is_not_kept_in_memory(backend: Backend, meter: Recorder) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "2000000"})
        await response.prepare(request)
        await response.write(b" " * 1_000_000)
        assert request.transport is not None
        request.transport.abort()
        return response

    backend.answers["mempool/txids"] = half
    async with client(backend.url, meter) as rest:
        with pytest.raises(RestError) as caught:
            await rest.get("mempool/txids", list[str])
    assert caught.value.reason is RestFailure.UNREACHABLE
    assert caught.value.__cause__ is not None
    frames = [frame for frame, _ in walk_tb(caught.value.__cause__.__traceback__)]
    kept = [frame.f_locals["raw"] for frame in frames if "raw" in frame.f_locals]
    assert kept == [b""]


@pytest.mark.parametrize("year", ["9999999", "99999999999999"])
async def test_an_impossible_date_is_ignored(backend: Backend, meter: Recorder, year: str) -> None:
    date = f"Mon, 01 Jan {year} 00:00:00 GMT"
    busy = web.Response(status=429, headers={"Retry-After": date, "Date": date})
    backend.says("blocks/tip/height", busy, web.Response(text="263", headers={"Date": date}))
    async with client(backend.url, meter) as rest:
        assert await rest.tip_height() == 263
    assert meter.skews == []


# --- prevouts ---


async def test_inputs_are_requested_in_chunks_of_at_most_100(backend: Backend, meter: Recorder) -> None:
    raw = consolidation()
    spent = backend.knows(raw, unspent=True)
    at_once = backend.holding("prevouts", until_busy=3)
    async with client(backend.url, meter, rest_concurrency=3) as rest:
        filled = (await rest.prevouts([decoded(raw)], 5.0))[0]
    assert [len(body) for body in backend.bodies] == [100] * 11
    assert at_once.is_set()
    assert backend.most_busy == 3
    assert len(filled.inputs) == 1100
    for got in filled.inputs:
        told = spent[got.txid, got.vout]
        assert got.prevout == Output(told["value"], told["scriptpubkey"], told["scriptpubkey_address"] or None)
    assert {each.prevout.address for each in filled.inputs if each.prevout is not None} > {None}
    assert msgspec.structs.replace(filled, inputs=()) == msgspec.structs.replace(decoded(raw), inputs=())


async def test_an_answer_of_null_is_looked_up_in_the_mined_spender(backend: Backend, meter: Recorder) -> None:
    raw = small()
    backend.knows(raw, unspent=False)
    async with client(backend.url, meter) as rest:
        filled = (await rest.prevouts([decoded(raw)], 5.0))[0]
    assert backend.asked == ["POST prevouts", f"GET tx/{raw['txid']}"]
    assert all(each.prevout is not None for each in filled.inputs)
    assert meter.unknown == []


async def test_the_transaction_is_requested_from_a_backend_without_prevouts(backend: Backend, meter: Recorder) -> None:
    raw = small()
    backend.knows(raw, unspent=True)
    del backend.answers["prevouts"]
    async with client(backend.url, meter) as rest:
        filled = (await rest.prevouts([decoded(raw)], 5.0))[0]
    assert all(each.prevout is not None for each in filled.inputs)


async def test_known_inputs_are_not_requested(backend: Backend, meter: Recorder) -> None:
    raw = small()
    backend.knows(raw, unspent=True)
    async with client(backend.url, meter) as rest:
        filled = (await rest.prevouts([decoded(raw)], 5.0))[0]
        backend.asked.clear()
        assert (await rest.prevouts([filled], 5.0))[0] is filled
    assert backend.asked == []


async def test_inputs_stay_unknown_if_the_spender_is_gone(backend: Backend, meter: Recorder) -> None:
    raw = small()
    backend.knows(raw, unspent=False)
    del backend.answers[f"tx/{raw['txid']}"]
    tx = decoded(raw)
    async with client(backend.url, meter) as rest:
        assert (await rest.prevouts([tx], 5.0))[0] is tx
    assert meter.unknown == [RestFailure.INCOMPLETE]


async def test_inputs_stay_unknown_past_the_deadline(backend: Backend, meter: Recorder) -> None:
    backend.keeps_silent("prevouts")
    tx = decoded(consolidation())
    async with client(backend.url, meter) as rest:
        assert (await rest.prevouts([tx], 0.05))[0] is tx
    assert meter.unknown == [RestFailure.DEADLINE]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ([], RestFailure.GARBAGE),
        ([{"prevout": {"value": "1"}}], RestFailure.INCOMPLETE),
        ([{"prevout": {"value": -1, "scriptpubkey": ""}}], RestFailure.INCOMPLETE),
        ([{"prevout": None}], RestFailure.INCOMPLETE),
        ({"error": "Invalid outpoints format"}, RestFailure.GARBAGE),
    ],
)
async def test_a_wrong_answer_leaves_the_inputs_unknown(
    backend: Backend, meter: Recorder, answer: object, failure: RestFailure
) -> None:
    backend.says("prevouts", answer)
    tx = decoded(small())
    async with client(backend.url, meter) as rest:
        assert (await rest.prevouts([tx], 5.0))[0] is tx
    assert meter.unknown == [failure]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b'["x",%s{}]' % (b" " * 4_000_000), RestFailure.GARBAGE),
        (b'["%s\xff"]' % (b"x" * 4_000_000), RestFailure.INCOMPLETE),
        (b"[%snull]" % (b"null," * 800_000), RestFailure.GARBAGE),
    ],
    ids=["another shape", "no text", "too many"],
)
async def test_a_response_that_leaves_the_inputs_unknown_is_not_cached(
    backend: Backend, meter: Recorder, body: bytes, failure: RestFailure
) -> None:
    tx = decoded(small())
    async with client(backend.url, meter, limit_bytes=8_000_000) as rest:
        assert (await rest.prevouts([tx], 5.0))[0] is tx  # what a first question makes for all that follow
        backend.says("prevouts", web.Response(body=body))
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            assert (await rest.prevouts([tx], 5.0))[0] is tx
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
            gc.enable()
    assert meter.unknown == [RestFailure.INCOMPLETE, failure]
    assert kept < 1_000_000


async def test_one_failing_chunk_leaves_all_inputs_unknown(backend: Backend, meter: Recorder) -> None:
    raw = consolidation()
    backend.knows(raw, unspent=True)
    good = backend.answers["prevouts"]

    async def moody(request: web.Request) -> web.StreamResponse:
        if len(backend.bodies) == 7:
            return web.json_response({"error": "Invalid outpoints format"}, status=400)
        return await good(request)

    backend.answers["prevouts"] = moody
    tx = decoded(raw)
    async with client(backend.url, meter, rest_concurrency=1) as rest:
        assert (await rest.prevouts([tx], 5.0))[0] is tx
    assert meter.unknown == [RestFailure.CLIENT_ERROR]


async def test_cancelling_a_request_ends_it(backend: Backend, meter: Recorder) -> None:
    arrived = backend.keeps_silent("prevouts")
    async with client(backend.url, meter) as rest, asyncio.TaskGroup() as group:
        asking = group.create_task(rest.prevouts([decoded(small())], 60.0))
        await arrived.wait()
        asking.cancel()
    assert asking.cancelled()
    assert meter.unknown == []


async def test_a_clock_that_differs_from_the_backends_is_logged_and_measured(backend: Backend, meter: Recorder) -> None:
    long_ago = web.json_response({"USD": 5}, headers={"Date": "Mon, 01 Jan 2024 00:00:00 GMT"})
    backend.says("prices", long_ago, {"USD": 5})
    async with client(backend.url, meter) as rest:
        with capture_logs() as lines:
            await rest.get("prices", dict[str, int])
        assert [line["event"] for line in lines] == ["upstream_clock_skewed"]
        assert lines[0]["ahead_s"] > 86400
        with capture_logs() as lines:
            await rest.get("prices", dict[str, int])
        assert lines == []  # the real date is within bounds
    assert meter.skews[0] > 86400
    assert abs(meter.skews[1]) < 5
