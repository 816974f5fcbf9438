"""Replays share what they read, take turns, and hold next to nothing; over a log that counts what is read of it."""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kit.whales import alert_draft
from whaled.gateway.hub import Hub
from whaled.gateway.pages import KEPT_BYTES, PAGE_EVENTS, LostError, Pages
from whaled.gateway.replay import ADDRESSES_AT_ONCE, Replay
from whaled.gateway.share import Lane, LoopShare
from whaled.metrics import Metrics
from whaled.model import Event, Whale
from whaled.whales.filters import EVERYTHING, Filter

NOTHING = Filter(min_sat=21_000_000 * 10**8)


def event(offset: int, addresses: int = 0) -> Event:
    draft = alert_draft(offset)
    whale = Whale(draft.whale.alert, tuple(f"bc1q{number:038d}" for number in range(addresses)))
    return Event(offset=offset, kind=draft.kind, at=draft.at, whale=whale)


class CountingLog:
    """Events without end, but for the offsets that are missing. `gate` holds reads back."""

    def __init__(self, *, addresses: int = 0, missing: frozenset[int] = frozenset()) -> None:
        self.addresses = addresses
        self.missing = missing
        self.reads: list[tuple[int, int]] = []
        self.is_asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def between(self, after: int, through: int, limit: int) -> list[Event]:
        self.reads.append((after, limit))
        self.is_asked.set()
        await self.gate.wait()
        offsets = range(after + 1, min(through, after + limit) + 1)
        return [event(offset, self.addresses) for offset in offsets if offset not in self.missing]


class Client:
    """A connection, with a socket of which somebody may read the other end."""

    def __init__(self, source: str = "c1", fd: int = -1, *, takes_deflate: bool = False) -> None:
        self.source = source
        self.takes_deflate = takes_deflate
        self.fd = fd
        self.queued = bytearray()
        self.sent = bytearray()
        self.charged = 0
        self.most_unsent = 0
        self.unsent = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    def write(self, frame: bytes) -> None:
        self.sent += frame

    def write_behind(self, data: bytes) -> bool:
        raise NotImplementedError

    def write_rest(self, rest: bytes) -> None:
        self.queued += rest
        self.most_unsent = max(self.most_unsent, len(self.queued))
        self.may_go_on.clear()

    def fell_behind(self, cursor: int) -> None:
        raise NotImplementedError

    async def drained(self) -> None:
        await self.may_go_on.wait()

    def charge_replay(self, events: int) -> None:
        self.charged += events


class Rig:
    def __init__(self, log: CountingLog, head: int, at_once: int) -> None:
        meter = Metrics().gateway
        self.log = log
        self.share = LoopShare(meter.worked)
        self.hub = Hub(epoch="e", head=head, meter=meter, slice_bytes=1 << 18)
        self.pages = Pages(log=log, share=self.share, head=lambda: self.hub.head, at_once=at_once)
        self.replay = Replay(pages=self.pages, hub=self.hub, share=self.share, slow_timeout_s=10.0)

    async def run(self, client: Client, cursor: int = 0, chosen: Filter = EVERYTHING) -> int:
        return await self.replay.run(client, client, chosen, cursor)


@asynccontextmanager
async def reading(log: CountingLog, head: int, at_once: int = 500) -> AsyncIterator[Rig]:
    rig = Rig(log, head, at_once)
    task = asyncio.create_task(rig.pages.run())
    try:
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_clients_that_replay_the_same_events_share_the_reads() -> None:
    log = CountingLog()
    clients = [Client(f"c{number}") for number in range(50)]
    async with asyncio.timeout(30), reading(log, head=1000) as rig:
        assert await asyncio.gather(*(rig.run(client, 3) for client in clients)) == [997] * 50
        assert len(log.reads) <= 1000 / PAGE_EVENTS
        assert len({bytes(client.sent) for client in clients}) == 1
        assert {client.charged for client in clients} == {997}
        assert rig.hub.live_members == 50
        assert rig.pages.kept_bytes == 0  # nobody replays


async def test_a_client_that_reads_alone_reads_more_at_once() -> None:
    log = CountingLog()
    async with asyncio.timeout(30), reading(log, head=1000) as rig:
        assert await rig.run(Client()) == 1000
        assert [limit for _, limit in log.reads] == [500, 500]
        log.reads.clear()
        waiting = True
        rig.share.add(Lane.KNOWN, lambda: waiting)
        assert await rig.run(Client(), chosen=NOTHING) == 0
        assert [limit for _, limit in log.reads] == [PAGE_EVENTS] * 10
        waiting = False
        await asyncio.sleep(0)


