"""What a broken, hostile or unlucky client can do to the gateway: nothing to others, and nothing for long."""

import asyncio
import base64
import contextlib
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request

from kit.backfill import Clock
from kit.gateway import Rig, ask, closed_with, offsets, receive, receive_type, running_gateway, stuffed_client, until
from kit.raw import CLOSE, CONTINUATION, PING, PONG, TEXT, masked, raw, request
from kit.tokens import Tokens
from kit.whales import alert_draft
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.tokens import verify
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.gateway import listener
from whaled.gateway.admission import TURNED_AWAY, source
from whaled.gateway.commands import MessageType
from whaled.gateway.connection import Connection
from whaled.gateway.handshake import CREDENTIAL_PARAMETERS, Server, has_credential
from whaled.gateway.phase import Phase
from whaled.model import UpstreamState

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _nothing_escapes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The event loop logs what a callback raised, and writes into a lost connection: neither may happen here."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert [record.getMessage() for record in records if record.name == "asyncio"] == []


async def told(value: Callable[[], T | None]) -> T:
    """What `value` returns, once it is something."""
    await until(lambda: value() is not None)
    found = value()
    assert found is not None
    return found


# --- a client that stops sending -------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_client_that_half_closes_with_bytes_unsent_disturbs_no_publication(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=10_000_000, close_timeout=0.2) as rig:
        stuck = stuffed_client(rig)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            (connection,) = rig.gateway.roster.all()
            count = 0
            while not connection.unsent:
                await rig.alerts(*range(count, count + 200))
                count += 200
            stuck.shutdown(socket.SHUT_WR)
            await until(lambda: connection.phase is Phase.CLOSING)
            async with rig.connect() as other:
                await receive_type(other, "status")
                await rig.alerts(count)
                assert await offsets(other, 1) == [count + 1]
                await until(lambda: rig.gateway.connections == 1)
            assert rig.value("whaled_connections_closed_total", code="1006") == 1
        finally:
            stuck.close()


async def test_a_publication_in_the_moment_of_a_half_close_is_disturbed_neither(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request()) as client:
        await client.told("status")
        (connection,) = rig.gateway.roster.all()
        events = await rig.log.append([alert_draft(1)])
        connection.eof_received()  # what asyncio calls; connection_lost follows in the next turn of the loop only
        rig.gateway.publish(events)
        connection.keepalive(1.0)
        rig.gateway.publish_upstream_state(UpstreamState.CONNECTED)
        await client.rest()
        connection.abort()
        await until(lambda: not rig.gateway.connections)


async def test_writes_to_a_connection_just_lost_are_not_logged_each_time(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request()) as client:
        await client.told("status")
        (connection,) = rig.gateway.roster.all()
        connection.abort()
        for _ in range(20):  # the answers to what it had asked, and slices of a batch
            connection.outbox.write(b"\x81\x00")
            assert connection.outbox.write_behind(b"\x81\x00")
        await until(lambda: not rig.gateway.connections)


# --- handshakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["//[", "http://[x/?token=1", "/?%ff=%ff&token", "/?token=x"])
async def test_no_path_raises(tmp_path: Path, path: str) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request(path)) as client:
        assert await client.status() == (400 if "token=" in path else 101)


async def test_two_authorization_headers_raise_nothing(tmp_path: Path) -> None:
    first = request("/", "Authorization: Bearer bad", "Authorization: Bearer good")
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig, raw(rig, first) as client:
        assert await client.status() == 101
        assert (await client.told("error"))["message"] == "Invalid or expired token"


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_frames_right_behind_the_request_wait_for_its_answer(tmp_path: Path, size: int) -> None:
    data = request() + masked(PING, b"hi") + masked(TEXT, b'{"type":"ping","id":1}')
    async with running_gateway(tmp_path) as rig, raw(rig) as client:
        for start in range(0, len(data), size):
            client.send(data[start : start + size])
            await client.writer.drain()
        assert await client.status() == 101
        await client.told("status")
        assert {(await client.frame())[0], (await client.frame())[0]} == {PONG, TEXT}


