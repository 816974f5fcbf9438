"""The daemon in bad moments: signals too early and too often, a log that fails, a reload amid a stop."""

import asyncio
import contextlib
import os
import resource
import signal
import sqlite3
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from kit import daemon
from kit.books import book
from kit.daemon import busy_simulator, get
from kit.eventlog import open_log, scan
from kit.gateway import ask, receive, receive_type
from kit.processes import child_of, is_there
from kit.whales import alert_draft
from whaled.eventlog import notes
from whaled.simulator.scripts import Network

pytestmark = pytest.mark.slow

NOBODY = "ws://127.0.0.1:1"
# Longer ago than events are kept.
LONG_AGO = 1_760_000_000.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_during_the_start_is_a_clean_stop(tmp_path: Path, number: signal.Signals) -> None:
    async with daemon.starting(daemon.write_config(tmp_path, NOBODY)) as whaled:
        await whaled.logged("eventlog_created")
        whaled.signal(number)
        assert await whaled.ended() == 0
        await whaled.heard_all()
        assert whaled.lines[-1]["event"] == "daemon_stopped"


async def test_a_reload_during_the_start_follows_the_start(tmp_path: Path) -> None:
    async with daemon.starting(daemon.write_config(tmp_path, NOBODY)) as whaled:
        await whaled.logged("eventlog_created")
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished")
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0


