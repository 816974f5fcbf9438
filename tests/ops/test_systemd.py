"""What systemd is told, and that a manager that does not read holds nobody up. The socket is a real one."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from kit import daemon
from whaled.ops.systemd import MAX_WAITING, Notifier

LIMIT_S = 20


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        yield sock


def received(manager: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(manager.recv(65536).decode())
        except BlockingIOError:
            return found


def fill(manager: socket.socket) -> None:
    """Nothing more goes into the manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        while True:
            try:
                sock.sendto(b"FULL", manager.getsockname())
            except BlockingIOError:
                return


async def until_received(manager: socket.socket, last: str) -> list[str]:
    found: list[str] = []
    async with asyncio.timeout(LIMIT_S):
        while last not in found:
            found += [message for message in received(manager) if message != "FULL"]
            await asyncio.sleep(0.01)
    return found


def test_each_message_is_a_datagram(manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.ready()
    notifier.alive()
    notifier.status("3 clients; größte 5 BTC")
    notifier.status("3 clients; größte 5 BTC")
    notifier.reloading()
    notifier.stopping()
    notifier.close()
    *others, reloading, stopping = received(manager)
    assert others == ["READY=1", "STATUS=3 clients; größte 5 BTC"]
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert stopping == "STOPPING=1"


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel makes an abstract name
        name = sock.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        notifier = Notifier()
        notifier.ready()
        notifier.close()
        sock.setblocking(False)
        assert received(sock) == ["READY=1"]


# sdnotify leaves the socket that it could not connect to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["", "/nonexistent/notify", "vsock-stream:2:4711", "@"])
def test_without_a_manager_nothing_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    notifier = Notifier()
    for _ in range(2 * MAX_WAITING):
        notifier.ready()
    notifier.status("status")
    notifier.close()
    notifier.ready()


async def test_messages_that_the_manager_acts_on_are_kept_until_it_reads(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    fill(manager)
    notifier = Notifier()
    notifier.reloading()
    notifier.status("not now")
    notifier.ready()
    notifier.alive()
    notifier.stopping()
    found = await until_received(manager, "WATCHDOG=1")
    assert [message.partition("=")[0] for message in found] == ["RELOADING", "READY", "STOPPING", "WATCHDOG"]
    notifier.status("not now")
    assert received(manager) == ["STATUS=not now"]
    notifier.close()


async def test_a_ping_that_cannot_be_sent_in_time_is_dropped(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")  # a third is sooner than the next attempt
    fill(manager)
    notifier = Notifier()
    notifier.alive()
    await asyncio.sleep(0.02)
    notifier.stopping()
    assert await until_received(manager, "STOPPING=1") == ["STOPPING=1"]
    notifier.close()


@pytest.mark.slow
async def test_the_number_of_waiting_messages_is_bounded(manager: socket.socket) -> None:
    fill(manager)
    notifier = Notifier()
    for _ in range(1000):
        notifier.reloading()
        notifier.ready()
    notifier.stopping()
    assert len(await until_received(manager, "STOPPING=1")) == MAX_WAITING
    notifier.close()


@pytest.mark.slow
async def test_a_manager_that_does_not_read_does_not_stop_the_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1500000"}
        fill(manager)
        async with daemon.running(config, env=environment) as whaled:
            async with aiohttp.ClientSession() as session:
                for _ in range(3):
                    await asyncio.sleep(0.6)  # a ping is due each 0.5 s
                    async with session.get(whaled.http + "/healthz") as response:
                        assert response.status == 200
            found = await until_received(manager, "WATCHDOG=1")
            assert found[0] == "READY=1"
            whaled.process.terminate()
            assert await whaled.ended(LIMIT_S) == 0
            assert "STOPPING=1" in received(manager)
