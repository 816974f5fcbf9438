"""The gateway over real sockets, with a client of the `websockets` library on the other side."""

import asyncio
import contextlib
import json
import re
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kit.gateway import (
    Rig,
    ask,
    closed_with,
    offsets,
    receive,
    receive_type,
    running_gateway,
    stuffed_client,
    until,
)
from kit.tokens import Tokens
from kit.whales import alert_draft, confirmed_draft, txid
from whaled.config.sections import AuthSettings
from whaled.model import Grant, Permission, UpstreamState


async def test_a_client_gets_every_alert_from_its_welcome_on(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        assert (await receive(client))["type"] == "welcome"
        assert (await receive(client))["upstream"] == "disconnected"
        await rig.alerts(1, 2)
        first, second = await receive(client), await receive(client)
        assert [first["type"], second["type"]] == ["whale_alert", "whale_alert"]
        assert first["data"]["transaction_id"] == txid(1)
        assert first["data"]["btc_value"] == 150.0
        assert first["position"] == {"epoch": rig.log.epoch, "offset": 1}
        assert second["position"]["offset"] == 2


async def test_any_path_is_accepted(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect("/ws/whales?x=1") as client:
        assert (await receive(client))["type"] == "welcome"


async def test_authentication_by_first_message_header_and_subprotocol(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig:
        async with rig.connect() as client:
            await ask(client, type="auth", token="good")
            assert [(await receive(client))["type"] for _ in range(2)] == ["auth_success", "welcome"]
        async with rig.connect(additional_headers={"Authorization": "Bearer good"}) as client:
            assert [(await receive(client))["type"] for _ in range(2)] == ["auth_success", "welcome"]
        async with rig.connect(subprotocols=["whaled.v1", "bearer.good"]) as client:
            assert client.subprotocol == "whaled.v1"
            assert [(await receive(client))["type"] for _ in range(2)] == ["auth_success", "welcome"]
        assert rig.value("whaled_authentications_total", outcome="success") == 3


async def test_one_client_may_have_so_many_connections_and_others_theirs(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_connections_per_client": 2,
        "client_messages_per_second": 0.001,
        "client_message_burst": 3,
    }
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), **settings) as rig:
        good = {"Authorization": "Bearer good"}
        async with rig.connect(additional_headers=good) as first:
            async with rig.connect(additional_headers=good) as second:
                async with rig.connect(additional_headers=good) as third:
                    error = await receive(third)
                    assert (error["code"], error["retry_after"]) == ("too_many_connections", 30.0)
                    assert await closed_with(third) == (1013, "Too many connections")
                async with rig.connect(additional_headers={"Authorization": "Bearer other"}) as other:
                    assert (await receive(other))["type"] == "auth_success"
                assert rig.value("whaled_connections_refused_total", reason="client_cap") == 1
                assert rig.value("whaled_messages_rejected_total", code="too_many_connections") == 1
                for client in (first, first, second):
                    await ask(client, type="ping")
                    await receive_type(client, "pong")
                await ask(second, type="ping")
                assert (await receive_type(second, "error"))["code"] == "rate_limited"
                assert rig.value("whaled_messages_limited_total", limit="client") == 1
                assert rig.value("whaled_messages_limited_total", limit="connection") == 0
            await second.wait_closed()
            while rig.gateway.connections > 1:  # noqa: ASYNC110 - the gateway learns of it a moment later
                await asyncio.sleep(0)
            async with rig.connect(additional_headers=good) as third:
                assert (await receive(third))["type"] == "auth_success"


async def test_a_wrong_token_is_answered_and_closed_with_1008(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig:
        async with rig.connect() as client:
            await ask(client, type="auth", token="bad")
            error = await receive(client)
            assert (error["type"], error["message"]) == ("error", "Invalid or expired token")
            assert await closed_with(client) == (1008, "Authentication required")
        assert rig.value("whaled_authentications_total", outcome="bad_signature") == 1


async def test_a_client_that_does_not_authenticate_in_time_is_closed(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), auth_timeout=0.05) as rig,
        rig.connect() as client,
    ):
        assert (await receive(client))["message"] == "Authentication timeout"
        assert await closed_with(client) == (1008, "Authentication required")


