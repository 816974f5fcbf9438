"""A whaled at work under the eyes of a Prometheus: a busy backend with faults, and clients of every kind."""

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from kit import daemon
from kit.gateway import ask, receive_type
from kit.prometheus import ALERTS, RECORDINGS, free_port, prometheus
from whaled.auth.keys import generate, read, ring_of
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.model import Permission
from whaled.simulator.faults import Garbage
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings

Behaviour: TypeAlias = Callable[[ClientConnection], Awaitable[None]]
Happening: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
SCRAPE_S = 1
# As Grafana makes it of a scrape interval of 1 s.
RATE_INTERVAL = f"{4 * SCRAPE_S}s"
VISIT_LIMIT_S = 10


class Prometheus:
    """Ask a Prometheus."""

    def __init__(self, http: aiohttp.ClientSession, address: str) -> None:
        self._http = http
        self.url = f"http://{address}"

    async def range(self, expression: str, seconds: float) -> list[Any]:
        """The series of an expression over the last seconds; what cannot be parsed raises ValueError."""
        now = time.time()
        query = {"query": expression, "start": now - seconds, "end": now, "step": SCRAPE_S}
        async with self._http.post(f"{self.url}/api/v1/query_range", data=query) as response:
            answer = await response.json()
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer['error']}")
        series: list[Any] = answer["data"]["result"]
        return series

    async def has_data(self, expression: str, seconds: float) -> bool:
        """Whether there is a point that is a number."""
        return any(value != "NaN" for series in await self.range(expression, seconds) for _, value in series["values"])

    async def becomes(self, expression: str, *, there: bool = True) -> None:
        """Wait until an expression has data at this moment, or none."""
        while await self.has_data(expression, 0) is not there:
            pass  # the answer took its time


class Scene:
    """Where everything is, and the files of a whaled with TLS, a key ring and narrow limits."""

    def __init__(
        self, directory: Path, certificate: tuple[Path, Path, ssl.SSLContext], simulator: Simulator, canary_s: float
    ) -> None:
        self.simulator = simulator
        chain, key, self.trust = certificate
        self.http_port, self._gateway_port = free_port(), free_port()
        self._ring = directory / "keys.json"
        generate(self._ring, time.time())
        self.config = daemon.write_config(
            directory, simulator.url,
            gateway={
                "port": self._gateway_port, "tls": {"certificate": str(chain), "private_key": str(key)},
                "message_burst": 5, "messages_per_second": 5, "drain_window": "1s", "position_interval": "1s",
            },
            http={"port": self.http_port},
            auth={"enabled": True, "key_ring": str(self._ring), "failures_per_second": 100},
            canary={"interval": f"{canary_s}s", "deadline": "1s"},
            detection={"address_book": str(_address_book(directory, simulator))},
            memory={"limit": "512MiB"},
            eventlog={"path": str(directory / "whaled.db")},
        )  # fmt: skip
        self._other_ring = directory / "other.json"
        generate(self._other_ring, time.time())
        self._numbers = itertools.count()

    def connect(self, **options: Any) -> connect:
        """A connection that nobody has authenticated."""
        return connect(f"wss://localhost:{self._gateway_port}", ssl=self.trust, proxy=None, max_queue=None, **options)

    def token(self, *, forged: bool = False) -> str:
        """A token of the ring, or one of somebody else's."""
        path = self._other_ring if forged else self._ring
        token, _ = issue(
            ring_of(read(path), path), client_id=f"c{next(self._numbers)}", permissions=[Permission.READ],
            ttl_s=3600, now=time.time(), token_id="t", settings=AuthSettings(),
        )  # fmt: skip
        return token

    async def visit(self, behaviour: Behaviour, token: str = "") -> None:
        """A client that comes, does one thing and goes, or is shown out."""
        with suppress(OSError, WebSocketException, TimeoutError):  # whaled restarts, or has had enough of it
            async with asyncio.timeout(VISIT_LIMIT_S), self.connect() as client:
                await ask(client, type="auth", token=token or self.token())
                await behaviour(client)

    async def stay(self, min_btc: float) -> None:
        """A client that listens, and comes back after a restart."""

        async def listen(client: ClientConnection) -> None:
            await ask(client, type="subscribe", filters={"min_btc": min_btc})
            async for _ in client:
                pass

        while True:
            with suppress(OSError, WebSocketException):
                async with self.connect() as client:
                    await ask(client, type="auth", token=self.token())
                    await listen(client)

    async def direct(self, pace: int) -> None:
        """Let the next of all that happens happen each time so many whales have come."""
        happenings = self._happenings()
        async with asyncio.TaskGroup() as tasks:
            while True:
                with suppress(OSError, WebSocketException):
                    async with self.connect() as client:
                        await ask(client, type="auth", token=self.token())
                        while True:
                            for _ in range(pace):
                                await receive_type(client, "whale_alert")
                            tasks.create_task(next(happenings)())

    def _happenings(self) -> Iterator[Happening]:
        simulator = self.simulator

        def fault(begin: Callable[[], None]) -> Happening:
            async def happen() -> None:
                begin()

            return happen

        return itertools.cycle([
            lambda: self.visit(resume),
            fault(lambda: simulator.fail_rest(status=503)),
            lambda: self.visit(talk_too_much),
            lambda: self.visit(stay_for_an_answer, "a.b.c"),
            fault(lambda: simulator.send_garbage(Garbage.WRONG_TYPES)),
            lambda: self.visit(resume_elsewhere),
            lambda: self.visit(stay_for_an_answer, self.token(forged=True)),
            lambda: self.visit(resume),
            fault(simulator.drop_link),
        ])  # fmt: skip