@pytest.mark.parametrize(("behind", "code"), [(masked(CLOSE, b"\x03\xe8"), 1000), (b"\x81\x01a", 1002)])
async def test_an_end_right_behind_the_request_is_answered(tmp_path: Path, behind: bytes, code: int) -> None:
    async with running_gateway(tmp_path, close_timeout=0.1) as rig, raw(rig, request() + behind) as client:
        assert await client.status() == 101
        assert (await client.closed())[0] == code
        await client.rest()
        await until(lambda: rig.value("whaled_connections_closed_total", code=str(code)) == 1)


async def test_the_bytes_of_a_request_are_bounded(tmp_path: Path) -> None:
    headers = [f"X-{number}: {'x' * 8000}" for number in range(100)]
    async with running_gateway(tmp_path, close_timeout=0.1) as rig, raw(rig, request("/", *headers)) as client:
        assert await client.status() == 431
        await client.rest()
        await until(lambda: rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "headers", "status", "told"),
    [
        ("/?" + "a" * 2046, (), 101, b""),
        ("/?" + "%41=%41&" * 1000, (), 414, b"the path and query have more than 2048 bytes"),
        ("/" + "a" * 2048, (), 414, b"the path and query have more than 2048 bytes"),
        ("/", ("Sec-WebSocket-Protocol: " + "a," * 49 + "whaled.v1",), 101, b""),
        ("/", ("Sec-WebSocket-Protocol: " + "a," * 4000 + "a",), 400, b"Sec-WebSocket-Protocol has more than 50 items"),
        ("/", ("Connection: " + "a," * 4000 + "a",), 400, b"Connection has more than 50 items"),
        ("/" + "a" * 9_000, (), 414, b"the path and query have more than 2048 bytes"),
        ("/" + "a" * 20_000, (), 414, b"the path and query have more than 2048 bytes"),
        ("/", ("Authorization: Bearer " + "a" * 8_192,), 101, b""),
        ("/", ("Sec-WebSocket-Protocol: whaled.v1, bearer." + "a" * 8_192,), 101, b""),
        ("/", ("Cookie: " + "a" * 9_216,), 101, b""),
        ("/", ("Cookie: " + "a" * 17_000,), 431, b"the request has more than 16384 bytes"),
        ("/", ("X: y",) * 123, 101, b""),
        ("/", ("X: y",) * 124, 431, b"the request has more than 128 headers"),
        ("/", ("X: y",) * 200, 431, b"the request has more than 128 headers"),
        ("/", ("Upgrade: a/b",) * 50, 400, b"Upgrade has more than 50 items"),
        ("/", ("Sec-WebSocket-Extensions: a" + ";b" * 4000,), 400, b"Sec-WebSocket-Extensions has more than 50 items"),
    ],
)
async def test_a_request_that_takes_long_to_read_is_refused_with_a_reason(
    tmp_path: Path, path: str, headers: tuple[str, ...], status: int, told: bytes
) -> None:
    async with running_gateway(tmp_path, close_timeout=0.1) as rig, raw(rig, request(path, *headers)) as client:
        assert await client.status() == status
        if told:
            assert told in await client.rest()
            await until(lambda: rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1)


@pytest.mark.parametrize("name", CREDENTIAL_PARAMETERS)
def test_a_credential_in_a_url_is_recognised_however_its_name_is_written(name: str) -> None:
    lower, upper = ("".join(f"%{ord(letter):02x}" for letter in form) for form in (name, name.upper()))
    for written in (name, name.upper(), name.title(), f"%{ord(name[0]):02X}{name[1:]}", lower, upper):
        assert has_credential(f"/?{written}=x")
        assert has_credential(f"/alerts?a=1&b&{written}=x&c=2")
        for harmless in (f"/{written}=x", f"/?{written}", f"/?{written}=", f"/?{written}=&a=1", f"/?x{written}=x"):
            assert not has_credential(harmless)
        assert not has_credential(f"/?a={written}")
        assert not has_credential(f"/?{written}s=x")


