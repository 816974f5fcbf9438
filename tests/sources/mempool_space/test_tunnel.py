"""The stream and REST through proxies, against a backend of both on one port; what fails is named with its key."""

import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from kit.paths import DATA
from kit.proxy import LOGIN, LOGIN_QUOTED, stand_in
from whaled.config.parse import parse
from whaled.config.sections import UpstreamSettings
from whaled.errors import ConfigError
from whaled.registry import Registry
from whaled.source import Connected, Lost
from whaled.sources.mempool_space.feed import Feed
from whaled.sources.mempool_space.http import RestError, RestFailure, RestMeter
from whaled.sources.mempool_space.link_errors import LossReason
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.proxy import HEAD_LIMIT_BYTES, Proxy, ProxyError, ProxyFault, Target
from whaled.sources.mempool_space.rest import Rest
from whaled.sources.mempool_space.tunnel import Tunnel

RECORDING = DATA / "regtest-1.jsonl.gz"
ONION = f"{'a' * 56}.onion"
HEIGHT = 117
KINDS = [("http", "http"), ("socks5", "socks5h")]


def recorded_init() -> str:
    with gzip.open(RECORDING, "rt") as lines:
        return next(
            str(entry["raw"]) for line in lines if (entry := json.loads(line))["dir"] == "in" and entry["conn"] == 1
        )