async def test_a_reload_during_the_stop_is_ignored(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, NOBODY, gateway={"port": 0, "close_timeout": "1s"})
    async with daemon.running(config) as whaled:
        host, port = whaled.url.removeprefix("ws://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await whaled.logged("client_connected")
        whaled.signal(signal.SIGTERM)
        await whaled.logged("daemon_stopping")
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_ignored")
        assert await whaled.ended() == 0
        writer.close()


async def offsets_until_closed(client: ClientConnection) -> list[int]:
    seen = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            frame = await receive(client)
            if frame["type"] in {"whale_alert", "whale_update"}:
                seen.append(frame["position"]["offset"])
    return seen


async def test_a_log_that_cannot_grow_ends_the_daemon_and_nothing_unstored_was_sent(tmp_path: Path) -> None:
    async with busy_simulator() as simulator, daemon.running(daemon.write_config(tmp_path, simulator.url)) as whaled:
        async with whaled.connect(max_queue=None) as client:
            first = (await receive_type(client, "whale_alert"))["position"]["offset"]
            size = max((tmp_path / name).stat().st_size for name in ("whaled.db", "whaled.db-wal"))
            resource.prlimit(whaled.process.pid, resource.RLIMIT_FSIZE, (size + 20_000, size + 20_000))
            seen = await offsets_until_closed(client)
            assert (client.close_code, client.close_reason) == (1001, "Server is going away")
        assert await whaled.ended() == 1
        await whaled.heard_all()
        # Bookmarks are stored as well: the first write that does not fit ends the daemon.
        cannot = f"whaled: {tmp_path / 'whaled.db'}: cannot store "
        assert whaled.raw[-1].startswith((f"{cannot}events", f"{cannot}state")), whaled.raw[-1]
        assert "Traceback" not in "\n".join(whaled.raw)
    with contextlib.closing(sqlite3.connect(tmp_path / "whaled.db")) as db:
        (newest,) = db.execute("SELECT max(offset) FROM events").fetchone()
    assert seen == list(range(first + 1, newest + 1))


@pytest.mark.parametrize(
    "broken", [{"detection": {"address_book": "/nowhere"}}, {"gateway": {"port": 0, "max_connections": 0}}]
)
async def test_a_reload_that_fails_changes_nothing(tmp_path: Path, broken: dict[str, dict[str, object]]) -> None:
    async with daemon.running(daemon.write_config(tmp_path, NOBODY)) as whaled:
        daemon.write_config(tmp_path, NOBODY, **broken, log={"format": "json", "level": "error"})
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_refused")
        async with whaled.connect() as client:
            assert (await receive(client))["type"] == "welcome"
            await whaled.logged("client_connected")  # the level is the old one


async def test_while_a_large_address_book_is_read_everything_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    path.write_text("\n".join(book(10)))
    settings = {"detection": {"address_book": str(path)}}
    async with busy_simulator() as simulator:
        config = daemon.write_config(tmp_path, simulator.url, **settings)
        async with daemon.running(config) as whaled, whaled.connect(max_queue=None) as client:
            path.write_text("\n".join(book(40_000)))
            whaled.signal(signal.SIGHUP)
            reader = await child_of(whaled.process.pid, "whaled.addressbook.bookfile")
            os.kill(reader, signal.SIGSTOP)
            try:
                for asked in (1, 2):
                    whaled.signal(signal.SIGHUP)
                    await whaled.logged("reload_queued", times=asked)
                    await ask(client, type="ping")
                    await receive_type(client, "pong")
                    await receive_type(client, "whale_alert")
                    assert '"status":"ok"' in await get(whaled.http + "/healthz")
                    assert "whaled_address_book_addresses 10.0" in await get(whaled.http + "/metrics")
            finally:
                os.kill(reader, signal.SIGCONT)
            await whaled.logged("reload_finished", times=2)  # for three that were asked for
            metrics = await get(whaled.http + "/metrics")
            assert "whaled_address_book_addresses 40000.0" in metrics
            assert "whaled_address_book_owners 7.0" in metrics
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0
            await whaled.heard_all()
            assert [line["event"] for line in whaled.lines].count("reload_started") == 2


async def test_a_killed_reader_of_the_address_book_refuses_the_reload_and_keeps_the_old_book(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    path.write_text("\n".join(book(1_000)))
    config = daemon.write_config(tmp_path, NOBODY, detection={"address_book": str(path)})
    async with daemon.running(config) as whaled:
        path.write_text("\n".join(book(40_000)))
        whaled.signal(signal.SIGHUP)
        os.kill(await child_of(whaled.process.pid, "whaled.addressbook.bookfile"), signal.SIGKILL)
        refused = await whaled.logged("reload_refused")
        assert f"the process that reads {path} failed" in refused["problem"]
        assert "whaled_address_book_addresses 1000.0" in await get(whaled.http + "/metrics")
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished", addresses=40_000)


async def test_a_failed_download_does_not_take_the_labels_away(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    path.write_text("\n".join(book(1_000)))
    config = daemon.write_config(tmp_path, NOBODY, detection={"address_book": str(path)})
    async with daemon.running(config) as whaled:
        await whaled.logged("address_book_read", files=[str(path)], addresses=1_000, owners=7)
        failures = {
            "empty": ("", "has no address (0 bytes): did its download fail?"),
            "not_a_book": ("<html>403</html>", "is not an address book but a page in HTML or XML"),
            "shrunk": ("\n".join(book(400)), "has 400 addresses, 1,000 are in force: the loss is greater than"),
            "faults": ("Too many,columns\n", "line 1: expected 3 columns, label,address,type, found 2"),
        }
        for reason, (text, problem) in failures.items():
            path.write_text(text)
            whaled.signal(signal.SIGHUP)
            refused = await whaled.logged("reload_refused", address_book=reason, addresses_in_force=1_000)
            assert refused["level"] == "error"
            assert problem in refused["problem"]
        metrics = await get(whaled.http + "/metrics")
        assert "whaled_address_book_addresses 1000.0" in metrics
        for reason in failures:
            assert f'whaled_address_books_refused_total{{reason="{reason}"}} 1.0' in metrics
        detection = {"address_book": str(path), "max_book_loss": 1, "watch": [{"name": "x", "types": ["fund"]}]}
        daemon.write_config(tmp_path, NOBODY, detection=detection)
        path.write_text("\n".join(book(1)))
        whaled.signal(signal.SIGHUP)
        await whaled.logged("address_book_read", addresses=1, owners=1)
        idle = await whaled.logged("watch_rule_idle")
        assert "no address in " in idle["problem"]
        daemon.write_config(tmp_path, NOBODY, detection={"address_book": None})
        whaled.signal(signal.SIGHUP)
        await whaled.logged("reload_finished", addresses=0)


async def test_a_book_of_another_network_is_named_when_the_backend_is_known(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    path.write_text("\n".join(book(3)))
    async with busy_simulator(network=Network.REGTEST) as simulator:
        config = daemon.write_config(tmp_path, simulator.url, detection={"address_book": str(path)})
        async with daemon.running(config) as whaled:
            event = "address_book_network_mismatch"
            found = await whaled.logged(event)
            assert (found["level"], found["backend"]) == ("warning", "simulated regtest")
            assert found["addresses"] == {"mainnet": 3}
            whaled.signal(signal.SIGHUP)
            await whaled.logged(event, times=2)


async def test_a_stop_during_a_reload_ends_the_reader_too(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    config = daemon.write_config(tmp_path, NOBODY, detection={"address_book": str(path)})
    path.write_text("\n".join(book(10)))
    async with daemon.running(config) as whaled:
        path.write_text("\n".join(book(40_000)))
        whaled.signal(signal.SIGHUP)
        reader = await child_of(whaled.process.pid, "whaled.addressbook.bookfile")
        os.kill(reader, signal.SIGSTOP)
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0
        assert not is_there(reader)


async def test_every_gauge_returns_to_zero_after_misbehaving_clients(tmp_path: Path) -> None:
    async with busy_simulator() as simulator, daemon.running(daemon.write_config(tmp_path, simulator.url)) as whaled:

        async def visit() -> None:
            async with whaled.connect() as client:
                await ask(client, type="subscribe", since={"last": 50})
                await receive_type(client, "subscribed")
                client.transport.abort()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                tasks.create_task(visit())

        async def gauges() -> dict[str, float]:
            lines = (await get(whaled.http + "/metrics")).splitlines()
            names = ("connections", "connections_unauthenticated", "clients_live", "clients_replaying", "filters")
            found = dict(line.split() for line in lines if line.startswith("whaled_") and "{" not in line)
            return {name: float(found[f"whaled_{name}"]) for name in names}

        async with asyncio.timeout(10):
            while any((left := await gauges()).values()):
                pass
        assert set(left.values()) == {0.0}
        whaled.signal(signal.SIGTERM)
        assert await whaled.ended() == 0


@pytest.mark.parametrize("follows", [True, False])
async def test_retention_checks_the_clock_against_the_blocks_with_a_backfill(tmp_path: Path, follows: bool) -> None:
    async with open_log(tmp_path / "whaled.db") as log:
        await log.append([alert_draft(1, at=LONG_AGO)])
        await log.write(notes.put_scan, scan(800_000, LONG_AGO))
    config = daemon.write_config(tmp_path, NOBODY, backfill={"enabled": follows})
    async with daemon.running(config) as whaled:
        if follows:
            await whaled.logged("retention_suspended")
        async with asyncio.timeout(10):
            while f"whaled_eventlog_oldest_offset {1.0 if follows else 2.0}" not in await get(whaled.http + "/metrics"):
                pass