@given(st.text(st.sampled_from("tokenTOKEN%7465b&=?+_;jw"), max_size=40))
def test_a_query_is_searched_as_if_it_were_parsed(query: str) -> None:
    parsed = {key.lower() for key in parse_qs(query.partition("?")[2])}
    assert has_credential(query) is not parsed.isdisjoint(CREDENTIAL_PARAMETERS)


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\n\n", b"\r\n\r\n", b"\0" * 9000]
)
async def test_bytes_that_are_no_request_are_closed_and_counted(tmp_path: Path, garbage: bytes) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, garbage) as client:
        client.writer.write_eof()
        await client.rest()
        await until(lambda: rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1)
        assert rig.gateway.connections == 0


async def test_messages_sent_while_the_loop_was_blocked_close_no_client_within_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, loop = Clock(), asyncio.get_running_loop()
    limits: dict[str, Any] = {"messages_per_second": 10.0, "message_burst": 5, "client_messages_per_second": 10.0}
    async with running_gateway(
        tmp_path, clock=clock, authenticator=Tokens(expires_at=4e9), client_message_burst=5, **limits
    ) as rig, raw(rig, request("/", "Authorization: Bearer good")) as client:  # fmt: skip
        await client.told("welcome")
        time_of_loop = loop.time
        clock.ahead_s = 12.0
        monkeypatch.setattr(loop, "time", lambda: time_of_loop() + 12.0)
        client.send(masked(TEXT, b'{"type":"ping"}') * 96)
        for _ in range(96):
            await client.told("pong")
        assert rig.value("whaled_messages_limited_total", limit="connection") == 0
        assert rig.value("whaled_messages_limited_total", limit="client") == 0
        client.send(masked(TEXT, b'{"type":"ping"}') * 60)
        assert (await client.closed())[0] == 1008


async def test_refused_clients_that_send_nothing_use_few_descriptors(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_connections=1) as rig, rig.connect() as first:
        await receive(first)
        host, port = rig.url.removeprefix("ws://").split(":")
        sockets = []
        try:
            for _ in range(TURNED_AWAY + 50):
                sockets.append(socket.create_connection((host, int(port))))
                await asyncio.sleep(0)
            await until(lambda: rig.value("whaled_connections_refused_total", reason="global_cap") == 50)
        finally:
            for sock in sockets:
                sock.close()
        await until(lambda: rig.gateway.connections == 1)
        async with raw(rig, request()) as late:
            assert await late.status() == 503


# --- odd frames and requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81\xfe\x00\x02" + bytes(4) + b"{}",
        b"\x89\xfe\x00\x7d" + bytes(4 + 125),
        b"\x81\xff\x00\x00\x00\x00\x00\x00\x00\x02" + bytes(4) + b"{}",
        b"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff" + bytes(4),
    ],
)
async def test_a_length_in_more_bytes_than_it_needs_breaks_the_protocol(tmp_path: Path, frame: bytes) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request(), masked(TEXT, b'{"type":"ping"}'), frame) as client:
        await client.told("pong")
        assert (await client.closed())[0] == 1002


@pytest.mark.parametrize("size", [125, 126, 127, 4000])
async def test_a_length_in_as_many_bytes_as_it_needs_is_read(tmp_path: Path, size: int) -> None:
    message = b'{"type":"ping"' + b" " * (size - 15) + b"}"
    async with running_gateway(tmp_path) as rig, raw(rig, request(), masked(TEXT, message) * 2) as client:
        await client.told("pong")
        await client.told("pong")


@pytest.mark.parametrize("parts", [[b"\xff"], [b'{"type":"ping\xc3', b'"}'], [b'{"type":"\xed\xa0\x80"}']])
async def test_text_that_is_not_utf_8_ends_the_connection(tmp_path: Path, parts: list[bytes]) -> None:
    frames = [
        masked(TEXT if number == 0 else CONTINUATION, part, fin=number == len(parts) - 1)
        for number, part in enumerate(parts)
    ]
    async with running_gateway(tmp_path) as rig, raw(rig, request(), *frames) as client:
        assert await client.closed() == (1007, "Text is not UTF-8")