@asynccontextmanager
async def backend(tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a backend that answers init, and the height of the tip."""

    async def stream(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.data == '{"action":"init"}':
                await socket.send_str(recorded_init())
        return socket

    async def height(_request: web.Request) -> web.Response:
        return web.Response(text=str(HEIGHT))

    app = web.Application()
    app.router.add_get("/api/v1/ws", stream)
    app.router.add_get("/api/v1/blocks/tip/height", height)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def settings(url: str, proxy: str | None, **more: Any) -> UpstreamSettings:
    quick = {"connect_timeout": 5.0, "rest_timeout": 5.0, "reconnect_initial": 0.001, "reconnect_max": 0.002}
    return UpstreamSettings(**{"url": url, "proxy": proxy, **quick, **more})


async def both(upstream: UpstreamSettings) -> int:
    """Connect the stream, then ask REST; the height that it answers."""
    async with asyncio.timeout(10), aclosing(Feed(upstream, FeedMeter(Registry())).messages()) as messages:
        assert isinstance(await anext(messages), Connected)
    async with Rest.open(upstream, RestMeter(Registry())) as rest:
        return await rest.tip_height()


async def failures(upstream: UpstreamSettings) -> tuple[Lost, str, RestError]:
    """Why the stream cannot be had, as it is logged, and why REST cannot."""
    with capture_logs() as lines:
        async with asyncio.timeout(10), aclosing(Feed(upstream, FeedMeter(Registry())).messages()) as messages:
            lost = await anext(messages)
    assert isinstance(lost, Lost)
    async with Rest.open(upstream, RestMeter(Registry())) as rest:
        with pytest.raises(RestError) as caught:
            await rest.tip_height()
    shown = f"{lines} {caught.value}"
    assert LOGIN[1] not in shown
    assert LOGIN_QUOTED.partition(":")[2] not in shown
    return lost, lines[0]["detail"], caught.value


# --- what works ---


@pytest.mark.parametrize(("kind", "scheme"), [*KINDS, ("socks5", "socks5")])
async def test_stream_and_rest_go_through_the_proxy(kind: str, scheme: str) -> None:
    async with backend() as port, stand_in(kind) as proxy:
        assert await both(settings(f"ws://localhost:{port}/api/v1/ws", proxy.url(scheme))) == HEIGHT
    # socks5:// resolves here, the others there.
    assert proxy.asked == [f"{'127.0.0.1' if scheme == 'socks5' else 'localhost'}:{port}"] * 2


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_an_onion_name_is_resolved_by_the_proxy_only(kind: str, scheme: str) -> None:
    async with backend() as port, stand_in(kind) as proxy:
        proxy.hosts[ONION] = "127.0.0.1"
        assert await both(settings(f"ws://{ONION}:{port}/api/v1/ws", proxy.url(scheme))) == HEIGHT
    assert proxy.asked == [f"{ONION}:{port}"] * 2


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_user_and_password_are_sent_decoded(kind: str, scheme: str) -> None:
    async with backend() as port, stand_in(kind) as proxy:
        proxy.wants = LOGIN
        assert await both(settings(f"ws://127.0.0.1:{port}/api/v1/ws", proxy.url(scheme, LOGIN_QUOTED))) == HEIGHT


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_an_answer_byte_by_byte_is_read(kind: str, scheme: str) -> None:
    async with backend() as port, stand_in(kind) as proxy:
        proxy.dribbles = True
        assert await both(settings(f"ws://127.0.0.1:{port}/api/v1/ws", proxy.url(scheme))) == HEIGHT


@pytest.fixture
def trusted(
    certificate: tuple[Path, Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ssl.SSLContext:
    """A server's context whose certificate whaled accepts."""
    chain, key, trusting = certificate
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("".join(map(ssl.DER_cert_to_PEM_cert, trusting.get_ca_certs(binary_form=True))))
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return context


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_tls_with_the_backend_runs_inside_the_tunnel(kind: str, scheme: str, trusted: ssl.SSLContext) -> None:
    async with backend(trusted) as port, stand_in(kind) as proxy:
        assert await both(settings(f"wss://localhost:{port}/api/v1/ws", proxy.url(scheme))) == HEIGHT


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_a_proxy_behind_tls_opens_the_same_tunnels(scheme: str, trusted: ssl.SSLContext) -> None:
    async with backend(trusted if scheme == "wss" else None) as port, stand_in("http", trusted) as proxy:
        url = f"{scheme}://localhost:{port}/api/v1/ws"
        assert await both(settings(url, f"https://localhost:{proxy.port}")) == HEIGHT
    assert proxy.asked == [f"localhost:{port}"] * 2


# --- what fails ---


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_a_proxy_that_requires_a_login_is_named(kind: str, scheme: str) -> None:
    async with stand_in(kind) as proxy:
        proxy.wants = LOGIN
        for login, says in (("", "wants a user and a password"), ("alice:wrong", "does not accept the user and")):
            lost, detail, error = await failures(settings("ws://127.0.0.1:1", proxy.url(scheme, login)))
            assert (lost.reason, error.reason) == (LossReason.PROXY, RestFailure.PROXY)
            for text in (detail, str(error)):
                assert f"the proxy 127.0.0.1:{proxy.port} (upstream.proxy) {says}" in text
                assert f"write {scheme}://user:password@host:port" in text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), KINDS)
