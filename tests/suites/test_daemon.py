"""The daemon as a process, against the simulated backend: what an operator and a client see."""

import asyncio
import json
import re
import resource
import signal
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from kit import daemon
from kit.daemon import busy_simulator, get
from kit.gateway import ask, receive, receive_type, silent_client
from kit.paths import ROOT
from whaled.auth.keys import generate, read, retire, ring_of
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.eventlog.schema import put_state
from whaled.model import Permission
from whaled.simulator.settings import Mode

METRICS_PAGE = ROOT / "docs" / "metrics.md"

pytestmark = pytest.mark.slow


async def test_a_whale_reaches_a_client_from_the_backend(tmp_path: Path) -> None:
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url)
        async with daemon.running(config) as whaled, whaled.connect() as client:
            async with asyncio.timeout(20):
                alert = await receive_type(client, "whale_alert")
                while alert["data"]["moved_sat"] is None:  # it left the mempool before its inputs could be asked for
                    alert = await receive_type(client, "whale_alert")
                update = await receive_type(client, "whale_update")
            truth = simulator.truth[alert["data"]["transaction_id"]]
            assert alert["data"]["value_sat"] == truth.out_sat
            assert alert["data"]["value_sat"] >= 100 * 10**8
            assert alert["data"]["moved_sat"] == truth.moved_sat
            assert update["data"]["status"] in {"confirmed", "replaced"}
            metrics = await get(whaled.http + "/metrics")
            documented = METRICS_PAGE.read_text()
            names = {line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE")}
            assert [name for name in names if f"| `{name}` |" not in documented] == []
            assert 'whaled_upstream_state{state="connected"} 1.0' in metrics
            health = json.loads(await get(whaled.http + "/healthz"))
            assert (health["status"], health["upstream"]) == ("ok", "connected")
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0


async def test_the_subscription_is_sent_and_the_old_url_works(tmp_path: Path) -> None:
    async with busy_simulator() as simulator:
        old = simulator.url.rsplit("/api", 1)[0] + "/ws/track-mempool-tx"
        config = daemon.write_config(tmp_path, old)
        async with daemon.running(config) as whaled, whaled.connect() as client:
            async with asyncio.timeout(20):
                assert (await receive_type(client, "whale_alert"))["data"]["btc_value"] >= 100


async def test_clients_are_notified_of_a_restart_and_a_dead_client_does_not_delay_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    async with busy_simulator() as simulator:
        config = daemon.write_config(
            tmp_path,
            simulator.url,
            gateway={"port": 0, "max_connections_per_address": 1000, "drain_window": "30s", "close_timeout": "2s"},
        )
        async with daemon.running(config) as whaled:
            dead = silent_client(whaled.url)
            clients = [await whaled.connect(ping_interval=None, max_queue=None) for _ in range(500)]
            whaled.signal(signal.SIGTERM)

            async def outcome(client: Any) -> tuple[int, float]:
                retry_after = 0.0
                try:
                    async for frame in client:
                        message = json.loads(frame)
                        if message["type"] == "closing":
                            retry_after = message["retry_after"]
                except ConnectionClosed:
                    pass
                return client.close_code, retry_after

            async with asyncio.TaskGroup() as tasks:
                waiting = [tasks.create_task(outcome(client)) for client in clients]
                assert await whaled.ended(within_s=20) == 0  # not the whole window
            outcomes = [task.result() for task in waiting]
            assert {code for code, _ in outcomes} == {1012}
            assert len({retry for _, retry in outcomes}) > 100  # they do not come back at once
            dead.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", gateway={"port": 0, "drain_window": "30s", "close_timeout": "29s"}
    )
    async with daemon.running(config) as whaled:
        dead = silent_client(whaled.url)
        await whaled.logged("client_connected")
        whaled.signal(signal.SIGINT)
        await whaled.logged("daemon_stopping")
        whaled.signal(signal.SIGINT)
        assert await whaled.ended(within_s=10) == 1
        dead.close()