async def test_a_request_has_one_host(tmp_path: Path) -> None:
    for line in (b"Host: x\r\n", b""):
        wrong = request("/", "Host: y") if line else request().replace(b"Host: x\r\n", b"")
        async with running_gateway(tmp_path) as rig, raw(rig, wrong) as client:
            assert await client.status() == 400


async def test_another_websocket_version_is_refused_with_the_supported_one(tmp_path: Path) -> None:
    wrong = request().replace(b"Version: 13", b"Version: 8")
    async with running_gateway(tmp_path) as rig, raw(rig, wrong) as client:
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 426 ")
        assert b"Sec-WebSocket-Version: 13\r\n" in answer


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/healthz", "/healthz?probe=1"])
async def test_health_checks_are_answered(tmp_path: Path, method: str, path: str) -> None:
    async with running_gateway(tmp_path) as rig:
        async with raw(rig, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as client:
            answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"\r\n\r\n") is (method == "HEAD")
        await until(lambda: rig.value("whaled_connections_refused_total", reason="no_upgrade") == 1)


@pytest.mark.parametrize("offer", ["h2c", "h2c, TLS/1.0", "", "H2C\r\nUpgrade: foo"])
async def test_an_upgrade_to_something_else_is_ignored(tmp_path: Path, offer: str) -> None:
    headers = f"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {offer}\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    for path, status in (("/", 200), ("/healthz", 200), ("/other", 426)):
        async with (
            running_gateway(tmp_path) as rig,
            raw(rig, f"GET {path} HTTP/1.1\r\n{headers}".encode()) as client,
        ):
            assert await client.status() == status


@pytest.mark.parametrize("offer", ["h2c, websocket", "WebSocket", "websocket\r\nUpgrade: h2c", "websocket,"])
async def test_of_several_upgrades_that_to_a_websocket_is_taken(tmp_path: Path, offer: str) -> None:
    first = request().replace(b"Upgrade: websocket", f"Upgrade: {offer}".encode())
    async with running_gateway(tmp_path) as rig, raw(rig, first) as client:
        assert await client.status() == 101


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET / HTTP/1.1\nHost: x\n\n"],
        [b"GET / HTTP/1.1\r\nHost: x\n"],
        [b"GET / HTTP/1.1\r\nHost: x\r\n", b"\n"],
        [b"GET / HTTP/1.1", b"\n"],
        [request().replace(b"Host: x\r\n", b"Host: x\n")],
        [b"\n"],
    ],
)
async def test_a_line_without_cr_is_answered_at_once(tmp_path: Path, parts: list[bytes]) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig) as client:
        for part in parts:
            client.send(part)
            await client.writer.drain()
            await asyncio.sleep(0)
        assert b"ends with LF alone" in await client.rest()
        await until(lambda: rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100_000])
async def test_a_line_feed_after_the_request_or_a_cr_before_it_is_accepted(tmp_path: Path, size: int) -> None:
    data = request() + masked(TEXT, b'{"type":"ping",\n"id":1}')
    async with running_gateway(tmp_path) as rig, raw(rig) as client:
        for start in range(0, len(data), size):
            client.send(data[start : start + size])
            await client.writer.drain()
            await asyncio.sleep(0)
        await client.told("pong")


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"GET\r\n\r\n"])
async def test_an_invalid_request_is_answered_with_400(tmp_path: Path, garbage: bytes) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, garbage) as client:
        assert await client.status() == 400
        await until(lambda: rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1)


# --- strangers and newcomers -----------------------------------------------------------------------------------------


def silent(rig: Rig, count: int, *addresses: str) -> list[socket.socket]:
    """Connections that send nothing, from these addresses in turn."""
    host, port = rig.url.removeprefix("ws://").split(":")
    return [
        socket.create_connection((host, int(port)), source_address=(addresses[number % len(addresses)], 0))
        for number in range(count)
    ]


