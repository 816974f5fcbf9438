"""Revocation as an operator does it: `whaled token revoke`, next to a daemon as a process."""

import asyncio
import json
import signal
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection

from kit import daemon
from kit.daemon import Daemon
from kit.gateway import ask, receive, receive_type
from whaled.auth.keys import generate

# A revocation acts within a second; the command has to start, and other tests run on the machine.
SOON_S = 10.0

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    ring = tmp_path / "keys.json"
    generate(ring, 1.0)
    return daemon.write_config(tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(ring)})


async def issue(config: Path, client_id: str) -> str:
    return await daemon.command(config, "token", "issue", "--client", client_id)


async def listed(config: Path) -> dict[str, dict[str, str]]:
    """Return the registered tokens by the way in which they were issued and their client."""
    rows = [json.loads(line) for line in (await daemon.command(config, "token", "list", "--json")).splitlines()]
    return {f"{row['issued_by'].split()[0]} {row['client_id']}": row for row in rows}


async def admit(client: ClientConnection, token: str) -> None:
    await ask(client, type="auth", token=token)
    await receive_type(client, "auth_success")


async def is_refused(whaled: Daemon, token: str) -> bool:
    async with whaled.connect() as client:
        await ask(client, type="auth", token=token)
        return bool((await receive(client)).get("message") == "Invalid or expired token")


async def closed_as_revoked(client: ClientConnection) -> None:
    async with asyncio.timeout(SOON_S):
        await client.wait_closed()
    assert (client.close_code, client.close_reason) == (1008, "Token revoked")


async def test_a_revoked_token_ends_at_once_with_what_was_refreshed_from_it_and_stays_revoked(config: Path) -> None:
    stolen, other = await issue(config, "desk-1"), await issue(config, "desk-2")
    async with daemon.running(config) as whaled, whaled.connect() as client, whaled.connect() as bystander:
        await admit(client, stolen)
        await admit(bystander, other)
        await ask(client, type="refresh")
        renewed = (await receive_type(client, "token"))["token"]
        async with asyncio.timeout(SOON_S):
            while "refresh desk-1" not in (rows := await listed(config)):
                pass
        assert rows["refresh desk-1"]["family"] == rows["command desk-1"]["jti"]

        await daemon.command(config, "token", "revoke", rows["refresh desk-1"]["jti"])
        await closed_as_revoked(client)
        assert [await is_refused(whaled, token) for token in (stolen, renewed, other)] == [True, True, False]
        assert await daemon.metric(whaled.http, "whaled_token_revocations") == 2
        await ask(bystander, type="ping")
        await receive_type(bystander, "pong")
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0
    async with daemon.running(config) as whaled:
        assert [await is_refused(whaled, token) for token in (stolen, renewed, other)] == [True, True, False]


async def test_a_revoked_client_is_out_until_it_gets_a_new_token(config: Path) -> None:
    token = await issue(config, "desk-1")
    async with daemon.running(config) as whaled, whaled.connect() as first, whaled.connect() as second:
        for client in (first, second):
            await admit(client, token)
        await daemon.command(config, "token", "revoke", "--client", "desk-1")
        for client in (first, second):
            await closed_as_revoked(client)
        assert await is_refused(whaled, token)
        assert not await is_refused(whaled, await issue(config, "desk-1"))


async def test_a_family_that_ended_by_a_double_refresh_stays_ended_after_a_kill(config: Path) -> None:
    token = await issue(config, "desk-1")
    async with daemon.running(config) as whaled, whaled.connect() as first, whaled.connect() as second:
        for client in (first, second):
            await admit(client, token)
        for client in (first, second):
            await ask(client, type="refresh")
        await receive_type(first, "token")
        await closed_as_revoked(second)
        await closed_as_revoked(first)
        async with asyncio.timeout(SOON_S):
            while not (await listed(config))["command desk-1"]["revoked"]:
                pass
        whaled.process.kill()
    async with daemon.running(config) as whaled:
        assert await is_refused(whaled, token)
