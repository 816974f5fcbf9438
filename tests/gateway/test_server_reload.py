"""A gateway whose settings change while it runs: the new ones take effect, and nothing that it remembers is lost."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from websockets.exceptions import InvalidStatus

from kit.gateway import Rig, ask, closed_with, receive, receive_type, running_gateway, until
from kit.raw import raw, request
from kit.tls import Certificate, server_context
from kit.tokens import Tokens
from whaled.config.sections import AuthSettings

GOOD = {"Authorization": "Bearer good"}


def reload(rig: Rig, auth: AuthSettings | None = None, **changes: Any) -> None:
    """Apply settings as `whaled reload` does. `position_interval` changes every time."""
    gateway = rig.gateway
    changes.setdefault("position_interval", gateway.settings.position_interval + 1)
    gateway.reconfigure(replace(gateway.settings, **changes), auth or AuthSettings(), gateway.authenticator)


@asynccontextmanager
async def silent(rig: Rig) -> AsyncIterator[asyncio.StreamReader]:
    """Connect, and send nothing."""
    host, port = rig.url.rpartition("://")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader
    finally:
        writer.close()


async def refused(rig: Rig, token: str = "bad") -> Any:
    """Return the error for a token."""
    async with rig.connect(additional_headers={"Authorization": f"Bearer {token}"}) as client:
        return await receive(client)


# --- what it remembers ---


async def test_failed_authentications_are_remembered_and_a_new_limit_takes_effect(tmp_path: Path) -> None:
    few = AuthSettings(failures_per_second=0.01, failure_burst=1)
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), auth=few) as rig:
        assert (await refused(rig))["message"] == "Invalid or expired token"
        assert (await refused(rig))["code"] == "rate_limited"
        reload(rig, few)
        assert (await refused(rig))["code"] == "rate_limited"
        reload(rig, AuthSettings(failures_per_second=0.01, failure_burst=10))
        assert (await refused(rig))["message"] == "Invalid or expired token"


async def test_that_memory_is_short_is_remembered(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        rig.gateway.short_of_memory()
        reload(rig)
        with pytest.raises(InvalidStatus) as caught:
            await rig.connect()
        assert caught.value.response.status_code == 503
        assert not rig.gateway.subscriptions._pages.keeps
        rig.gateway.relieved()
        async with rig.connect() as client:
            await receive_type(client, "welcome")


async def test_replays_under_way_continue_and_use_the_new_page(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, replay_page=10) as rig:
        await rig.alerts(*range(1, 301))
        pages = rig.gateway.subscriptions._pages
        async with rig.connect(max_queue=None) as client:
            await ask(client, type="subscribe", since={"last": 300})
            await receive_type(client, "subscribed")
            reload(rig, replay_page=50)
            offsets = [(await receive_type(client, "whale_alert"))["position"]["offset"] for _ in range(300)]
        assert offsets == list(range(1, 301))
        assert rig.gateway.subscriptions._pages is pages
        assert (pages.at_once, pages.size) == (50, 50)


async def test_what_a_client_has_spent_is_remembered_and_its_new_rate_takes_effect(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"client_messages_per_second": 0.001, "client_message_burst": 2}
    async with (
        running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), **limits) as rig,
        rig.connect(additional_headers=GOOD) as client,
    ):
        for _ in range(2):
            await ask(client, type="ping")
            await receive_type(client, "pong")
        reload(rig)
        await ask(client, type="ping")
        assert (await receive_type(client, "error"))["code"] == "rate_limited"
        reload(rig, client_message_burst=10)
        await ask(client, type="ping")
        await receive_type(client, "pong")


async def test_connections_are_still_counted_and_a_lower_limit_closes_none(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as first, rig.connect() as second:
        for client in (first, second):
            await receive_type(client, "welcome")
        reload(rig, max_connections=1)
        assert (rig.gateway.connections, rig.gateway.roster.limit) == (2, 1)
        with pytest.raises(InvalidStatus):
            await rig.connect()
        await ask(second, type="ping")
        await receive_type(second, "pong")
        reload(rig, max_connections=3)
        async with rig.connect() as third:
            await receive_type(third, "welcome")


async def test_a_drain_is_not_ended_by_a_reload(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.gateway.drain(0.1)
        reload(rig)
        async with raw(rig, request()) as client:
            assert await client.status() == 503


# --- what takes effect ---


@pytest.mark.parametrize("is_secure", [False, True])
async def test_the_time_for_a_handshake_changes_with_and_without_tls(
    tmp_path: Path, certificate: Certificate, is_secure: bool
) -> None:
    tls: ssl.SSLContext | None = server_context(certificate) if is_secure else None
    async with running_gateway(tmp_path, tls=tls, handshake_timeout=60.0) as rig:
        reload(rig, handshake_timeout=0.1)
        began = time.monotonic()
        async with silent(rig) as reader, asyncio.timeout(10):
            assert await reader.read() == b""
        assert time.monotonic() - began >= 0.1
        assert rig.value("whaled_connections_refused_total", reason="handshake_timeout") == 1


async def test_the_time_to_authenticate_changes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9), auth_timeout=60.0) as rig:
        reload(rig, auth_timeout=0.05)
        async with rig.connect() as client, asyncio.timeout(10):
            assert (await receive(client))["message"] == "Authentication timeout"


async def test_the_limit_of_unsent_bytes_changes_for_open_connections(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=1_000_000) as rig, raw(rig, request()) as client:
        await client.told("status")
        (connection,) = rig.gateway.roster.all()
        connection.outbox.write_rest(bytes(30_000_000))
        await until(lambda: connection.unsent > 1_000_000)
        assert not connection.outbox.write_behind(b"x")
        reload(rig, max_unsent=100_000_000)
        assert connection.outbox.write_behind(b"x")


async def test_origins_change_for_new_connections(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        with pytest.raises(InvalidStatus):
            await rig.connect(origin="https://good.example")
        reload(rig, origins=("https://good.example",))
        async with rig.connect(origin="https://good.example") as client:
            await receive_type(client, "welcome")


async def test_the_number_of_connections_of_a_client_changes(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig,
        rig.connect(additional_headers=GOOD) as first,
    ):
        await receive_type(first, "welcome")
        reload(rig, max_connections_per_client=1)
        async with rig.connect(additional_headers=GOOD) as second:
            assert (await receive(second))["code"] == "too_many_connections"
            assert (await closed_with(second))[0] == 1013