@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.1.77", "127.0.200.1"])
async def test_a_new_client_with_a_token_is_admitted_during_a_flood_of_connections(tmp_path: Path, own: str) -> None:
    addresses = [f"127.0.1.{number}" for number in range(1, 9)]
    async with running_gateway(
        tmp_path, authenticator=Tokens(expires_at=4e9), max_unauthenticated=20, max_connections_per_address=20
    ) as rig:
        flood: list[socket.socket] = []
        try:
            for _ in range(10):
                flood += silent(rig, 30, *addresses, own)
                async with (
                    asyncio.timeout(10),
                    rig.connect(additional_headers={"Authorization": "Bearer good"}, local_addr=(own, 0)) as client,
                ):
                    await receive_type(client, "welcome")
                assert rig.gateway.roster.unauthenticated <= 20
            await until(lambda: rig.value("whaled_connections_refused_total", reason="displaced") >= 250)
        finally:
            for sock in flood:
                sock.close()
        await until(lambda: not rig.gateway.connections)


async def test_unauthenticated_connections_displace_no_client_and_the_busiest_network_displaces_itself(
    tmp_path: Path,
) -> None:
    async with (
        running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), max_unauthenticated=5) as rig,
        rig.connect(additional_headers={"Authorization": "Bearer good"}) as client,
    ):
        await receive_type(client, "welcome")
        patient = silent(rig, 1, "127.0.2.1")
        flood = silent(rig, 50, "127.0.1.1", "127.0.1.2")
        await until(lambda: rig.value("whaled_connections_refused_total", reason="displaced") == 46)
        patient[0].settimeout(0.01)
        with pytest.raises(TimeoutError):  # it is still there
            patient[0].recv(1)
        await rig.alerts(1)
        await receive_type(client, "whale_alert")
        for sock in patient + flood:
            sock.close()


async def test_while_more_connect_than_can_be_accepted_networks_that_fail_are_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "BEHIND_S", 0.0)  # behind as soon as the queue is not empty
    async with running_gateway(
        tmp_path, authenticator=Tokens(expires_at=4e9), max_unauthenticated=5, max_failed_connects=2
    ) as rig:
        flood = silent(rig, 300, "127.0.1.1", "127.0.1.2")
        async with (
            asyncio.timeout(10),
            rig.connect(additional_headers={"Authorization": "Bearer good"}, local_addr=("127.0.9.1", 0)) as client,
        ):
            await receive_type(client, "welcome")
        assert rig.value("whaled_connections_refused_total", reason="connect_rate") >= 250
        with pytest.raises(ConnectionResetError):
            flood[200].recv(1)
        for sock in flood:
            sock.close()


async def test_a_flood_is_known_by_its_connections_although_none_of_them_is_ever_read(tmp_path: Path) -> None:
    """Newcomers of other networks take their places first."""
    async with running_gateway(
        tmp_path, authenticator=Tokens(expires_at=4e9), max_unauthenticated=1, max_failed_connects=1
    ) as rig:
        flood: list[socket.socket] = []
        for number in range(8):
            mine, theirs = socket.socketpair()
            flood.append(mine)
            mine.send(request())
            rig.gateway.arrive(theirs, f"192.0.{number % 2}.{number}")
            with rig.gateway.share.hold():  # nothing is read meanwhile
                for _ in range(3):
                    await asyncio.sleep(0)
        assert all(rig.gateway.roster.admission.is_flood(source(f"192.0.{network}.99"), 60.0) for network in (0, 1))
        assert rig.value("whaled_connections_refused_total", reason="displaced") == 7
        for sock in flood:
            sock.close()


async def test_nothing_of_a_connection_waits_for_the_collector(tmp_path: Path) -> None:
    """The client leaves, in good order or not, in mid-handshake, is refused, sends rubbish, breaks a rule."""
    async with running_gateway(tmp_path) as rig:
        gc.collect()
        gc.disable()
        try:
            wrong = request("/", "Origin: null"), request("/?token=x"), b"rubbish\r\n\r\n", request() + masked(3)
            for sent in (request(), request() + masked(CLOSE), *wrong):
                async with raw(rig, sent) as client:
                    await client.reader.read(1)
            async with raw(rig, request()[:50]):
                pass
            await until(lambda: not rig.gateway.connections)
            await asyncio.sleep(0)
            kept = [found for found in gc.get_objects() if isinstance(found, Connection | Server | Request)]
        finally:
            gc.enable()
        assert kept == []