async def test_user_signals_are_ignored(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as whaled:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            whaled.signal(number)
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished")
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0


async def test_a_reload_applies_completely_or_not_at_all(tmp_path: Path) -> None:
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url)
        async with daemon.running(config) as whaled:
            good = config.read_text()
            config.write_text(good + "detection: {threshold_btc: 20000000}\n")
            whaled.signal(signal.SIGHUP)
            await whaled.logged("reload_finished")
            assert "whaled_config_last_reload_successful 1.0" in await get(whaled.http + "/metrics")
            config.write_text(good + "detection: {threshold_btcs: 5}\n")
            whaled.signal(signal.SIGHUP)
            refused = await whaled.logged("reload_refused")
            assert "threshold_btc" in refused["problem"]
            assert "whaled_config_last_reload_successful 0.0" in await get(whaled.http + "/metrics")


async def test_a_reload_refuses_keys_that_cannot_change_while_running(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as whaled:
        config.write_text(config.read_text().replace("whaled.db", "other.db"))
        whaled.signal(signal.SIGHUP)
        refused = await whaled.logged("reload_refused")
        assert "eventlog.path" in refused["problem"]


async def test_after_kill_9_a_resuming_client_sees_every_offset_once(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    position: dict[str, Any] | None = None
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url)
        for _ in range(4):
            async with daemon.running(config) as whaled, whaled.connect(max_queue=None) as client:
                await ask(client, type="subscribe", since=position or {"last": 0})
                answer = await receive_type(client, "subscribed")
                assert answer["recovered"] is True
                target = len(seen) + 25
                async with asyncio.timeout(20):
                    while len(seen) < target:
                        frame = await receive(client)
                        if frame["type"] in {"whale_alert", "whale_update"}:
                            position = frame["position"]
                            seen.append((position["epoch"], position["offset"]))
                whaled.signal(signal.SIGKILL)
                assert await whaled.ended() == -signal.SIGKILL
    assert len({epoch for epoch, _ in seen}) == 1
    first = seen[0][1]
    assert [offset for _, offset in seen] == list(range(first, first + len(seen)))


async def test_an_absent_backend_is_not_a_failed_start(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as whaled, whaled.connect() as client:
        assert (await receive(client))["type"] == "welcome"
        assert (await receive(client))["upstream"] == "disconnected"
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0


async def refused_start(config: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    async with daemon.starting(config, *arguments, env=env) as whaled:
        status = await whaled.ended()
        await whaled.heard_all()
        return status, "\n".join(whaled.raw)


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = await refused_start(daemon.write_config(tmp_path, "ws://127.0.0.1:1", gateway={"port": port}))
    assert status == 78
    assert f"port {port}" in said
    assert "Traceback" not in said


async def test_without_a_key_it_does_not_start_and_names_the_command_that_makes_one(tmp_path: Path) -> None:
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(tmp_path / "keys.json")}
    )
    status, said = await refused_start(config)
    assert status == 78
    assert "whaled keys generate" in said


@pytest.mark.parametrize("secret", ["", "short"])
def test_an_empty_or_short_secret_prevents_the_start(tmp_path: Path, secret: str) -> None:
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(tmp_path / "keys.json")}
    )
    status, said = asyncio.run(refused_start(config, env={"WEBSOCKET_SECRET_KEY": secret}))
    assert status == 78
    assert "Traceback" not in said


async def test_a_file_that_is_not_a_log_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "whaled.db").write_bytes(b"precious" * 1000)
    status, said = await refused_start(daemon.write_config(tmp_path, "ws://127.0.0.1:1"))
    assert status != 0
    assert "whaled.db" in said
    assert "Traceback" not in said
    assert (tmp_path / "whaled.db").read_bytes() == b"precious" * 1000


async def test_two_daemons_do_not_share_a_log(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as first:
        status, said = await refused_start(config)
        assert status != 0
        assert "whaled.db" in said
        async with first.connect() as client:
            assert (await receive(client))["type"] == "welcome"


async def test_tls_serves_wss_only(tmp_path: Path, certificate: tuple[Path, Path, Any]) -> None:
    chain, key, trust = certificate
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", gateway={"port": 0, "tls": {"certificate": str(chain), "private_key": str(key)}}
    )
    async with daemon.running(config) as whaled:
        assert whaled.url.startswith("wss://")
        whaled.url = whaled.url.replace("127.0.0.1", "localhost")
        async with whaled.connect(ssl=trust) as client:
            assert (await receive(client))["type"] == "welcome"
        whaled.url = whaled.url.replace("wss", "ws")
        with pytest.raises((InvalidHandshake, EOFError, ConnectionError)):
            async with whaled.connect(open_timeout=5):
                pass