async def test_a_target_that_the_proxy_cannot_reach_is_named_with_its_key(kind: str, scheme: str) -> None:
    async with stand_in(kind) as proxy:
        upstream = settings("ws://unknown.invalid:81", proxy.url(scheme), rest_url="http://other.invalid:82")
        _, detail, error = await failures(upstream)
    assert "cannot reach unknown.invalid:81: " in detail
    assert "is upstream.url right, and the backend running?" in detail
    assert "cannot reach other.invalid:82: " in str(error)
    assert "is upstream.rest_url right" in str(error)
    # It may pass, so REST asks again.
    assert proxy.asked == ["unknown.invalid:81", *["other.invalid:82"] * 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme", "answer", "says"),
    [
        ("http", "http", b"HTTP/1.1 403 Forbidden\r\n\r\n", "allows no tunnel to 127.0.0.1:1: HTTP 403 Forbidden"),
        ("http", "http", b"HTTP/1.0 405\r\n\r\n", "allows no tunnel to 127.0.0.1:1: HTTP 405"),
        ("http", "http", b"HTTP/1.1 401 Unauthorized\r\n\r\n", "wants a user and a password: HTTP 401"),
        ("http", "http", b"HTTP/1.1 403 \x1b[31m\r\n\r\n", "HTTP 403 ?[31m;"),
        ("http", "http", b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer as an HTTP proxy does"),
        ("http", "http", b"\x05\xff", "is it a SOCKS proxy?"),
        ("http", "http", b"", "closed the connection before a tunnel to 127.0.0.1:1 was open"),
        ("http", "http", b"HTTP/1.1 200 OK\r\n", "closed the connection"),
        ("http", "http", b"HTTP/1.1 200 OK\r\nA: " + b"a" * HEAD_LIMIT_BYTES, "more than 16384 bytes of headers"),
        ("http", "http", b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 101 X\r\n\r\n", "unexpected bytes after its response"),
        ("http", "http", b"HTTP/1.1 100 Continue\r\n\r\n", "allows no tunnel"),
        ("socks5", "socks5h", b"\x05\x02\x00\x01" + bytes(6), "allows no tunnel to 127.0.0.1:1: not allowed by its"),
        ("socks5", "socks5h", b"\x05\xf6\x00\x01" + bytes(6), "cannot reach 127.0.0.1:1: no valid onion address"),
        ("socks5", "socks5h", b"\x05\x99", "cannot reach 127.0.0.1:1: reply 0x99"),
        ("socks5", "socks5h", b"\x05\x00\x00\x07", "an address of unknown type 7"),
        ("socks5", "socks5h", b"\x05\x00\x00\x01" + bytes(5), "closed the connection"),
        ("socks5", "socks5h", b"\x05\x00\x00\x01" + bytes(7), "unexpected bytes after its response"),
        ("socks5", "socks5h", b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it an HTTP proxy?"),
        ("socks5", "socks5h", b"", "closed the connection"),
    ],
)
async def test_every_other_answer_is_an_error_that_names_the_proxy(
    kind: str, scheme: str, answer: bytes, says: str
) -> None:
    async with stand_in(kind) as proxy:
        proxy.says = answer
        lost, detail, error = await failures(settings("ws://127.0.0.1:1", proxy.url(scheme)))
    assert (lost.reason, error.reason) == (LossReason.PROXY, RestFailure.PROXY)
    assert says in detail
    assert says in str(error)
    assert detail.startswith(f"the proxy 127.0.0.1:{proxy.port} (upstream.proxy) ")


async def test_a_proxy_that_is_not_there_is_named() -> None:
    async with stand_in("http") as gone:
        pass
    lost, detail, error = await failures(settings("ws://127.0.0.1:1", gone.url("socks5h", LOGIN_QUOTED)))
    assert lost.reason is LossReason.PROXY
    assert f"the proxy 127.0.0.1:{gone.port} (upstream.proxy) cannot be reached: Connection refused" in detail
    assert error.reason is RestFailure.PROXY


@pytest.mark.slow
async def test_a_proxy_without_tls_is_named() -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        _, detail, error = await failures(settings("ws://127.0.0.1:1", f"https://127.0.0.1:{port}"))
    assert "cannot be reached by TLS: " in detail
    assert "cannot be reached by TLS: " in str(error)


async def test_a_certificate_of_the_backend_is_checked_through_the_tunnel(
    certificate: tuple[Path, Path, ssl.SSLContext],
) -> None:
    chain, key, _ = certificate
    untrusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    untrusted.load_cert_chain(chain, key)
    async with backend(untrusted) as port, stand_in("http") as proxy:
        lost, detail, error = await failures(settings(f"wss://localhost:{port}", proxy.url("http")))
    assert lost.reason is LossReason.TLS
    assert "the certificate is not accepted" in detail
    assert error.reason is RestFailure.TLS


async def test_a_proxy_that_keeps_silent_is_named_when_time_is_up() -> None:
    released = asyncio.Event()

    async def wait(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    async with await asyncio.start_server(wait, "127.0.0.1", 0) as server:
        proxy = f"socks5h://{LOGIN_QUOTED}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        lost, detail, error = await failures(
            settings("ws://127.0.0.1:1", proxy, connect_timeout=0.05, rest_timeout=0.05)
        )
        released.set()
    assert (lost.reason, error.reason) == (LossReason.TIMEOUT, RestFailure.TIMEOUT)
    for text in (detail, str(error)):
        assert "through the proxy socks5h://127.0.0.1:" in text
        assert "(upstream.proxy); is it one that speaks socks5h?" in text


async def test_a_name_that_socks5_cannot_resolve_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in("socks5") as proxy:
        tunnel = Tunnel(Proxy.parse(proxy.url("socks5")))
        # Too long for a label: fails without asking anybody.
        target = Target(f"{'a' * 64}.invalid", 80, "upstream.url")
        with pytest.raises(ProxyError, match=r"\(upstream\.url\) cannot be resolved here.*socks5h://") as caught:
            await tunnel.open(asyncio.Protocol, target, None)
    assert caught.value.fault is ProxyFault.TARGET
    assert proxy.asked == []


async def test_an_attempt_that_is_cancelled_leaves_no_connection() -> None:
    ended, arrived = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        with suppress(ConnectionResetError):
            await reader.read()
        ended.set()
        writer.close()

    async with await asyncio.start_server(wait, "127.0.0.1", 0) as server:
        tunnel = Tunnel(Proxy("http", "127.0.0.1", server.sockets[0].getsockname()[1]))
        opening = asyncio.create_task(tunnel.open(asyncio.Protocol, Target("host", 1, "upstream.url"), None))
        await arrived.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        async with asyncio.timeout(5):
            await ended.wait()


def test_an_ipv6_target_is_written_in_brackets_and_sent_as_an_address() -> None:
    target = Target("2001:db8::1", 8999, "upstream.url")
    assert str(target) == "[2001:db8::1]:8999"
    assert Proxy.parse("socks5://[::1]").place == "[::1]:1080"


# --- configuration ---


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("proxy: socks4://127.0.0.1:9050", "upstream.proxy: found 'socks4://127.0.0.1:9050', expected http://"),
        ("proxy: 'http://127.0.0.1:3128/path'", "expected no path after host and port"),
        ("proxy: 'socks5h://alice@127.0.0.1:9050'", "a user and a password of 1 to 255 bytes each"),
        (f"proxy: 'socks5h://alice:{'p' * 256}@127.0.0.1:9050'", "a user and a password of 1 to 255 bytes each"),
        (f"url: 'ws://{ONION}/api/v1/ws'", r"upstream.url: a .onion name cannot be resolved on this machine"),
        (
            f"{{url: 'ws://{ONION}', proxy: 'socks5://127.0.0.1:9050'}}",
            "set upstream.proxy to socks5h://127.0.0.1:9050",
        ),
        (f"{{rest_url: 'http://{ONION}.'}}", "upstream.rest_url: a .onion name"),
    ],
)
def test_a_proxy_that_cannot_work_is_refused_at_the_start(keys: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"upstream: {{{keys.strip('{}')}}}", source="", environ={}, flags={})
    assert says in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "socks5h"])
def test_an_onion_behind_a_proxy_that_resolves_is_accepted(scheme: str) -> None:
    text = f"upstream: {{url: 'ws://{ONION}', proxy: '{scheme}://{LOGIN_QUOTED}@127.0.0.1:9050'}}"
    loaded = parse(text, source="", environ={}, flags={})
    assert Proxy.parse(loaded.config.upstream.proxy or "").login == LOGIN


def test_an_onion_behind_a_unix_socket_is_only_a_name() -> None:
    parse(f"upstream: {{url: 'ws://{ONION}', unix_socket: /run/x.sock}}", source="", environ={}, flags={})