# --- floods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ping", "pong", "fragment", "empty text"])
async def test_a_flood_of_small_frames_is_ended_without_holding_up_others(tmp_path: Path, name: str) -> None:
    unit = {
        "ping": masked(PING),
        "pong": masked(PONG),
        "fragment": masked(CONTINUATION, fin=False),
        "empty text": masked(TEXT),
    }[name]
    first = masked(TEXT, fin=False) if name == "fragment" else b""
    async with running_gateway(tmp_path) as rig, raw(rig, request(), first, unit * 43_000) as client:
        assert await client.closed() == (1008, "Rate limit exceeded")


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_flood_before_authentication_is_closed(tmp_path: Path, opcode: int) -> None:
    async with (
        running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig,
        raw(rig, request(), masked(opcode) * 1000) as client,
    ):
        assert await client.status() == 101
        assert (await client.told("error"))["message"] == "Rate limit exceeded"
        assert await client.closed() == (1008, "Authentication required")


async def test_messages_after_the_close_are_not_read_indefinitely(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, close_timeout=0.3) as rig, raw(rig, request(), masked(TEXT) * 100) as client:
        assert (await client.closed())[0] == 1008
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                while True:
                    client.send(masked(TEXT) * 40_000)
                    await client.writer.drain()
        assert 0 < sum(rig.value("whaled_messages_received_total", type=kind) for kind in MessageType) < 200
        await until(lambda: not rig.gateway.connections)


async def test_a_closed_connection_keeps_its_timer_and_is_not_counted_in(tmp_path: Path) -> None:
    """One that is too slow in the moment it authenticates."""
    async with running_gateway(
        tmp_path, authenticator=Tokens(expires_at=4e9), max_unsent=1, close_timeout=0.1,
    ) as rig:  # fmt: skip
        stuck = stuffed_client(rig)
        stuck.setblocking(False)
        try:
            await until(lambda: rig.gateway.connections == 1)
            (connection,) = rig.gateway.roster.all()
            session = await told(lambda: connection.session)
            # Unsent bytes without a close: what is written past the bound that `write` keeps.
            connection.outbox.write_rest(bytes(8_000_000))
            await until(lambda: connection.unsent > 0)
            connection.perform(session.received(b'{"type":"auth","token":"good"}', rig.gateway.now()))
            await until(lambda: not rig.gateway.connections)
            assert (rig.gateway.roster.authenticated, rig.gateway.roster.unauthenticated) == (0, 0)
            assert rig.gateway.hub.live_members == 0
        finally:
            stuck.close()


# --- frames in odd orders --------------------------------------------------------------------------------------------


async def test_a_ping_between_fragments_is_answered_and_the_message_too(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request()) as client:
        await client.told("status")
        client.send(masked(TEXT, b'{"type":"pi', fin=False) + masked(PING, b"x") + masked(CONTINUATION, b'ng","id":9}'))
        frames = [await client.frame() for _ in range(2)]
        assert (PONG, b"x") in frames
        assert [json.loads(body)["id"] for opcode, body in frames if opcode == TEXT] == [9]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x02{}", 1002),  # not masked
        (b"\xc1\x80\0\0\0\0", 1002),  # compressed, which was not agreed
        (masked(CONTINUATION, b"x"), 1002),
        (masked(TEXT, b"x", fin=False) + masked(TEXT, b"y"), 1002),
        (masked(TEXT, b"x", fin=False) + masked(CLOSE, b"\x03\xe8"), 1002),
        (masked(CLOSE, b"\x03"), 1002),
        (masked(PING, b"x" * 126), 1002),
        (b"\x81\xff" + b"\x7f" + b"\xff" * 7 + bytes(4), 1009),
        (masked(TEXT, b"x" * 10_000, fin=False) + masked(CONTINUATION, b"x" * 10_000), 1009),
    ],
)
async def test_a_frame_that_breaks_the_rules_ends_the_connection_with_its_code(
    tmp_path: Path, data: bytes, code: int
) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request()) as client:
        await client.told("status")
        client.send(data + masked(TEXT, b'{"type":"ping"}'))
        assert (await client.closed())[0] == code
        assert await client.rest() == b""
        client.writer.close()
        await until(lambda: rig.value("whaled_connections_closed_total", code=str(code)) == 1)


