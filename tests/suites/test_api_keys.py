"""API keys as an operator uses them: `whaled apikey`, next to a daemon as a process, and the Python client."""

import asyncio
import json
from pathlib import Path

import pytest

from kit import daemon
from kit.gateway import ask, receive_type
from whaled.auth.keys import generate
from whaled.client import UpstreamStatus, WhaleStream

# A change acts within a second; the command has to start, and other tests run on the machine.
SOON_S = 10.0

pytestmark = pytest.mark.slow


async def test_a_running_daemon_accepts_a_new_key_and_ends_its_connections_when_it_is_revoked(tmp_path: Path) -> None:
    ring = tmp_path / "keys.json"
    generate(ring, 1.0)
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(ring)})
    async with daemon.running(config) as whaled:
        key = await daemon.command(config, "apikey", "create", "--client", "desk-1", "--filter", '{"min_btc": 500}')
        name = json.loads(await daemon.command(config, "apikey", "list", "--json"))["id"]
        async with asyncio.timeout(SOON_S):
            while not (await attempt(whaled, key)):  # the daemon looks twice a second
                pass
        async with whaled.connect() as client:
            await ask(client, type="auth", api_key=key)
            await receive_type(client, "welcome")
            await ask(client, type="subscribe", filters={})
            assert (await receive_type(client, "subscribed"))["fixed_filters"] == {"min_btc": 500.0}
            async with WhaleStream(whaled.url, token=key) as stream, asyncio.timeout(SOON_S):
                first = await anext(aiter(stream))
            assert isinstance(first, UpstreamStatus)
            await daemon.command(config, "apikey", "revoke", name)
            async with asyncio.timeout(SOON_S):
                await client.wait_closed()
            assert (client.close_code, client.close_reason) == (1008, "Token revoked")
        assert not await attempt(whaled, key)


async def attempt(whaled: daemon.Daemon, key: str) -> bool:
    """Return whether the daemon accepts a key."""
    async with whaled.connect() as client:
        await ask(client, type="auth", api_key=key)
        return bool(json.loads(await client.recv())["type"] == "auth_success")
