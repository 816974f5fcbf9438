"""The daemon with a real, certified OpenID provider: tokens by client credentials, rotated keys, and an outage."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from kit.daemon import Daemon, running, write_config
from kit.gateway import ask, closed_with, receive
from kit.provider import AUDIENCE, Provider, installed, provider
from whaled.auth.keys import generate

pytestmark = [pytest.mark.long, pytest.mark.timeout(420)]

REVOKED = (1008, "Token revoked")


def issuer(server: Provider, algorithm: str = "RS256", **more: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "name": "corp", "issuer": server.issuer, "audience": AUDIENCE, "algorithms": [algorithm],
        "read": ["scope=whales:read"], "write": ["scope=whales:write"], "unknown_key_interval": "1s",
    }  # fmt: skip
    return plain | more


def configured(directory: Path, *issuers: dict[str, object]) -> Path:
    auth = {"enabled": True, "key_ring": str(directory / "keys.json"), "issuers": list(issuers)}
    return write_config(directory, "ws://127.0.0.1:9/", auth=auth)


@asynccontextmanager
async def daemon_of(directory: Path, *issuers: dict[str, object]) -> AsyncIterator[Daemon]:
    generate(directory / "keys.json", time.time())
    async with running(configured(directory, *issuers)) as daemon:
        yield daemon


async def answer(client: ClientConnection, token: str) -> Any:
    await ask(client, type="auth", token=token)
    return await receive(client)


async def entered(daemon: Daemon, token: str, within_s: float = 30) -> None:
    """Connect with a token again and again until it is accepted."""
    async with asyncio.timeout(within_s):
        while True:
            async with daemon.connect() as client:
                if (await answer(client, token))["type"] == "auth_success":
                    return
            await asyncio.sleep(0.1)  # between two attempts of a client


async def still_open(client: ClientConnection) -> bool:
    await ask(client, type="ping")
    while (await receive(client))["type"] != "pong":
        pass
    return True


@pytest.fixture(scope="module")
def place() -> Path:
    return installed()


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
async def test_a_token_by_client_credentials_is_accepted(tmp_path: Path, place: Path, algorithm: str) -> None:
    async with (
        provider(place, algorithm) as server,
        daemon_of(tmp_path, issuer(server, algorithm)) as daemon,
        daemon.connect() as reader,
        daemon.connect() as writer,
        daemon.connect() as stranger,
    ):
        found = await answer(reader, await server.token())
        assert (found["type"], found["client_id"], found["permissions"]) == ("auth_success", "corp:whale-bot", ["read"])
        await ask(reader, type="subscribe")
        while (await receive(reader))["type"] != "subscribed":
            pass
        assert (await answer(writer, await server.token("whales:write")))["permissions"] == ["write"]
        refused = await answer(stranger, await server.token(audience="https://other.example"))
        assert refused["message"] == "Invalid or expired token"


async def test_keys_rotate_and_the_provider_may_be_away_without_harm_to_those_who_are_in(
    tmp_path: Path, place: Path
) -> None:
    async with provider(place) as server, daemon_of(tmp_path, issuer(server)) as daemon, daemon.connect() as first:
        old = await server.token()
        assert (await answer(first, old))["type"] == "auth_success"

        await server.stop()
        await entered(daemon, old)  # with the keys that were fetched before

        await server.start("k2", "k1")
        new = await server.token()
        async with daemon.connect() as early:
            # whaled has not asked for the new key yet: the answer is that of any wrong token, and it comes at once.
            assert (await answer(early, new))["message"] == "Invalid or expired token"
            assert (await closed_with(early))[0] == 1008
        await entered(daemon, new)
        await entered(daemon, old)

        await server.stop()
        await server.start("k2")
        await server.stop()
        await entered(daemon, new)
        assert await still_open(first)


async def test_a_reload_without_the_issuer_ends_its_connections(tmp_path: Path, place: Path) -> None:
    async with provider(place) as server, daemon_of(tmp_path, issuer(server)) as daemon, daemon.connect() as client:
        assert (await answer(client, await server.token()))["type"] == "auth_success"
        configured(tmp_path)
        daemon.signal(signal.SIGHUP)
        assert await closed_with(client) == REVOKED
        async with daemon.connect() as again:
            assert json.dumps(await answer(again, await server.token())).count("Invalid or expired token") == 1