async def test_messages_after_a_clients_close_are_not_answered(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, request()) as client:
        await client.told("status")
        client.send(masked(CLOSE, b"\x03\xe8") + masked(TEXT, b'{"type":"ping"}') * 5)
        assert await client.frame() == (CLOSE, b"\x03\xe8")
        assert await client.rest() == b""


# --- a lagging client -----------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_lagging_client_receives_the_state_change_it_had_no_room_for(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=2_000, slow_timeout=20.0) as rig:
        rig.gateway.publish_upstream_state(UpstreamState.CONNECTED)
        stuck = stuffed_client(rig)
        stuck.setblocking(False)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            count = 0
            (connection,) = rig.gateway.roster.all()
            while connection.unsent == 0 and rig.gateway.hub.live_members:
                await rig.alerts(count, count + 1)
                count += 2
            state = UpstreamState.CONNECTED
            while rig.gateway.hub.live_members:
                state = UpstreamState.DEGRADED if state is UpstreamState.CONNECTED else UpstreamState.CONNECTED
                rig.gateway.publish_upstream_state(state)
            loop, seen = asyncio.get_running_loop(), bytearray()
            async with asyncio.timeout(20):
                while rig.gateway.subscriptions.replaying:
                    seen += await loop.sock_recv(stuck, 65536)
                while (last := seen.rfind(b'"upstream":')) < 0 or f'"{state}"'.encode() not in seen[last : last + 40]:
                    seen += await loop.sock_recv(stuck, 65536)
        finally:
            stuck.close()


async def test_a_batch_larger_than_the_bound_does_not_close_the_connection(tmp_path: Path) -> None:
    """Many whales in one message of the backend, and a client that says something just then."""
    async with running_gateway(tmp_path, max_unsent=20_000, slow_timeout=20.0) as rig:
        stuck = stuffed_client(rig)
        stuck.setblocking(False)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            (connection,) = rig.gateway.roster.all()
            count = 6_000
            await rig.alerts(*range(count))
            assert connection.unsent <= 20_000
            stuck.send(masked(TEXT, b'{"type":"ping","id":7}'))
            loop, seen = asyncio.get_running_loop(), bytearray()
            async with asyncio.timeout(20):
                while b'"offset":%d}' % count not in seen[-4000:] or b'"id":7' not in seen:
                    data = await loop.sock_recv(stuck, 65536)
                    assert data
                    seen += data
            found = [int(part.split(b"}")[0]) for part in bytes(seen).split(b'"offset":')[2:]]
            assert found == list(range(1, count + 1))
            assert rig.value("whaled_clients_lagged_total") == 1
        finally:
            stuck.close()


async def test_a_position_goes_out_when_the_last_events_of_a_batch_did_not_match(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, position_interval=0.05) as rig, rig.connect() as client:
        await ask(client, type="subscribe", filters={"min_btc": 200})
        await receive_type(client, "subscribed")
        await rig.publish(alert_draft(1, 250.0), alert_draft(2, 150.0))
        assert await offsets(client, 1) == [1]
        assert (await receive_type(client, "position"))["position"]["offset"] == 2


# --- replay, interrupted ---------------------------------------------------------------------------------------------


async def test_commands_during_a_replay_neither_lose_nor_repeat_an_event(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, replay_page=5, message_burst=10_000) as rig:
        await rig.alerts(*range(1, 101))
        async with rig.connect(max_queue=None) as client:
            for start in (0, 50, 20):
                await ask(client, type="subscribe", since={"epoch": rig.log.epoch, "offset": start})
            await ask(client, type="unsubscribe")
            await ask(client, type="subscribe", since={"time": "2000-01-01T00:00:00Z"})
            await ask(client, type="subscribe", since={"last": 90})
            publishing = asyncio.create_task(rig.alerts(*range(101, 121)))
            runs: list[list[int]] = []
            while not runs or not runs[-1] or runs[-1][-1] != 120:
                frame = await receive(client)
                if frame["type"] == "subscribed":
                    runs.append([])
                elif frame["type"] == "whale_alert":
                    runs[-1].append(frame["position"]["offset"])
            await publishing
            assert runs[-1] == list(range(11, 121))
            for run in runs:
                assert run == list(range(run[0], run[0] + len(run))) if run else True