async def test_nothing_is_delivered_before_authentication(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig, rig.connect() as client:
        await rig.alerts(1)
        await ask(client, type="auth", token="good")
        assert [(await receive(client))["type"] for _ in range(2)] == ["auth_success", "welcome"]
        await rig.alerts(2)
        assert (await receive_type(client, "whale_alert"))["data"]["transaction_id"] == txid(2)


async def test_a_token_in_the_url_is_refused_before_the_upgrade(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig:
        with pytest.raises(InvalidStatus) as caught:
            async with rig.connect("/?token=good"):
                pass
        assert caught.value.response.status_code == 400
        assert rig.value("whaled_connections_refused_total", reason="token_in_url") == 1


async def test_a_browser_is_admitted_only_from_an_allowed_origin(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, origins=("https://good.example", "null")) as rig:
        for origin in ("https://good.example", "HTTPS://Good.example", "null"):
            async with rig.connect(origin=origin) as client:
                assert (await receive(client))["type"] == "welcome"
        with capture_logs() as lines, pytest.raises(InvalidStatus) as caught:
            async with rig.connect(origin="https://evil.example"):
                pass
        assert caught.value.response.status_code == 403
        assert caught.value.response.body == (
            b"pages of https://evil.example may not connect: "
            b"the operator of this whaled can add it to gateway.origins\n"
        )
        assert [line for line in lines if line["event"] == "origin_refused"] == [
            {
                "event": "origin_refused",
                "log_level": "info",
                "address": "127.0.0.1",
                "origin": "https://evil.example",
            }
        ]
        assert rig.value("whaled_connections_refused_total", reason="origin") == 1


async def test_refused_origins_log_few_lines_whatever_clients_send(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        with capture_logs() as lines:
            for origin in ("x" * 5000, "https://\u00e9vil.example", "\x1b[31mred", *["https://evil.example"] * 30):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.url.rpartition(":")[2]))
                writer.write(upgrade(origin))
                answer = await reader.read()
                assert answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))
                assert answer.isascii()
                assert len(answer) < 1000
                writer.close()
        shown = [line for line in lines if line["event"] == "origin_refused"]
        assert 0 < len(shown) <= 2
        assert all(len(line["origin"]) <= 203 and line["origin"].isascii() for line in shown)


def upgrade(origin: str) -> bytes:
    return (
        "GET / HTTP/1.1\r\nHost: whale.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\nOrigin: {origin}\r\n\r\n"
    ).encode()


async def test_a_page_of_the_gateways_host_is_admitted_without_a_configured_origin(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        async with rig.connect(origin=rig.url.replace("ws://", "http://")) as client:  # as websocket-client does
            assert (await receive(client))["type"] == "welcome"
        with pytest.raises(InvalidStatus):
            async with rig.connect(origin="http://127.0.0.1:1"):  # another server of the same machine
                pass


async def test_a_rebound_name_is_admitted_only_if_a_token_is_required(tmp_path: Path) -> None:
    async def answer(rig: Rig, origin: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.url.rpartition(":")[2]))
        writer.write(upgrade(origin))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: ([0-9]+)", head)
        body = await reader.readexactly(int(length[1])) if length is not None else b""
        writer.close()
        return head + body

    async with running_gateway(tmp_path) as rig:
        refused = await answer(rig, "http://whale.example")
        assert refused.startswith(b"HTTP/1.1 403 ")
        assert b"DNS rebinding" in refused
        assert b"gateway.origins" in refused
    async with running_gateway(tmp_path, authenticator=Tokens()) as rig:
        assert (await answer(rig, "http://whale.example")).startswith(b"HTTP/1.1 101 ")
        assert (await answer(rig, "http://other.example")).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("limit", "status"),
    [("max_connections", 503), ("max_connections_per_address", 429)],
)
async def test_a_cap_answers_with_retry_after(tmp_path: Path, limit: str, status: int) -> None:
    settings: dict[str, Any] = {limit: 1}
    async with running_gateway(tmp_path, **settings) as rig:
        async with rig.connect() as client:
            await receive(client)
            with pytest.raises(InvalidStatus) as caught:
                async with rig.connect():
                    pass
            assert caught.value.response.status_code == status
            assert int(caught.value.response.headers["Retry-After"]) > 0
        await until(lambda: not rig.gateway.connections)
        async with rig.connect() as client:  # the place is free again
            assert (await receive(client))["type"] == "welcome"


