"""What ends a stream: refusals, frames that cannot be understood, other servers, certificates."""

import asyncio
import ssl
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.scripted_server import Peer, alert_frame, jwt, scripted
from kit.streams import at, next_offsets, stream
from kit.tls import context_of
from whaled.client import (
    Disconnected,
    Limits,
    ProtocolError,
    SubscriptionError,
    UnusableServerError,
    WhaleStream,
)

# --- what ends a stream ---


@pytest.mark.parametrize("code", ["invalid_filter", "invalid_position", "forbidden", "a_code_of_tomorrow"])
async def test_a_subscription_that_is_refused_is_raised(code: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("subscribe")
        await peer.say({"type": "error", "code": code, "message": "must be a number", "path": "filters.min_btc"})
        await peer.linger()

    async with scripted(script) as server, stream(server.url, filters={"min_btc": "x"}) as source:
        with pytest.raises(SubscriptionError, match=r"must be a number \(filters.min_btc\)") as caught:
            await anext(source)
        assert (caught.value.code, caught.value.path) == (code, "filters.min_btc")


async def test_a_subscription_over_the_rate_is_tried_again() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("subscribe")
        await peer.say({"type": "error", "code": "rate_limited", "message": "Rate limit exceeded", "retry_after": 0.01})
        await peer.linger()

    async def second(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url) as source:
        assert await next_offsets(source, 1) == [1]


async def test_filters_too_large_for_the_server_raise_a_subscription_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.ws.close(1009, "Message too big")

    async with scripted(script) as server, stream(server.url) as source:
        with pytest.raises(SubscriptionError, match="larger than this server takes"):
            await anext(source)


async def test_a_message_over_the_bound_ends_the_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1, reasons=["x" * 5000]))
        await peer.linger()

    limits = Limits(max_message_bytes=2000)
    async with scripted(script) as server, stream(server.url, limits=limits) as source:
        with pytest.raises(ProtocolError, match="max_message_bytes"):
            await anext(source)


async def test_abuse_is_not_repeated() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.ws.close(1008, "Rate limit exceeded")

    async with scripted(script) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match="too much"):
            await anext(source)


@pytest.mark.parametrize(
    "frame",
    [
        "not json",
        "[]",
        '{"no":"type"}',
        '{"type":"whale_alert","data":{"transaction_id":7,"btc_value":1}}',
        '{"type":"whale_alert","data":{"transaction_id":"a","btc_value":1},"timestamp":"2026-01-01T00:00:00Z"}',
        '{"type":"position","position":{"epoch":"e","offset":-1}}',
        b"\xff\xfe",
        '{"type":"tomorrow","field":' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
async def test_a_frame_that_cannot_be_understood_is_raised_not_skipped(frame: str | bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.ws.send(frame)
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        assert await next_offsets(source, 1) == [1]
        with pytest.raises(ProtocolError, match="is this a whaled server"):
            await anext(source)
        assert source.position == at(1)


@pytest.mark.parametrize("status", [400, 403, 404])
async def test_a_server_that_turns_the_url_away_is_not_pestered(status: int) -> None:
    async with scripted(status=(status, {})) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match=f"HTTP {status}"):
            await anext(source)
        assert server.handshakes == 1


async def test_a_redirect_is_not_followed() -> None:
    async def script(peer: Peer) -> None:
        raise AssertionError("the token would have come here")

    async with (
        scripted(script) as elsewhere,
        scripted(status=(302, {"Location": elsewhere.url})) as server,
        stream(server.url, token=jwt("jwt")) as source,
    ):
        with pytest.raises(UnusableServerError, match="HTTP 302"):
            await anext(source)
        assert elsewhere.handshakes == 0


@asynccontextmanager
async def raw_server(answer: bytes) -> Any:
    """Answers anything with these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.slow
async def test_a_port_that_speaks_another_protocol_is_named() -> None:
    async with raw_server(b"220 smtp ready\r\n") as url, stream(url) as source:
        with pytest.raises(UnusableServerError, match=r"speaks SMTP or FTP, not WebSocket: is the port right\?"):
            await anext(source)


@pytest.mark.slow
async def test_a_port_that_hangs_up_is_tried_again() -> None:
    async with raw_server(b"") as url, stream(url, link_events=True) as source:
        for _ in range(2):
            lost = await anext(source)
            assert isinstance(lost, Disconnected)
            assert "hung up during the handshake" in lost.reason


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:8765", "ws://", "ws://x:99999"])
def test_an_impossible_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="not a WebSocket URL"):
        WhaleStream(url)


# --- TLS ---


async def test_tls_with_a_trusted_certificate(certificate: tuple[Path, Path, ssl.SSLContext]) -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    chain, key, trusting = certificate
    async with (
        scripted(script, tls=context_of(chain, key)) as server,
        stream(server.url, ssl=trusting) as source,
    ):
        assert await next_offsets(source, 1) == [1]


async def test_an_untrusted_certificate_is_refused_by_default(
    certificate: tuple[Path, Path, ssl.SSLContext],
) -> None:
    chain, key, _ = certificate
    async with scripted(tls=context_of(chain, key)) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match=r"certificate of 127.0.0.1:\d+ is not accepted"):
            await anext(source)


def test_a_tls_context_for_an_unencrypted_url_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="wss://"):
        WhaleStream("ws://127.0.0.1:8765", ssl=ssl.create_default_context())