async def test_a_drain_during_replays_ends_every_client_after_a_complete_frame(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, replay_page=5) as rig:
        await rig.alerts(*range(1, 301))

        async def replayed() -> tuple[int, list[int]]:
            seen = []
            async with rig.connect(max_queue=None) as client:
                await ask(client, type="subscribe", since={"last": 300})
                await receive_type(client, "subscribed")
                ready.release()
                with contextlib.suppress(ConnectionClosed):
                    async for text in client:
                        frame = json.loads(text)
                        if frame["type"] == "whale_alert":
                            seen.append(frame["position"]["offset"])
            return client.close_code or 0, seen

        ready = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            clients = [tasks.create_task(replayed()) for _ in range(20)]
            for _ in clients:
                await ready.acquire()
            await rig.gateway.drain(5.0)
        for client in clients:
            code, seen = client.result()
            assert code == 1012
            assert seen == list(range(1, len(seen) + 1))
        assert (rig.gateway.connections, rig.gateway.subscriptions.replaying, rig.gateway.hub.live_members) == (0, 0, 0)


async def test_a_gateway_that_ends_without_a_drain_closes_with_1001(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        client = await rig.connect()
        await receive_type(client, "status")
    assert await closed_with(client) == (1001, "Server is going away")


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ['{"alg":"HS256","kid":' + "[" * 5000, "[" * 5000, '{"kid":' + "9" * 5000 + "}", "null", "3"]
)
def test_a_token_with_a_monstrous_header_is_malformed(header: str) -> None:
    token = base64.urlsafe_b64encode(header.encode()).rstrip(b"=").decode() + ".e30.AAAA"
    key = SigningKey("k", b"x" * 32)
    with pytest.raises(TokenError) as caught:
        verify(KeyRing(key, (key,)), token, 0.0, AuthSettings())
    assert caught.value.reason in {TokenRefusal.MALFORMED, TokenRefusal.UNKNOWN_KEY}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
async def test_thousands_of_visits_leave_nothing_behind(tmp_path: Path) -> None:
    """Polite ones, rude ones, and ones that never say a word."""
    async with running_gateway(tmp_path, replay_page=10) as rig:
        await rig.alerts(*range(1, 101))
        descriptors = open_descriptors()

        async def visit(number: int) -> None:
            async with raw(rig) as client:
                match number % 6:
                    case 0:
                        client.send(request() + masked(CLOSE, b"\x03\xe8"))
                        await client.rest()
                    case 1:
                        body = b'{"type":"subscribe","since":{"last":100},"filters":{"min_btc":%d}}' % (number % 97)
                        client.send(request() + masked(TEXT, body))
                        await client.told("subscribed")
                    case 2:
                        client.send(request() + b"\xff\xff")
                        await client.rest()
                    case 3:
                        client.send(b"nonsense\r\n\r\n")
                        await client.rest()
                    case 4:
                        client.send(request()[:30])
                    case _:
                        client.send(request())
                        await client.told("welcome")
                        client.writer.transport.abort()

        async def visits(first: int) -> None:
            for number in range(first, first + 400):
                await visit(number)

        async with asyncio.TaskGroup() as tasks:
            for worker in range(15):
                tasks.create_task(visits(worker * 400))
        await until(lambda: not rig.gateway.connections)
        gateway = rig.gateway
        assert (gateway.roster.unauthenticated, gateway.subscriptions.replaying) == (0, 0)
        assert (gateway.hub.live_members, gateway.hub.filter_groups) == (0, 0)
        assert gateway.subscriptions._subscribed == {}
        assert len(asyncio.all_tasks()) < 10
        assert open_descriptors() <= descriptors + 2


async def test_frames_do_not_wait_for_the_acknowledgement_of_those_before(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await receive_type(client, "welcome")
        (connection,) = rig.gateway.roster.all()
        with socket.socket(fileno=os.dup(connection.outbox.fd)) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
