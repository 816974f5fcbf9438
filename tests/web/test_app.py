"""The HTTP server under clients that are idle, slow, greedy or hostile. Raw sockets: no library behaves like that."""

import asyncio
import gzip
import json
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from kit import daemon
from whaled.config.sections import HttpSettings
from whaled.model import Position, UpstreamState
from whaled.ops.metrics import Metrics
from whaled.web.app import Health, HttpServer, is_allowed
from whaled.web.exposition import Exposition, Format, accepted_format, accepts_gzip
from whaled.web.pace import BURST

HEALTH = Health(
    status="ok",
    upstream=UpstreamState.CONNECTED,
    shortfall=None,
    connections=0,
    position=Position("e", 0),
    version="0",
)
LIMIT_S = 20


class Answer:
    """A response as it was on the wire."""

    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
        self.body = body


class Visitor:
    """A client that writes what it is told and reads when it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str = "/metrics", *headers: str, host: str = "localhost") -> Answer:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *headers]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        return await self.answer()

    async def answer(self) -> Answer:
        async with asyncio.timeout(LIMIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
            length = int(Answer(head, b"").headers["content-length"])
            return Answer(head, await self.reader.readexactly(length))

    async def closed(self) -> bytes:
        """What still comes until the server closes."""
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


class Rig:
    def __init__(self, address: str, metrics: Metrics, server: HttpServer) -> None:
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        self.metrics = metrics
        self.server = server

    @asynccontextmanager
    async def visitor(self, source: str = "127.0.0.1", receive_buffer: int | None = None) -> AsyncIterator[Visitor]:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((source, 0))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024 if receive_buffer else 2**20)
        try:
            yield Visitor(reader, writer)
        finally:
            writer.transport.abort()

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value

    def cut(self, reason: str) -> float:
        return self.value("whaled_http_connections_cut_total", reason=reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - a metric is no event
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(render: Callable[[Format], bytes] | None = None, **settings: Any) -> AsyncIterator[Rig]:
    metrics = Metrics()
    server = HttpServer(
        HttpSettings(port=0, **settings), metrics=render or metrics.render, health=lambda: HEALTH, meter=metrics.http
    )
    async with server.serving() as address:
        assert address is not None
        yield Rig(address, metrics, server)


# --- requests ---


async def test_health_and_metrics_are_answered_on_one_connection() -> None:
    async with serving() as rig, rig.visitor() as visitor:
        for _ in range(3):
            answer = await visitor.ask("/healthz")
            assert (answer.status, json.loads(answer.body)["status"]) == (200, "ok")
            answer = await visitor.ask("/metrics")
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert any(text_string_to_metric_families(answer.body.decode()))
        answer = await visitor.ask("/nothing")
        assert (answer.status, answer.headers["server"]) == (404, "whaled")
        assert rig.value("whaled_http_requests_total", status="200") == 6
        assert rig.value("whaled_http_requests_total", status="404") == 1
        assert rig.server.connections == 1


async def test_openmetrics_and_gzip_are_negotiated() -> None:
    async with serving() as rig, rig.visitor() as visitor:
        answer = await visitor.ask(
            "/metrics",
            "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
            "Accept-Encoding: deflate, gzip;q=0.8",
        )
        assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
        text = gzip.decompress(answer.body).decode()
        assert len(answer.body) < len(text) / 4
        assert text.endswith("# EOF\n")
        families = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]  # of the library
        assert "whaled_http_requests" in {family.name for family in families}


PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;"
    "q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", Format.PROMETHEUS),
        ("*/*", Format.PROMETHEUS),
        (PROMETHEUS_ACCEPT, Format.OPENMETRICS),
        ("Application/OpenMetrics-Text; version=\"1.0.0\"", Format.OPENMETRICS),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", Format.PROMETHEUS),
        ("application/openmetrics-text;version=1.0.0;q=0", Format.PROMETHEUS),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", Format.PROMETHEUS),
        ("application/openmetrics-text;q=nan", Format.PROMETHEUS),
        ("application/openmetrics-text;q=1e400", Format.PROMETHEUS),
        (",;=,;q=;q,", Format.PROMETHEUS),
    ],
)  # fmt: skip
def test_the_format_follows_the_accept_header(accept: str, chosen: Format) -> None:
    assert accepted_format(accept) is chosen


@pytest.mark.parametrize(
    ("header", "is_accepted"),
    [("", False), ("gzip", True), ("GZIP", True), ("x-gzip", True), ("*", True), ("gzip;q=0", False),
     ("*, gzip;q=0", False), ("br, deflate", False), ("gzip;q=0.001", True)],
)  # fmt: skip
def test_gzip_follows_the_accept_encoding_header(header: str, is_accepted: bool) -> None:
    assert accepts_gzip(header) is is_accepted


async def test_a_rendering_is_shared_by_all_requests_of_its_interval() -> None:
    rendered: list[Format] = []

    def render(chosen: Format) -> bytes:
        rendered.append(chosen)
        return b"metrics"

    async with serving(render, render_interval=3600.0) as rig, rig.visitor() as one, rig.visitor() as two:
        for visitor in (one, two, one, two):
            assert (await visitor.ask("/metrics")).body == b"metrics"
            answer = await visitor.ask("/metrics", "Accept-Encoding: gzip")
            assert gzip.decompress(answer.body) == b"metrics"
        assert rendered == [Format.PROMETHEUS]
        assert rig.value("whaled_http_renderings_total") == 1
        rig.server.reconfigure(HttpSettings(render_interval=0.001))
        await asyncio.sleep(0.002)
        await one.ask("/metrics")
        assert len(rendered) == 2


def test_bytes_are_compressed_once_and_an_old_rendering_is_not_served() -> None:
    now = 100.0
    bodies = iter([b"first", b"second", b"third"])
    exposition = Exposition(lambda _: next(bodies), Metrics().http, clock=lambda: now)
    first = exposition.body(Format.PROMETHEUS, 1.0, is_compressed=True)
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=True) is first
    now = 100.99
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=False) == b"first"
    assert exposition.body(Format.OPENMETRICS, 1.0, is_compressed=False) == b"second"
    now = 101.0
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=False) == b"third"


# --- hosts ---


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:9108", "10.1.2.3:80", "[::1]", "[::1]:9108", "[2001:db8::1]:1", "localhost",
     "LOCALHOST:9108", "localhost.", "whaled.internal", "Whaled.Internal:9108"],
)  # fmt: skip
def test_addresses_localhost_and_configured_names_are_allowed(host: str) -> None:
    assert is_allowed(host, ("whaled.internal",))


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9108", "127.0.0.1.evil.example", "localhost.evil.example", "", ":9108", "a b",
     "whaled.internal.evil.example", "[::1", "::1", "127.0.0.1:9108:1", "127.0.0.1:x", "127.1", "user@127.0.0.1"],
)  # fmt: skip
def test_other_names_are_not_allowed(host: str) -> None:
    assert not is_allowed(host, ("whaled.internal",))


def test_a_star_allows_every_name() -> None:
    assert is_allowed("anything.example", ("*",))


async def test_a_rebound_name_is_answered_421_with_the_key() -> None:
    async with serving(allowed_hosts=("good.example",)) as rig, rig.visitor() as visitor:
        answer = await visitor.ask("/metrics", host="evil.example")
        assert answer.status == 421
        assert b"http.allowed_hosts" in answer.body
        assert b"evil.example" not in answer.body
        assert (await visitor.ask("/metrics", host="good.example:9108")).status == 200
        assert rig.value("whaled_http_requests_total", status="421") == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000 + b"\r\n\r\n", 400),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)  # fmt: skip
async def test_odd_requests_are_answered_and_log_nothing(
    request_: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as rig, rig.visitor() as visitor:
        visitor.writer.write(request_)
        async with asyncio.timeout(LIMIT_S):
            line = await visitor.reader.readline()
        assert int(line.split()[1]) == status
        await rig.until(lambda: rig.value("whaled_http_requests_total", status=str(status)) == 1)
    assert caplog.records == []


# --- limits ---


async def test_a_head_without_end_is_refused_431() -> None:
    async with serving(max_request=4096) as rig, rig.visitor() as visitor:
        visitor.writer.write(b"GET /metrics HTTP/1.1\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 5)
        assert (await visitor.reader.readline()).split()[1] == b"431"
        await visitor.closed()
        assert rig.cut("request_too_large") == 1


@pytest.mark.slow
async def test_connections_without_a_request_are_cut_off_and_so_is_a_head_that_drips() -> None:
    async with serving(header_timeout=0.3) as rig, rig.visitor() as silent, rig.visitor() as dripping:
        dripping.writer.write(b"GET /met")
        assert await silent.closed() == b""
        assert await dripping.closed() == b""
        assert rig.cut("header_timeout") == 2
        assert rig.server.connections == 0


@pytest.mark.slow
async def test_idle_connections_are_cut_off_later_and_a_half_request_on_them_soon() -> None:
    async with serving(header_timeout=0.3, idle_timeout=0.6) as rig, rig.visitor() as idle:
        await idle.ask("/healthz")
        await idle.closed()
        assert rig.cut("idle_timeout") == 1
        rig.server.reconfigure(HttpSettings(header_timeout=0.3, idle_timeout=3600.0))
        async with rig.visitor() as half:
            await half.ask("/healthz")
            half.writer.write(b"GET ")
            await half.closed()
        assert rig.cut("header_timeout") == 1


@pytest.mark.slow
async def test_a_reader_that_stops_is_cut_off() -> None:
    large = b"x" * 8_000_000  # more than the kernel takes for a reader that stands still
    async with serving(lambda _: large, write_timeout=0.3) as rig, rig.visitor(receive_buffer=4096) as slow:
        slow.writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        await rig.until(lambda: rig.cut("write_timeout") == 1)
        await rig.until(lambda: rig.server.connections == 0)


async def test_requests_sent_ahead_are_not_taken_before_the_answer_is_read() -> None:
    large = b"x" * 8_000_000
    async with serving(lambda _: large) as rig, rig.visitor(receive_buffer=4096) as slow:
        slow.writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        async with rig.visitor() as quick:
            await quick.ask("/healthz")
        assert rig.value("whaled_http_requests_total", status="200") == 1  # that of `quick`
        assert rig.value("whaled_http_renderings_total") == 1


async def test_requests_beyond_the_rate_wait_for_their_turn() -> None:
    async with serving(requests_per_second=1000.0) as rig, rig.visitor() as greedy:
        loop = asyncio.get_running_loop()
        began = loop.time()
        greedy.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
        for _ in range(300):
            assert (await greedy.answer()).status == 200
        assert loop.time() - began >= (300 - BURST - 1) / 1000
        assert rig.value("whaled_http_requests_delayed_total") > 0


@pytest.mark.slow
async def test_requests_of_connections_that_are_gone_take_no_turn() -> None:
    async with serving(requests_per_second=5.0) as rig:
        for _ in range(500):
            async with rig.visitor() as visitor:
                visitor.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with rig.visitor() as scraper:
            assert (await scraper.ask("/metrics")).status == 200  # within seconds, not after a hundred


async def test_greedy_connections_do_not_keep_out_their_own_address() -> None:
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(serving(max_connections_per_address=4, requests_per_second=20.0))
        for _ in range(4):
            greedy = await stack.enter_async_context(rig.visitor())
            greedy.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        await rig.until(lambda: rig.value("whaled_http_requests_delayed_total") >= 4)
        scraper = await stack.enter_async_context(rig.visitor())
        assert (await scraper.ask("/metrics")).status == 200
        assert rig.cut("address_full") == 0


async def test_one_address_holds_no_more_than_its_share_and_the_idle_make_room() -> None:
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(serving(max_connections=8, max_connections_per_address=3))
        for _ in range(3):
            await (await stack.enter_async_context(rig.visitor())).ask("/healthz")
        fourth = await stack.enter_async_context(rig.visitor())
        assert (await fourth.ask("/healthz")).status == 200
        assert rig.cut("displaced") == 1
        assert rig.server.connections == 3


async def test_many_idle_connections_keep_no_scraper_out() -> None:
    async with serving(max_connections=6, max_connections_per_address=5) as rig, rig.visitor("127.0.0.2") as other:
        await other.ask("/healthz")
        held = [await asyncio.open_connection(rig.host, rig.port) for _ in range(40)]
        async with rig.visitor("127.0.0.3") as scraper:
            assert (await scraper.ask("/metrics")).status == 200
        assert (await other.ask("/healthz")).status == 200
        assert rig.server.connections <= 6
        assert rig.cut("displaced") >= 34
        for _, writer in held:
            writer.transport.abort()


async def test_a_connection_beyond_the_limit_is_closed_at_once_if_all_are_in_use() -> None:
    large = b"x" * 8_000_000
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(
            serving(lambda _: large, max_connections=2, max_connections_per_address=2)
        )
        for _ in range(2):
            visitor = await stack.enter_async_context(rig.visitor(receive_buffer=4096))
            visitor.writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await visitor.reader.readline()
        for source in ("127.0.0.1", "127.0.0.2"):
            further = await stack.enter_async_context(rig.visitor(source))
            assert await further.closed() == b""
        assert (rig.cut("address_full"), rig.cut("full")) == (1, 1)


@pytest.mark.slow
async def test_without_descriptors_arrivals_wait_in_the_kernel_and_the_log_has_one_line() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with capture_logs() as lines:
        async with serving() as rig:
            arrivals = [socket.create_connection((rig.host, rig.port)) for _ in range(5)]
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (arrivals[-1].fileno() + 1, hard))
                await rig.until(lambda: rig.value("whaled_http_accept_failures_total") == 3)
                assert rig.server.connections == 0
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await rig.until(lambda: rig.server.connections == 5)
            for sock in arrivals:
                sock.close()
    first, count = lines
    assert first["event"] == count["of"] == "http_accept_failed"
    assert count["lines"] == 2


# --- the process ---


@pytest.mark.slow
async def test_silent_connections_to_the_metrics_port_do_not_end_the_daemon(tmp_path: Path) -> None:
    """At 490 descriptors, 700 silent connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", gateway={"max_connections": 20}, http={"header_timeout": "1s"}
    )
    launcher = ("prlimit", "--nofile=490:490")
    async with daemon.running(config, launcher=launcher) as whaled:
        host, _, port = whaled.http.removeprefix("http://").rpartition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(700)]
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(LIMIT_S):
            text = (await reader.read()).decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(("whaled_", "process_")))
        assert float(values["process_open_fds"]) < 150
        assert float(values["whaled_http_connections"]) <= 64
        assert float(values['whaled_http_connections_cut_total{reason="displaced"}']) >= 636
        for stream in (*(writer for _, writer in held), writer):
            stream.transport.abort()
        assert whaled.process.returncode is None
        assert {line["level"] for line in whaled.lines} <= {"info", "warning"}
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
