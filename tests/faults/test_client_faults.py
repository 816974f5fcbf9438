"""Misbehaving clients: all others receive every event once and in order, and memory stays bounded."""

import asyncio
import os
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException

from faults.followers import Follower, RawFollower
from faults.net import Proxy
from faults.rig import PICKY_BTC, Rig, rigged
from kit.fuzz import CORPUS
from kit.gateway import SMALL_SEGMENT, silent_client
from whaled.auth.keys import generate, ring_of
from whaled.auth.keys import read as read_keys
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.model import Permission

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

STRANGERS = 10_000
# A refused or waiting connection costs a few KiB, which must be freed.
GROWTH_LIMIT_MB = 60.0
FLOODS = 12
# The longest wait for one connection: thousands at once are slow on a small machine.
STRANGER_S = 120
# Timeouts that detect misbehaving clients within the duration of a test.
STRICT = {
    "slow_timeout": "2s", "ping_interval": "1s", "ping_timeout": "1s", "handshake_timeout": "2s", "auth_timeout": "2s",
    "max_unsent": "64KiB", "max_connections_per_address": 1_000_000,
}  # fmt: skip


@pytest.fixture
def descriptors() -> Iterator[int]:
    """Raise the limit of descriptors to its maximum, for this process and the daemons it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_mb(rig: Rig) -> float:
    assert rig.daemon is not None
    pages = int(Path(f"/proc/{rig.daemon.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def open_descriptors(rig: Rig) -> int:
    assert rig.daemon is not None
    return len(os.listdir(f"/proc/{rig.daemon.process.pid}/fd"))  # noqa: PTH208


def direct(rig: Rig) -> str:
    """Return the daemon's own URL, which bypasses the proxy."""
    assert rig.daemon is not None
    return rig.daemon.url


async def calm(rig: Rig, descriptors_before: int) -> None:
    """Wait until the daemon has closed every other connection."""

    async def is_calm() -> bool:
        return open_descriptors(rig) <= descriptors_before + 4

    await rig.until(is_calm)


async def closed(rig: Rig, code: int, *, more_than: float = 0) -> int:
    """Return the number of sessions that ended with a close code, once it exceeds `more_than`."""
    count = 0.0

    async def is_closed() -> bool:
        nonlocal count
        count = (await rig.metrics()).get("whaled_connections_closed_total", code=str(code))
        return count > more_than

    await rig.until(is_closed)
    return int(count)


# A client that reads nothing answers no ping either. It must be closed for its unsent bytes, not for a missing pong.
NO_PINGS = {**STRICT, "ping_interval": "1h", "ping_timeout": "1h"}


async def test_clients_that_read_nothing_are_closed_and_delay_no_other_client(tmp_path: Path) -> None:
    async with rigged(tmp_path, "clients that read nothing", sections={"gateway": NO_PINGS}) as rig:
        await rig.go(10)
        await rig.start()
        await rig.settle()
        before = open_descriptors(rig)
        with ExitStack() as socks:
            for _ in range(60):
                socks.enter_context(silent_client(direct(rig), receive_buffer=4096, segment_bytes=SMALL_SEGMENT))
            for _ in range(4):
                await rig.go(30, pace_s=0.02)
                await rig.settle()
            assert await closed(rig, 1013, more_than=59) == 60
            await calm(rig, before)
        seen = await rig.metrics()
        assert seen.total("whaled_connections_closed_total") == 60
        await rig.finish(closed=60)


# The client is 70 KB behind before it lags, since the buffers on the way hold that much.
LAG_POLLS = 60
SLOW_BYTES, SLOW_PAUSE_S = 2_000, 0.2