async def test_filters_select_and_updates_follow_their_alert(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await ask(client, type="subscribe", filters={"min_btc": 200})
        subscribed = await receive_type(client, "subscribed")
        assert subscribed["filters"]["min_btc"] == 200
        assert "recovered" not in subscribed
        await rig.publish(
            alert_draft(1, 100.0), alert_draft(2, 250.0), confirmed_draft(1, 100.0), confirmed_draft(2, 250.0)
        )
        first, second = await receive(client), await receive(client)
        assert (first["type"], first["data"]["transaction_id"]) == ("whale_alert", txid(2))
        assert (second["type"], second["data"]["transaction_id"]) == ("whale_update", txid(2))


async def test_an_alert_names_the_addresses_of_the_filter_that_it_matched(tmp_path: Path) -> None:
    payer, payee, change, stranger = (f"bc1q{letter * 38}" for letter in "pqrz")
    drafts = [alert_draft(1, addresses=(payer, payee, change)), alert_draft(2, addresses=(stranger,))]
    filters = [[change, payer, stranger], [payee]]
    expected = [[(1, [payer, change]), (2, [stranger])], [(1, [payee])]]
    async with (
        running_gateway(tmp_path) as rig,
        rig.connect() as plain,
        rig.connect() as first,
        rig.connect() as second,
    ):
        for client, addresses in zip((first, second), filters, strict=True):
            await ask(client, type="subscribe", filters={"addresses": addresses})
            await receive_type(client, "subscribed")
        await receive_type(plain, "status")
        await rig.publish(*drafts)
        for client, named in zip((first, second), expected, strict=True):
            for offset, addresses in named:
                live = await receive(client)
                assert (live["position"]["offset"], live["matched_addresses"]) == (offset, addresses)
        assert "matched_addresses" not in await receive(plain)
        for client, addresses, named in zip((first, second), filters, expected, strict=True):  # and so does a replay
            await ask(client, type="subscribe", filters={"addresses": addresses}, since={"last": 2})
            for offset, matched in named:
                replayed = await receive_type(client, "whale_alert")
                assert (replayed["position"]["offset"], replayed["matched_addresses"]) == (offset, matched)


async def test_unsubscribe_stops_delivery_until_the_next_subscribe(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await ask(client, type="unsubscribe")
        await receive_type(client, "unsubscribed")
        await rig.alerts(1)
        await ask(client, type="subscribe")
        await receive_type(client, "subscribed")
        await rig.alerts(2)
        assert (await receive(client))["data"]["transaction_id"] == txid(2)


async def test_a_client_that_comes_back_gets_what_it_missed_once_and_in_order(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, replay_page=7) as rig:
        await rig.alerts(*range(1, 41))
        async with rig.connect() as client:
            await ask(client, type="subscribe", since={"epoch": rig.log.epoch, "offset": 10})
            subscribed = await receive_type(client, "subscribed")
            assert subscribed["recovered"] is True
            publishing = asyncio.create_task(rig.alerts(*range(41, 61)))  # live events arrive amid the replay
            assert await offsets(client, 50) == list(range(11, 61))
            await publishing


@pytest.mark.parametrize(
    ("since", "expected"),
    [({"last": 3}, [18, 19, 20]), ({"time": "2027-01-15T08:00:00Z"}, list(range(1, 21)))],
)
async def test_replay_by_count_and_by_time(tmp_path: Path, since: dict[str, Any], expected: list[int]) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.alerts(*range(1, 21))
        async with rig.connect() as client:
            await ask(client, type="subscribe", since=since)
            assert (await receive_type(client, "subscribed"))["recovered"] is True
            assert await offsets(client, len(expected)) == expected


async def test_a_position_of_another_epoch_is_not_recovered_and_the_oldest_one_is_sent(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.alerts(1, 2)
        async with rig.connect() as client:
            await ask(client, type="subscribe", since={"epoch": "another", "offset": 1})
            subscribed = await receive_type(client, "subscribed")
            assert subscribed["recovered"] is False
            assert subscribed["oldest"] == {"epoch": rig.log.epoch, "offset": 1}
            assert subscribed["position"]["offset"] == 2
            await rig.alerts(3)
            assert await offsets(client, 1) == [3]


@pytest.mark.slow
async def test_a_client_joining_during_broadcasts_misses_nothing_and_affects_no_other(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as steady:
        await receive(steady)

        async def publish() -> None:
            for number in range(1, 201):
                await rig.alerts(number)

        async def join(number: int) -> list[int]:
            async with rig.connect() as client:
                welcome = await receive(client)
                start = welcome["position"]["offset"]
                return [start, *await offsets(client, 200 - start)] if start < 200 else [start]

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publish())
            joiners = [tasks.create_task(join(number)) for number in range(10)]
            assert await offsets(steady, 200) == list(range(1, 201))
        for joiner in joiners:
            seen = joiner.result()
            assert seen == list(range(seen[0], 201))


async def test_malformed_input_keeps_the_connection(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await client.send("{nope")
        assert (await receive_type(client, "error"))["message"] == "Invalid JSON"
        await client.send(b"\x00\x01")
        assert (await receive(client))["code"] == "invalid_message"
        await ask(client, type="ping", id=1)
        assert (await receive(client))["type"] == "pong"


async def test_a_message_in_fragments_is_one_message(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await client.send(iter(['{"type":', '"ping",', '"id":5}']))
        assert (await receive_type(client, "pong"))["id"] == 5


async def test_an_enormous_frame_closes_1009(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        async with rig.connect() as client:
            await receive(client)
            await client.send("x" * 17_000)
            assert (await closed_with(client))[0] == 1009
        await until(lambda: rig.value("whaled_connections_closed_total", code="1009") == 1)


@pytest.mark.slow
async def test_a_flood_is_closed_with_1008(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client:
        await receive(client)
        with contextlib.suppress(ConnectionClosed):
            for _ in range(1000):
                await ask(client, type="ping")
        assert await closed_with(client) == (1008, "Rate limit exceeded")


async def test_a_token_that_ends_is_announced_and_closed(tmp_path: Path) -> None:
    tokens = Tokens(expires_at=4e9)
    async with running_gateway(tmp_path, authenticator=tokens, auth=AuthSettings(expiry_grace=0.001)) as rig:
        now = rig.gateway.now()
        tokens.known["brief"] = Grant(
            client_id="c9", permissions=frozenset({Permission.READ}), issued_at=now - 10.0, expires_at=now + 0.2
        )
        async with rig.connect() as client:
            await ask(client, type="auth", token="brief")
            assert (await receive_type(client, "token_expiring"))["expires_at"]
            assert await closed_with(client) == (1008, "Token expired")


@pytest.mark.slow
async def test_a_client_that_reads_nothing_is_bounded_and_cut_off_while_others_go_on(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=20_000, slow_timeout=0.3, close_timeout=0.2) as rig:
        stuck = stuffed_client(rig)
        try:
            async with rig.connect(max_queue=None) as client:
                await until(lambda: rig.gateway.hub.live_members == 2)
                batches = 0
                while rig.gateway.hub.live_members == 2:
                    await rig.alerts(*range(batches * 500, batches * 500 + 500))
                    batches += 1
                    assert batches < 60
                assert rig.value("whaled_clients_lagged_total") == 1
                assert await offsets(client, batches * 500) == list(range(1, batches * 500 + 1))
                await until(lambda: rig.gateway.connections == 1)
                assert rig.value("whaled_connections_closed_total", code="1013") == 1
        finally:
            stuck.close()


async def test_a_slow_client_is_switched_to_replay_and_misses_nothing(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=20_000, slow_timeout=20.0) as rig:
        stuck = stuffed_client(rig)
        stuck.setblocking(False)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            count = 0
            while rig.gateway.hub.live_members == 1:
                await rig.alerts(*range(count, count + 500))
                count += 500
                assert count < 30_000
            await rig.alerts(*range(count, count + 100))
            count += 100
            loop, seen = asyncio.get_running_loop(), bytearray()
            async with asyncio.timeout(20):
                while b'"offset":%d}' % count not in seen[-4000:]:
                    seen += await loop.sock_recv(stuck, 65536)
            found = [int(part.split(b"}")[0]) for part in bytes(seen).split(b'"offset":')[2:]]
            assert found == list(range(1, count + 1))
        finally:
            stuck.close()


async def test_clients_receive_the_upstream_state_and_the_head_position(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, position_interval=0.05) as rig, rig.connect() as client:
        await ask(client, type="subscribe", filters={"min_btc": 1000})
        await receive_type(client, "subscribed")
        rig.gateway.publish_upstream_state(UpstreamState.CONNECTED)
        assert (await receive(client))["upstream"] == "connected"
        await rig.alerts(1)
        assert (await receive(client)) == {"type": "position", "position": {"epoch": rig.log.epoch, "offset": 1}}


async def test_a_peer_that_is_gone_without_a_word_is_noticed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, ping_interval=0.1, ping_timeout=0.1) as rig:
        stuck = stuffed_client(rig)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            await until(lambda: rig.gateway.connections == 0)
            assert rig.value("whaled_connections_closed_total", code="1006") == 1
        finally:
            stuck.close()


async def test_a_connection_without_a_handshake_is_cut_off(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, handshake_timeout=0.05) as rig:
        host, port = rig.url.removeprefix("ws://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert rig.value("whaled_connections_refused_total", reason="handshake_timeout") == 1


async def test_a_drain_sends_clients_the_time_to_retry_and_ends_in_time(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, close_timeout=0.3) as rig:
        stuck = stuffed_client(rig)
        try:
            async with rig.connect() as client:
                await receive(client)
                await until(lambda: rig.gateway.hub.live_members == 2)
                async with asyncio.timeout(5):
                    drain = asyncio.create_task(rig.gateway.drain(4.0))
                    closing = await receive_type(client, "closing")
                    assert closing["code"] == 1012
                    assert closing["retry_after"] > 0
                    assert await closed_with(client) == (1012, "Service restart")
                    await drain
                assert rig.gateway.connections == 0
                with pytest.raises(InvalidStatus) as caught:
                    async with rig.connect():
                        pass
                assert caught.value.response.status_code == 503
        finally:
            stuck.close()


async def test_the_stats_are_counted(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig:
        async with rig.connect() as bad:
            await ask(bad, type="auth", token="bad")
            await closed_with(bad)
        async with rig.connect() as client:
            await ask(client, type="auth", token="good")
            await receive_type(client, "welcome")
            await rig.alerts(1)
            await ask(client, type="stats")
            stats = (await receive_type(client, "stats"))["data"]
        assert stats == json.loads(
            '{"total_connections":1,"authenticated_connections":1,"alerts_broadcast":1,"auth_failures":1}'
        )


@pytest.mark.slow
async def test_tls_delivers_the_same_and_bounds_a_slow_client_too(
    tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    chain, key, trust = certificate
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(chain, key)
    async with (
        running_gateway(tmp_path, tls=served, max_unsent=20_000, slow_timeout=20.0) as rig,
        rig.connect(ssl=trust, max_queue=1) as slow,
        rig.connect(ssl=trust, max_queue=None) as quick,
    ):
        await until(lambda: rig.gateway.hub.live_members == 2)
        count = 0
        while not rig.value("whaled_clients_lagged_total"):
            await rig.alerts(*range(count, count + 500))
            count += 500
            assert count < 30_000
        assert await offsets(quick, count) == list(range(1, count + 1))
        assert await offsets(slow, count) == list(range(1, count + 1))


@pytest.mark.slow
async def test_a_client_that_asks_and_never_reads_is_bounded(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, max_unsent=10_000, messages_per_second=1e9, message_burst=10**9, close_timeout=0.2
    ) as rig:
        stuck = stuffed_client(rig)
        stuck.setblocking(False)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            body = b'{"type":"stats"}'
            frame = bytes((0x81, 0x80 | len(body), 0, 0, 0, 0)) + body
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(20):
                    while rig.gateway.connections:
                        await loop.sock_sendall(stuck, frame * 100)
            await until(lambda: rig.value("whaled_connections_closed_total", code="1013") == 1)
        finally:
            stuck.close()


async def test_a_replay_across_a_damaged_row_is_not_recovered(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, replay_page=4) as rig, rig.connect() as live:
        await rig.alerts(*range(1, 21))
        with closing(sqlite3.connect(tmp_path / "whaled.db", isolation_level=None)) as db:
            db.execute("UPDATE events SET ref = 'x' WHERE offset = 10")
            db.execute("UPDATE whales SET alert = '{' WHERE id = 11")
        # The first one comes across it in the middle of its replay; the others are answered at once.
        for is_known in (False, True):
            async with rig.connect() as client:
                await ask(client, type="subscribe", since={"epoch": rig.log.epoch, "offset": 2})
                subscribed = await receive_type(client, "subscribed")
                if not is_known:
                    assert subscribed["recovered"] is True
                    assert await offsets(client, 4) == [3, 4, 5, 6]
                    subscribed = await receive_type(client, "subscribed")
                assert subscribed["recovered"] is False
                assert subscribed["from"] == subscribed["position"]
                assert subscribed["oldest"] == {"epoch": rig.log.epoch, "offset": 12}
        for since in ({"last": 15}, {"time": "2027-01-15T08:00:00Z"}, {"epoch": rig.log.epoch, "offset": 10}):
            async with rig.connect() as client:
                await ask(client, type="subscribe", since=since)
                assert (await receive_type(client, "subscribed"))["recovered"] is False
        # Behind it nothing is missing.
        for since in ({"last": 9}, {"epoch": rig.log.epoch, "offset": 11}):
            async with rig.connect() as client:
                await ask(client, type="subscribe", since=since)
                assert (await receive_type(client, "subscribed"))["recovered"] is True
                assert await offsets(client, 9) == list(range(12, 21))
        assert rig.value("whaled_eventlog_damaged_rows") == 2
        assert rig.value("whaled_eventlog_failures_total", reason="corrupt") == 0
        await rig.alerts(21)
        assert await offsets(live, 21) == list(range(1, 22))
