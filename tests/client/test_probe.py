"""A port at which no stream can open is asked what it is: another service or scheme, or a server with tokens."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kit.gateway import running_gateway
from kit.ports import Talk, answers, ended, linked_stream, lost, port
from kit.scripted_server import Peer, alert_frame, scripted
from kit.tls import Certificate, context_of
from kit.tokens import Tokens
from whaled.client import (
    AuthenticationFailed,
    Connected,
    Disconnected,
    Limits,
    WhaleAlert,
)

QUICK = Limits(open_timeout_s=0.3)


def greets(line: bytes) -> Talk:
    """Says a line first, as SSH and mail servers do, and waits."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line)
        await reader.read(-1)

    return talk


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Reads, and never says a word."""
    await reader.read(-1)


# --- the wrong port, the wrong scheme ---


@pytest.mark.slow
async def test_wss_on_a_port_without_tls_is_named() -> None:
    async with scripted() as server:
        place = server.url.removeprefix("ws://")
        assert await ended(f"wss://{place}") == f"{place}: this port does not speak TLS: use ws://{place}"
    async with port(answers(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as place:
        assert await ended(f"wss://u:s3cret@{place}/x") == f"{place}: this port does not speak TLS: use ws://{place}"


async def test_ws_on_a_port_with_tls_is_named(certificate: Certificate) -> None:
    chain, key, _ = certificate
    async with scripted(tls=context_of(chain, key)) as server:
        place = server.url.removeprefix("wss://")
        assert await ended(f"ws://{place}") == f"{place}: this port speaks TLS: use wss://{place}"


@pytest.mark.slow
async def test_both_are_named_at_the_real_gateway(tmp_path: Path, certificate: Certificate) -> None:
    chain, key, _ = certificate
    async with running_gateway(tmp_path) as rig:
        assert "this port does not speak TLS: use ws://" in await ended(rig.url.replace("ws://", "wss://"))
    (tmp_path / "tls").mkdir()
    async with running_gateway(tmp_path / "tls", tls=context_of(chain, key)) as rig:
        assert "this port speaks TLS: use wss://" in await ended(rig.url.replace("wss://", "ws://"))


@pytest.mark.parametrize("scheme", ["ws", "wss"])
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
        (b"220 mail.example ESMTP\r\n", "SMTP or FTP"),
        (b"* OK ready\r\n", "IMAP"),
        (b"\x00\x01\x1b[2J\xff", "something else ('\\x00\\x01\\x1b[2J\\xff')"),
    ],
)
async def test_a_service_that_greets_is_named(scheme: str, line: bytes, name: str) -> None:
    async with port(greets(line)) as place:
        async with asyncio.timeout(5):  # half of open_timeout_s
            reason = await ended(f"{scheme}://{place}")
    assert reason == f"{place} speaks {name}, not WebSocket: is the port right?"


@pytest.mark.slow
async def test_a_proxy_that_speaks_http_1_0_is_named() -> None:
    async with port(answers(b"HTTP/1.0 400 Bad Request\r\n\r\n")) as place:
        reason = await ended(f"ws://{place}")
    assert reason.startswith(f"{place} speaks HTTP/1.0, which has no WebSocket (a proxy must use HTTP/1.1), not Web")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_a_silent_port_is_named_and_tried_again(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.client.probe.ANSWER_S", 0.2)
    async with port(silent) as place:
        reason = await lost(f"{scheme}://{place}", limits=QUICK)
    assert reason == f"{place} accepts connections and sends nothing within 0.3 s: is it a whaled server?"


async def test_a_stream_that_worked_is_not_ended_by_another_server_at_the_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.ws.close(1012)

    async def never(host: str, port: int) -> Any:
        raise AssertionError("an outage is only waited for")

    async with scripted(script) as server, linked_stream(server.url) as source:
        async for event in source:
            if isinstance(event, WhaleAlert):
                break
        monkeypatch.setattr("whaled.client.probe.listen", never)
        monkeypatch.setattr("whaled.client.probe.speaks_tls", never)
        server.answer_with(404)
        async for event in source:
            if isinstance(event, Disconnected) and "HTTP 404" in event.reason:
                break


# --- no token ---


@pytest.mark.slow
async def test_a_server_that_requires_a_token_is_detected_within_a_second(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running_gateway(tmp_path, authenticator=Tokens()) as rig, linked_stream(rig.url) as source:
        began = loop.time()
        with pytest.raises(
            AuthenticationFailed, match="Token required: this server requires a token, and this stream has none"
        ):
            await anext(source)
        assert loop.time() - began < 1.0
        assert rig.value("whaled_authentications_total", outcome="token_required") == 1


async def test_a_slow_server_without_authentication_is_not_treated_as_one_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("whaled.client.visit.WELCOME_S", 0.01)

    async def script(peer: Peer) -> None:
        assert await peer.hear("auth") == {"type": "auth"}  # it is only asked
        await peer.say({"type": "auth_success", "client_id": None, "permissions": [], "expires_at": None})
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, linked_stream(server.url, link_events=False) as source:
        assert isinstance(await anext(source), WhaleAlert)


async def test_a_server_without_authentication_is_not_probed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, linked_stream(rig.url) as source:
        assert isinstance(await anext(source), Connected)
        assert rig.value("whaled_messages_received_total", type="auth") == 0