async def test_a_client_that_lags_far_behind_catches_up_from_the_log(tmp_path: Path) -> None:
    """The client is not closed, since it reads, but it reads more slowly than events arrive."""
    patience = {"slow_timeout": "10m", "ping_interval": "10m", "ping_timeout": "10m"}
    gateway = {"max_unsent": "16KiB", "replay_page": 50, **patience}
    async with (
        Proxy(receive_buffer=4096).serving() as slow,
        rigged(tmp_path, "a client that lags", sections={"gateway": gateway}) as rig,
    ):
        await rig.plain.end()
        # The pongs for its pings arrive after all that it has not read.
        rig.plain = Follower(f"ws://{slow.address}", ping_s=600.0)
        rig.plain.begin()
        await rig.go(10)
        await rig.start()
        host, port = direct(rig).removeprefix("ws://").split(":")
        slow.target = (host, int(port))
        await rig.settle()
        lagged = 0.0
        for _ in range(3):
            slow.pace.at_once, slow.pace.pause_s = SLOW_BYTES, SLOW_PAUSE_S

            async def lags_more(than: float = lagged) -> bool:
                return (await rig.metrics()).total("whaled_clients_lagged_total") > than

            while not await lags_more():
                await rig.go(10, pace_s=0.01)
            await rig.go(LAG_POLLS, pace_s=0.01)  # events that it must receive from the log
            slow.pace.at_once, slow.pace.pause_s = 65_536, 0.0
            await rig.settle()
            lagged = (await rig.metrics()).total("whaled_clients_lagged_total")
        seen = await rig.metrics()
        # The other followers may close their connections on a busy machine: they wait 2 s for a pong.
        assert [seen.get("whaled_connections_closed_total", code=code) for code in ("1008", "1013")] == [0, 0]
        replayed = seen.total("whaled_messages_replayed_total")
        assert replayed >= LAG_POLLS
        await rig.finish(lagged=int(lagged), replayed=int(replayed))


async def test_half_open_connections_are_closed_and_their_clients_resume(tmp_path: Path) -> None:
    async with rigged(tmp_path, "half-open clients", sections={"gateway": STRICT}) as rig:
        await rig.go(10)
        await rig.start()
        await rig.settle()
        before = open_descriptors(rig)
        gone = 0
        for _ in range(4):
            rig.gateway.freeze()
            await rig.go(20, pace_s=0.02)
            await rig.settle()  # the clients have detected it and reconnected; whaled received no close
            gone += 3  # plain, picky and raw; a client that was frozen while it reconnected adds to them
            assert await closed(rig, 1006, more_than=gone - 1) >= gone
        await calm(rig, before)
        await rig.finish()


# --- floods and rubbish ----------------------------------------------------------------------------------------------


async def flood(url: str, rng: random.Random, ends: Counter[str]) -> None:
    """Send messages as fast as possible, until the server closes the connection."""
    messages = ['{"type":"ping"}', '{"type":"stats"}', '{"type":"subscribe","since":{"last":100000}}', "{}", "["]
    message = rng.choice(messages)
    client = await connect(url, proxy=None, compression=None, max_size=None, ping_interval=None)
    with suppress(WebSocketException):
        async with asyncio.timeout(60):
            while True:
                await client.send(message)
    ends[f"{client.close_code} {client.close_reason}"] += 1
    client.transport.abort()


async def rubbish(url: str, payloads: list[bytes], rng: random.Random, ends: Counter[str]) -> None:
    """Send every input of the fuzz corpus, as a text or as a binary message."""
    for payload in rng.sample(payloads, len(payloads)):
        with suppress(WebSocketException, TimeoutError):
            async with asyncio.timeout(30), connect(url, proxy=None, compression=None, max_size=None) as client:
                await client.recv()
                text = payload.decode("utf-8", "replace") if rng.random() < 0.7 else payload
                await client.send(text)
                await client.recv()
                ends["answered"] += 1


async def no_websocket(url: str, rng: random.Random, ends: Counter[str]) -> None:
    """Send what port scanners send."""
    host, port = url.removeprefix("ws://").split(":")
    beginnings = (
        b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"GET /" + b"a" * 70_000, b"\x00" * 5_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5_000, rng.randbytes(3_000),
    )  # fmt: skip
    for beginning in beginnings:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.timeout(STRANGER_S):
                # A client that is refused while it still sends receives a reset.
                with suppress(ConnectionError):
                    writer.write(beginning)
                    await writer.drain()
                    await reader.read()
            ends["refused"] += 1
        except TimeoutError:
            ends["left waiting"] += 1
        writer.transport.abort()