async def stay_for_an_answer(client: ClientConnection) -> None:
    """Wait to be shown out."""
    await receive_type(client, "never")


async def resume(client: ClientConnection) -> None:
    """Ask for what was missed."""
    await ask(client, type="subscribe", since={"last": 20})
    await receive_type(client, "subscribed")
    await receive_type(client, "whale_alert")


async def resume_elsewhere(client: ClientConnection) -> None:
    """Ask for a position of a log that is gone."""
    await ask(client, type="subscribe", since={"epoch": "gone", "offset": 3})
    await receive_type(client, "subscribed")
    await receive_type(client, "whale_alert")


async def talk_too_much(client: ClientConnection) -> None:
    """Ask more than one may, and what cannot be read."""
    await client.send("{")
    for _ in range(20):
        await ask(client, type="stats")
    await ask(client, type="ping")
    await receive_type(client, "whale_alert")


def _address_book(directory: Path, simulator: Simulator) -> Path:
    """Exchanges to whom and from whom the simulated world pays now and then."""
    known = {script.address for script in simulator.world.wallets._contacts if script.address}
    path = directory / "book.csv"
    rows = [f"Exchange {index % 4},{address},exchange" for index, address in enumerate(sorted(known)[::3])]
    path.write_text("\n".join(["label,address,type", *rows]))
    return path


def _watching(directory: Path, scene: Scene, scrape_s: int) -> dict[str, Any]:
    """A Prometheus with the rules that are shipped, in a hurry."""
    for path in (RECORDINGS, ALERTS):
        (directory / path.name).write_text(path.read_text())
    interval = f"{scrape_s}s"
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [RECORDINGS.name, ALERTS.name],
        "scrape_configs": [
            {"job_name": "whaled", "static_configs": [{"targets": [f"127.0.0.1:{scene.http_port}"]}]}
        ],
    }  # fmt: skip


@asynccontextmanager
async def acting(
    directory: Path,
    certificate: tuple[Path, Path, ssl.SSLContext],
    settings: SimulatorSettings,
    *,
    pace: int = 5,
    canary_s: float = 1,
    scrape_s: int = SCRAPE_S,
) -> AsyncIterator[tuple[Scene, Prometheus]]:
    """Backend, clients and Prometheus; whaled itself is started by the caller, from `config`, as often as wanted."""
    async with Simulator(settings) as simulator, aiohttp.ClientSession(trust_env=False) as http:
        scene = Scene(directory, certificate, simulator, canary_s)
        async with prometheus(directory, _watching(directory, scene, scrape_s)) as address:
            clients = [scene.direct(pace), *(scene.stay(min_btc) for min_btc in (100, 100, 200, 300, 500))]
            acts = [asyncio.create_task(client) for client in clients]
            try:
                yield scene, Prometheus(http, address)
            finally:
                for act in acts:
                    act.cancel()
                await asyncio.gather(*acts, return_exceptions=True)
