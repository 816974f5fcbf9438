"""What systemd gives a service and hears from it: passed sockets, the watchdog, the status line. No systemd needed."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from kit import daemon
from kit.books import book
from kit.daemon import busy_simulator
from kit.gateway import receive_type
from kit.whales import alert_draft, confirmed_draft
from whaled.config.sections import EventLogSettings
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.registry import Registry

pytestmark = pytest.mark.slow

# Becomes whaled with the descriptors given to it at 3 and up, as systemd does it.
LAUNCHER = """
import fcntl, os, sys
names, *descriptors = sys.argv[1].split(",")
moved = [fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 100) for descriptor in descriptors]
for number, descriptor in enumerate(moved):
    os.dup2(descriptor, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(moved)), LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, "-m", "whaled", "run", "--config", sys.argv[2]])
"""


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Manager"]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(self.path))
            sock.setblocking(False)
            loop = asyncio.get_running_loop()

            def read() -> None:
                self.said += sock.recv(65536).decode().split("\n")
                self._changed.set()

            loop.add_reader(sock, read)
            try:
                yield self
            finally:
                loop.remove_reader(sock)

    async def heard(self, condition: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(daemon.START_LIMIT_S):
            while not condition(self.said):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def launched(config: Path, names: str, sockets: list[socket.socket]) -> AsyncIterator[daemon.Daemon]:
    """The daemon with passed sockets."""
    descriptors = [sock.fileno() for sock in sockets]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCHER, ",".join([names, *map(str, descriptors)]), str(config),
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, pass_fds=descriptors,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    whaled = daemon.Daemon(process)
    listener = asyncio.create_task(whaled.listen())
    try:
        yield whaled
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await listener


def listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    return f"ws://127.0.0.1:{sock.getsockname()[1]}"


async def test_passed_sockets_are_served_and_the_configured_ports_stay_closed(tmp_path: Path) -> None:
    with listening() as clients, listening() as other, contextlib.closing(socket.socket(socket.AF_UNIX)) as metrics:
        metrics.bind(str(tmp_path / "metrics.sock"))
        metrics.listen()
        with socket.create_server(("127.0.0.1", 0)) as taken:  # opening the configured port would fail
            config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", gateway={"port": taken.getsockname()[1]})
            async with launched(config, "ws:ws:metrics", [clients, other, metrics]) as whaled:
                ready = await whaled.logged("daemon_ready")
                assert ready["listen"] == f"{url_of(clients)}, {url_of(other)}"
                assert ready["metrics"] == f"http://unix:{tmp_path}/metrics.sock/metrics"
                for sock in (clients, other):
                    async with connect(url_of(sock), proxy=None) as client:
                        await receive_type(client, "welcome")
                connector = aiohttp.UnixConnector(str(tmp_path / "metrics.sock"))
                async with (
                    aiohttp.ClientSession(connector=connector) as session,
                    session.get("http://whaled/metrics") as response,
                ):
                    assert "whaled_connections_opened_total 2.0" in await response.text()


async def test_a_restart_with_passed_sockets_refuses_no_client(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    outcomes: list[str] = []
    enough = asyncio.Event()

    async def connecting(url: str) -> None:
        while not enough.is_set():
            try:
                async with connect(url, proxy=None, open_timeout=20) as client:
                    await receive_type(client, "welcome")
                    outcomes.append("served")
            except ConnectionClosed as closed:
                outcomes.append(f"closed {closed.rcvd.code if closed.rcvd else None}")
            except OSError as error:
                outcomes.append(f"refused: {error!r}")

    with listening() as clients:
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(connecting(url_of(clients))) for _ in range(4)]
            for _ in range(3):
                async with launched(config, "ws", [clients]) as whaled:
                    await whaled.logged("daemon_ready")
                    async with asyncio.timeout(20):
                        served = len(outcomes)
                        while len(outcomes) < served + 40:
                            await asyncio.wait(loops, timeout=0.01)
                    whaled.process.terminate()
                    assert await whaled.ended() == 0
            # What waits in the socket now is served by the next one.
            async with launched(config, "ws", [clients]) as whaled:
                await whaled.logged("daemon_ready")
                enough.set()
                await asyncio.wait(loops)
    assert set(outcomes) <= {"served", "closed 1012"}
    assert outcomes.count("served") > 100


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [("web", socket.SOCK_STREAM, "'web'"), ("ws", socket.SOCK_DGRAM, "ListenStream="), ("", socket.SOCK_STREAM, "''")],
)
async def test_a_socket_that_is_of_no_use_is_named(
    tmp_path: Path, name: str, kind: socket.SocketKind, said: str
) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            sock.listen()
        async with launched(config, name, [sock]) as whaled:
            assert await whaled.ended() == 78
            await whaled.heard_all()
    assert said in "\n".join(whaled.raw)
    assert "Traceback" not in "\n".join(whaled.raw)


async def test_the_watchdog_is_fed_and_the_status_line_is_current(tmp_path: Path) -> None:
    async with busy_simulator() as simulator, Manager(tmp_path / "notify").listening() as manager:
        config = daemon.write_config(tmp_path, simulator.url, canary={"interval": "200ms", "deadline": "1s"})
        env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"}
        async with daemon.running(config, env=env) as whaled:
            await manager.heard(lambda said: said.count("WATCHDOG=1") >= 5)
            assert "READY=1" in manager.said
            assert manager.said.index("READY=1") < manager.said.index("WATCHDOG=1")
            await manager.heard(lambda said: any(" BTC; offset " in line for line in said))
            status = next(line for line in manager.said if " BTC; offset " in line)
            assert status.startswith("STATUS=upstream connected; 0 clients; last whale 2")
            assert status.endswith(f"; clients connect to {whaled.url.removeprefix('ws://')}")
            whaled.process.terminate()
            assert await whaled.ended() == 0
            assert "STOPPING=1" in manager.said


async def test_after_a_restart_the_last_whale_is_the_one_in_the_log(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with EventLog.open(EventLogSettings(path=str(tmp_path / "whaled.db")), EventLogMeter(Registry())) as log:
        await log.append([alert_draft(1, 150.25), alert_draft(2, 300.5), confirmed_draft(2, 300.5)])
    async with (
        Manager(tmp_path / "notify").listening() as manager,
        daemon.running(config, env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as whaled,
        aiohttp.ClientSession() as session,
    ):
        await manager.heard(lambda said: any("; last whale " in line for line in said))
        async with session.get(f"{whaled.http}/metrics") as response:
            metrics = await response.text()
    (status,) = {line.partition("; ")[2] for line in manager.said if "; last whale " in line}
    assert status.startswith("0 clients; last whale 2027-01-15T08:00:00Z 300.50 BTC; offset 3; ")
    assert "\nwhaled_last_whale_timestamp_seconds 1.8e+09\n" in metrics
    assert '\nwhaled_whales_total{flow="unknown"} 0.0\n' in metrics  # it is no new whale


async def test_an_unreachable_backend_does_not_starve_the_watchdog(tmp_path: Path) -> None:
    async with Manager(tmp_path / "notify").listening() as manager:
        (tmp_path / "book.csv").write_text("\n".join(book(3)))
        config = daemon.write_config(
            tmp_path,
            "ws://127.0.0.1:1",
            canary={"interval": "100ms", "deadline": "200ms"},
            detection={"address_book": str(tmp_path / "book.csv")},
        )
        env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "300000"}
        async with daemon.running(config, env=env):
            await manager.heard(lambda said: said.count("WATCHDOG=1") >= 12)
            status = next(line for line in manager.said if line.startswith("STATUS=upstream disconnected"))
            assert status.endswith("; address book: 3 addresses of 3 owners")


async def test_another_process_s_watchdog_is_left_alone(tmp_path: Path) -> None:
    async with Manager(tmp_path / "notify").listening() as manager:
        config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
        env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
        async with daemon.running(config, env=env) as whaled:
            whaled.process.terminate()
            assert await whaled.ended() == 0
            await manager.heard(lambda said: "STOPPING=1" in said)
        assert "WATCHDOG=1" not in manager.said
