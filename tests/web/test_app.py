"""The HTTP server under clients that are idle, slow, greedy or hostile. Raw sockets: no library behaves like that."""

import asyncio
import json
import resource
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from kit import daemon
from kit.web import LIMIT_S, serving
from whaled.config.sections import HttpSettings
from whaled.web.app import is_allowed

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