async def test_after_a_rotation_open_connections_refresh_with_the_new_key_or_end(tmp_path: Path) -> None:
    ring = tmp_path / "keys.json"
    first = generate(ring, 1.0).kid
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(ring)})
    token, _ = issue(
        ring_of(read(ring), ring), client_id="c1", permissions=[Permission.READ], ttl_s=60, now=time.time(),
        token_id="t", settings=AuthSettings(),
    )  # fmt: skip
    async with daemon.running(config) as whaled, whaled.connect() as client, whaled.connect() as left:
        source = await whaled.logged("signing_keys_loaded")
        assert (source["source"], source["keys"]) == (str(ring), 1)
        await ask(left, type="auth", token=token)
        await receive_type(left, "status")
        await ask(client, type="auth", token=token)
        await receive_type(client, "status")
        second = generate(ring, 2.0).kid
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished")
        await ask(client, type="refresh")
        renewed = await receive(client)
        assert jwt.get_unverified_header(renewed["token"])["kid"] == second
        retire(ring, first, 3.0)
        whaled.lines.clear()
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished")
        async with asyncio.timeout(1.0):
            await left.wait_closed()
        assert (left.close_code, left.close_reason) == (1008, "Token revoked")
        async with whaled.connect() as again:
            await ask(again, type="auth", token=renewed["token"])
            assert (await receive_type(again, "auth_success"))["client_id"] == "c1"
        async with whaled.connect() as old:
            await ask(old, type="auth", token=token)
            assert (await receive(old))["message"] == "Invalid or expired token"


async def test_a_backend_of_another_network_is_refused_and_the_daemon_stays_up(tmp_path: Path) -> None:
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url)
        async with daemon.running(config) as whaled:
            await whaled.logged("network_recorded", network="simulated mainnet")
        with sqlite3.connect(tmp_path / "whaled.db") as log:
            (noted,) = log.execute("SELECT value FROM state WHERE key = 'network'").fetchone()
            mainnet = "000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f"
            changed = json.dumps({**json.loads(noted), "genesis": mainnet})
            put_state(log, "network", changed)
            before = log.execute("SELECT count(*) FROM events").fetchone()
        log.close()
        async with daemon.running(config) as whaled:
            lost = await whaled.logged("upstream_link_lost", reason="wrong_network", attempt=2)
            assert "the backend is on simulated mainnet, and the event log holds mainnet" in lost["detail"]
            async with aiohttp.ClientSession() as session, session.get(f"{whaled.http}/healthz") as response:
                assert (await response.json())["upstream"] == "disconnected"
        with sqlite3.connect(tmp_path / "whaled.db") as log:
            assert log.execute("SELECT count(*) FROM events").fetchone() == before
        log.close()


async def test_an_esplora_mode_backend_without_its_electrs_is_reported_as_degraded(tmp_path: Path) -> None:
    async with busy_simulator(mode=Mode.ESPLORA) as simulator:
        nowhere = f"http://127.0.0.1:{simulator.port}/elsewhere"
        config = daemon.write_config(tmp_path, simulator.url, upstream={"esplora_url": nowhere})
        async with daemon.running(config) as whaled, whaled.connect() as client, asyncio.timeout(30):
            await whaled.logged("upstream_capabilities_missing", mode="esplora")
            while (await receive_type(client, "status"))["upstream"] != "degraded":
                pass
            health = json.loads(await get(f"{whaled.http}/healthz"))
            assert health["upstream"] == "degraded"
            assert "upstream.esplora_url" in health["shortfall"]


@pytest.mark.long
async def test_an_esplora_mode_backend_with_electrs_is_read_completely(tmp_path: Path) -> None:
    async with busy_simulator(mode=Mode.ESPLORA) as simulator:
        config = daemon.write_config(tmp_path, simulator.url)
        async with daemon.running(config) as whaled, whaled.connect() as client, asyncio.timeout(60):
            line = await whaled.logged("upstream_capabilities_complete", mode="esplora")
            assert line["esplora"].endswith("/api/")
            metrics = ""
            while not re.search(r"whaled_blocks_scanned_total [1-9]", metrics):
                await receive_type(client, "whale_update")
                metrics = await get(f"{whaled.http}/metrics")
        assert 'whaled_upstream_state{state="connected"} 1.0' in metrics
        for capability in ("stream", "chain", "mempool", "prevouts", "network"):
            assert f'whaled_upstream_capability{{capability="{capability}"}} 1.0' in metrics