async def test_clients_take_turns_however_many_replays_one_of_them_has() -> None:
    log = CountingLog()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, reading(log, head=100_000) as rig:
        log.gate.clear()
        greedy = [
            tasks.create_task(rig.run(Client("greedy"), number * PAGE_EVENTS, NOTHING)) for number in range(0, 900, 5)
        ]
        await asyncio.sleep(0)
        modest = tasks.create_task(rig.run(Client("modest"), 99_950))
        await asyncio.sleep(0)
        log.gate.set()
        assert await modest == 50
        assert len(log.reads) < 10
        for task in greedy:
            task.cancel()


async def test_pages_of_cancelled_replays_are_not_read() -> None:
    log = CountingLog()
    async with asyncio.timeout(30), reading(log, head=100_000) as rig:
        log.gate.clear()
        tasks = [asyncio.create_task(rig.run(Client(), number * PAGE_EVENTS)) for number in range(500)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        log.gate.set()
        assert await rig.run(Client(), 99_990) == 10
        assert len(log.reads) <= 3


@pytest.mark.slow
@pytest.mark.long
async def test_cached_pages_are_bounded_even_for_events_with_thousands_of_addresses() -> None:
    log, most = CountingLog(addresses=2_000), 0
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks, reading(log, head=500, at_once=10) as rig:
        replays = [tasks.create_task(rig.run(Client(f"c{at}"), at, NOTHING)) for at in range(0, 200, 20)]
        while not all(replay.done() for replay in replays):
            most = max(most, rig.pages.kept_bytes)
            await asyncio.sleep(0)
    assert 0 < most <= KEPT_BYTES


async def test_nothing_is_kept_while_memory_is_short() -> None:
    log = CountingLog()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, reading(log, head=1000) as rig:
        rig.pages.keeps = False
        replays = [tasks.create_task(rig.run(Client(f"c{at}"), at)) for at in (0, 50)]
        while not all(replay.done() for replay in replays):
            assert rig.pages.kept_bytes == 0
            await asyncio.sleep(0)
    assert [replay.result() for replay in replays] == [1000, 950]


@pytest.mark.parametrize(("cursor", "missing"), [(0, {1}), (0, {250}), (120, {150}), (100, {101}), (120, {500})])
async def test_an_event_that_is_missing_ends_the_replay_after_the_one_before_it(cursor: int, missing: set[int]) -> None:
    log, client = CountingLog(missing=frozenset(missing)), Client()
    async with asyncio.timeout(30), reading(log, head=500) as rig:
        with pytest.raises(LostError):
            await rig.run(client, cursor)
        assert client.sent.count(b'"offset":') == min(missing) - cursor - 1
        assert await rig.run(Client(), min(missing)) == 500 - min(missing)  # behind it all is well


async def test_events_that_come_while_a_page_is_read_are_not_missing() -> None:
    log = CountingLog()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, reading(log, head=10) as rig:
        log.gate.clear()
        first = tasks.create_task(rig.run(Client(), 5))
        await log.is_asked.wait()
        rig.hub.publish([event(11)])
        second = tasks.create_task(rig.run(Client(), 10))
        await asyncio.sleep(0)
        log.gate.set()
        assert await first == 6
        assert await second == 1


async def read_all(sock: socket.socket, until: Callable[[], bool], client: Client) -> bytes:
    """Read as a slow client does: let the kernel run full again and again."""
    received = bytearray()
    while not until() or client.queued:
        try:
            received += sock.recv(4096)
        except BlockingIOError:
            # The kernel has room: the transport would send what is queued.
            received += client.queued
            client.queued.clear()
            client.may_go_on.set()
        await asyncio.sleep(0)
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(65536):
            received += data
    return bytes(received)


async def test_a_slow_client_receives_complete_frames_with_one_partial_frame_buffered() -> None:
    log = CountingLog()
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        near.setblocking(False)
        far.setblocking(False)
        client = Client(fd=near.fileno())
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks, reading(log, head=700) as rig:
            replay = tasks.create_task(rig.run(client))
            received = await read_all(far, replay.done, client)
        alone = Client()
        async with asyncio.timeout(30), reading(log, head=700) as rig:
            await rig.run(alone)
        assert received == bytes(alone.sent)
        assert 0 < client.most_unsent < 2 * len(received) / 700


async def test_large_events_are_judged_in_several_jobs_and_read_once() -> None:
    log = CountingLog(addresses=3000)
    client = Client()
    async with asyncio.timeout(30), reading(log, head=40, at_once=20) as rig:
        jobs = Counter[str]()
        rig.share.add(Lane.KNOWN, lambda: jobs.update(["turns"]) is None and rig.hub.live_members == 0)
        chosen = Filter(addresses=frozenset({f"bc1q{2999:038d}"}))
        assert await rig.run(client, 3, chosen) == 37
        assert jobs["turns"] >= 37 * 3000 / ADDRESSES_AT_ONCE
    assert [limit for _, limit in log.reads] == [20, 20]
    assert client.sent.count(b'"offset":') == client.charged == 37