@pytest.mark.parametrize("seed", [1, 2])
async def test_floods_and_garbage_affect_only_their_senders(tmp_path: Path, seed: int) -> None:
    payloads = [path.read_bytes()[:20_000] for path in sorted((CORPUS / "clients").iterdir())]
    ends: Counter[str] = Counter()
    async with rigged(tmp_path, "floods and rubbish", seed=seed, sections={"gateway": STRICT}) as rig:
        await rig.go(10)
        await rig.start()
        await rig.settle()
        before = open_descriptors(rig)
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(flood(direct(rig), rig.rng, ends)) for _ in range(FLOODS)]
            jobs += [tasks.create_task(rubbish(direct(rig), payloads, rig.rng, ends)) for _ in range(3)]
            jobs += [tasks.create_task(no_websocket(direct(rig), rig.rng, ends)) for _ in range(3)]
            while not all(job.done() for job in jobs):
                await rig.go(pace_s=0.05)
        # 1006: a client that does not read up to the close frame, or still sends when it arrives, receives a reset.
        assert ends["1008 Rate limit exceeded"] + ends["1013 Too slow"] + ends["1006 "] == FLOODS, ends
        assert ends["refused"] == 27, ends
        await rig.settle()
        await calm(rig, before)
        assert (await rig.metrics()).get("whaled_errors_total", component="gateway") == 0
        await rig.finish(answered=ends["answered"])


# --- unauthenticated clients -----------------------------------------------------------------------------------------


async def unauthenticated_client(url: str, ends: Counter[str]) -> None:
    """Connect and never authenticate."""
    try:
        async with asyncio.timeout(STRANGER_S):
            client = await connect(url, proxy=None, compression=None, open_timeout=None, ping_interval=None)
            await client.wait_closed()
            ends[str(client.close_code)] += 1
    except InvalidStatus as refused:
        ends[str(refused.response.status_code)] += 1
    except (OSError, EOFError, InvalidHandshake, TimeoutError) as error:
        ends[type(error).__name__] += 1


def silent_tcp(rig: Rig, socks: ExitStack) -> None:
    """Open a connection that does not send a handshake."""
    host, port = direct(rig).removeprefix("ws://").split(":")
    sock = socks.enter_context(socket.socket())
    sock.setblocking(False)
    sock.connect_ex((host, int(port)))


async def test_10000_unauthenticated_clients_leave_memory_bounded_and_clients_served(
    tmp_path: Path, descriptors: int
) -> None:
    ring = tmp_path / "keys.json"
    generate(ring, 1.0)
    token, _ = issue(
        ring_of(read_keys(ring), ring), client_id="c1", permissions=[Permission.READ], ttl_s=3600, now=time.time(),
        token_id="t", settings=AuthSettings(),
    )  # fmt: skip
    sections = {"gateway": STRICT, "auth": {"enabled": True, "key_ring": str(ring)}}
    async with rigged(tmp_path, "10,000 strangers", sections=sections) as rig:
        for name, least in (("plain", None), ("picky", PICKY_BTC)):
            await getattr(rig, name).end()
            follower = Follower(f"ws://{rig.gateway.address}", least, token=token)
            setattr(rig, name, follower)
            follower.begin()
        await rig.raw.end()
        rig.raw = RawFollower(f"ws://{rig.gateway.address}", token)
        rig.raw.begin()
        await rig.go(10)
        await rig.start()
        await rig.settle()
        fds, memory = open_descriptors(rig), resident_mb(rig)
        peak = memory
        ends: Counter[str] = Counter()
        with ExitStack() as socks:
            async with asyncio.TaskGroup() as tasks:
                jobs: list[asyncio.Task[None]] = []
                while len(jobs) < STRANGERS:
                    jobs += [tasks.create_task(unauthenticated_client(direct(rig), ends)) for _ in range(250)]
                    for _ in range(50):
                        silent_tcp(rig, socks)
                    received = len(rig.plain.received)
                    await rig.go(2, pace_s=0.05)
                    await rig.plain.has(received + 1)
                    peak = max(peak, resident_mb(rig))
        await rig.settle()
        await calm(rig, fds)
        assert sum(ends.values()) == STRANGERS
        seen = await rig.metrics()
        # How many were displaced by new clients and how many timed out depends on the speed of the machine.
        ended = seen.get("whaled_connections_closed_total", code="1008")
        assert ended + seen.total("whaled_connections_refused_total") >= STRANGERS, ends
        # 1008: accepted, and closed at the authentication timeout. 1006, InvalidMessage and ConnectionResetError:
        # displaced by a new client before or after the handshake, or timed out because this process was too slow.
        ways = ("1008", "503", "InvalidMessage", "ConnectionResetError", "1006")
        assert sum(ends[way] for way in ways) == STRANGERS, ends
        assert peak - memory < GROWTH_LIMIT_MB, f"{memory:.0f} MB, then {peak:.0f} MB"
        # The process of the 10,000 clients also serves REST, late: on a slow machine most requests for inputs time out.
        rig.is_rest_spoiled = True
        await rig.finish(came=sum(ends.values()), grown_mb=round(peak - memory), **ends)
