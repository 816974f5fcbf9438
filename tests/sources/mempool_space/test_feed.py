"""The feed against real servers on loopback: recorded frames, the simulator, and servers that are no backend at all."""

import asyncio
import errno
import gc
import gzip
import json
import os
import re
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.http11 import Request, Response

from kit.odd_answers import ODD, answering
from kit.paths import DATA
from whaled.config.sections import UpstreamSettings
from whaled.errors import ConfigError
from whaled.model import UpstreamState
from whaled.registry import Registry
from whaled.sampling import Sampler
from whaled.simulator.faults import PAYLOADS, Garbage
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.source import Connected, Continuity, Lost, MempoolChange, StateChanged, StreamMessage
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.dialect import Delta, DialectFault, decode, subscribe_frames
from whaled.sources.mempool_space.feed import Feed, Outage, delay_range_s
from whaled.sources.mempool_space.http import RestFailure, RestMeter
from whaled.sources.mempool_space.link import CLOSE_TIMEOUT_S
from whaled.sources.mempool_space.link_errors import LossReason, diagnose
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.rest import Rest

RECORDING = DATA / "regtest-1.jsonl.gz"
# A run of the backend, and the one after its restart.
FIRST_RUN, SECOND_RUN = 1, 13
M = TypeVar("M", bound=StreamMessage)
Stream = AsyncGenerator[StreamMessage, None]


@cache
def recorded(run: int) -> tuple[str, ...]:
    """What the backend sent on one recorded connection; the first frame is the init object."""
    with gzip.open(RECORDING, "rt") as lines:
        entries = map(json.loads, lines)
        return tuple(entry["raw"] for entry in entries if entry["conn"] == run and entry["dir"] == "in")


class Recorder(FeedMeter):
    """The metrics of one feed, which also remembers the order of what it counts."""

    def __init__(self) -> None:
        self._registry = Registry()
        self.states: list[UpstreamState] = []
        super().__init__(self._registry)
        self.states.clear()
        self.losses: list[LossReason] = []
        self.raw_bytes: list[int] = []
        self.faults: list[DialectFault] = []
        self.continuity: list[Continuity] = []

    def lost(self, reason: LossReason) -> None:
        super().lost(reason)
        self.losses.append(reason)

    def state(self, state: UpstreamState) -> None:
        super().state(state)
        self.states.append(state)

    def received(self, raw_bytes: int, decode_s: float) -> None:
        assert decode_s >= 0
        super().received(raw_bytes, decode_s)
        self.raw_bytes.append(raw_bytes)

    def undecodable(self, fault: DialectFault) -> None:
        super().undecodable(fault)
        self.faults.append(fault)

    def observed(self, continuity: Continuity) -> None:
        super().observed(continuity)
        self.continuity.append(continuity)

    def value(self, metric: str, **labels: str) -> float | None:
        return self._registry.collectors.get_sample_value(f"whaled_upstream_{metric}", labels)


class Peer:
    """The backend's side of one connection."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.path = connection.request.path if connection.request is not None else ""
        self.heard: list[str] = []
        self.pings = 0

    async def send(self, *frames: str | bytes) -> None:
        for frame in frames:
            await self.connection.send(frame)

    def drop(self) -> None:
        """End without a close frame, as the backend does."""
        self.connection.transport.abort()


class Backend:
    """A WebSocket server that answers init with a recorded frame, and pings unless it is mute."""

    def __init__(self) -> None:
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.init: str | None = recorded(FIRST_RUN)[0]
        self.is_mute = False
        self.port = 0

    def url(self, path: str = "/api/v1/ws", scheme: str = "ws", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def handle(self, connection: ServerConnection) -> None:
        peer = Peer(connection)
        with suppress(ConnectionClosed):
            await self.converse(peer, connection)

    async def converse(self, peer: Peer, connection: ServerConnection) -> None:
        async for message in connection:
            peer.heard.append(str(message))
            if message == '{"action":"ping"}':
                peer.pings += 1
                if not self.is_mute:
                    await peer.send('{"pong":true}')
            if message == '{"action":"init"}' and self.init is not None:
                await peer.send(self.init)
            if len(peer.heard) == len(subscribe_frames()):
                self.peers.put_nowait(peer)

    @asynccontextmanager
    async def listening(self, port: int = 0, **options: Any) -> AsyncIterator[Server]:
        server = await serve(self.handle, "127.0.0.1", port, ping_interval=None, **options)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield server
        finally:
            server.close(close_connections=False)
            for connection in list(server.connections):
                connection.transport.abort()
            await server.wait_closed()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    backend = Backend()
    async with backend.listening():
        yield backend


@pytest.fixture
def meter() -> Recorder:
    return Recorder()


@pytest.fixture(autouse=True)
async def tidy() -> AsyncIterator[None]:
    """No test leaves a task behind."""
    before = asyncio.all_tasks()
    yield
    for _ in range(10):  # servers of the test may need a turn of the loop
        if asyncio.all_tasks() <= before | {asyncio.current_task()}:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"tasks left behind: {asyncio.all_tasks() - before}")


def settings(url: str, **changes: Any) -> UpstreamSettings:
    quick = {"connect_timeout": 2.0, "reconnect_initial": 0.001, "reconnect_max": 0.004}
    return UpstreamSettings(**{"url": url, **quick, **changes})


def feed(url: str, meter: Recorder, **changes: Any) -> AbstractAsyncContextManager[Stream]:
    return aclosing(Feed(settings(url, **changes), meter).messages())


async def until(stream: Stream, kind: type[M], where: Callable[[M], bool] = lambda _: True) -> M:
    """The next message of this kind; everything before it is passed over."""
    async with asyncio.timeout(5):
        async for message in stream:
            if isinstance(message, kind) and where(message):
                return message
    raise AssertionError("the feed ended")


async def collect(stream: Stream, count: int) -> list[MempoolChange]:
    return [await until(stream, MempoolChange) for _ in range(count)]


def delta_of(message: MempoolChange) -> Delta | None:
    """The delta of the frame that the message was."""
    return message.entered if isinstance(message.entered, Delta) else None


def has_delta(message: MempoolChange) -> bool:
    return delta_of(message) is not None


def sequence(message: MempoolChange) -> int | None:
    delta = delta_of(message)
    return delta.sequence if delta is not None else None


def is_pong(message: MempoolChange) -> bool:
    """Whether a message changes nothing: the backend answered a ping."""
    pong = decode('{"pong":true}')
    return message == change_of(pong, received_at=message.received_at, received_monotonic=message.received_monotonic)


async def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# --- subscription and order ---


@pytest.mark.parametrize("path", ["/api/v1/ws", "/ws/track-mempool-tx", "", "/nonsense?x=1"])
async def test_the_subscription_is_sent_on_any_path(backend: Backend, meter: Recorder, path: str) -> None:
    async with feed(backend.url(path), meter) as stream:
        assert await until(stream, Connected) == Connected(1)
        peer = await backend.peers.get()
    assert peer.heard == list(subscribe_frames())
    assert [json.loads(frame) for frame in peer.heard] == [
        {"action": "init"},
        {"action": "want", "data": ["blocks", "stats", "mempool-blocks"]},
        {"track-mempool": True},
    ]
    assert peer.path == (path or "/")


async def test_a_recorded_run_arrives_whole_and_in_order(backend: Backend, meter: Recorder) -> None:
    first, *others = recorded(FIRST_RUN)
    async with feed(backend.url("/api/v1/ws", host="localhost"), meter) as stream:
        assert await anext(stream) == Connected(1)
        assert await anext(stream) == StateChanged(UpstreamState.CONNECTED, "in sync")
        peer = await backend.peers.get()
        await peer.send(*others)
        received = await collect(stream, len(recorded(FIRST_RUN)))
    assert meter.raw_bytes == [len(frame) for frame in (first, *others)]
    assert len(received) == len(meter.raw_bytes)
    deltas = [message for message in received if has_delta(message)]
    assert [sequence(message) for message in deltas] == list(range(1, 28))
    assert [message.continuity for message in deltas] == [Continuity.FIRST, *[Continuity.IN_ORDER] * 26]
    assert all(message.continuity is None for message in received if not has_delta(message))
    assert meter.states == [UpstreamState.DISCONNECTED, UpstreamState.CONNECTED]


async def test_receipt_is_stamped_with_both_clocks(backend: Backend, meter: Recorder) -> None:
    stamped = Feed(settings(backend.url()), meter, clock=lambda: 1_795_376_507.5, monotonic=lambda: 12.5)
    async with aclosing(stamped.messages()) as stream:
        received = await until(stream, MempoolChange)
    assert (received.received_at, received.received_monotonic) == (1_795_376_507.5, 12.5)


@pytest.mark.parametrize("frame", [0, 2])
async def test_a_message_is_forgotten_before_the_next_one_is_waited_for(
    backend: Backend, meter: Recorder, frame: int
) -> None:
    # 0 answers the subscription, 2 has a delta.
    async with feed(backend.url(), meter) as stream:
        message = await until(stream, MempoolChange)
        if frame:
            await (await backend.peers.get()).send(recorded(FIRST_RUN)[frame])
            message = await until(stream, MempoolChange, has_delta)
        waiting = asyncio.ensure_future(anext(stream))
        async with asyncio.timeout(5):
            while sys.getrefcount(message) > 2:  # noqa: ASYNC110 - `message`, and the argument of the call
                await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_consumer_that_takes_its_time_loses_nothing_and_the_link_stays(
    backend: Backend, meter: Recorder
) -> None:
    others = recorded(FIRST_RUN)[1:]
    impatient = Backend()
    impatient.is_mute = True
    async with (
        impatient.listening(),
        feed(backend.url(), meter, ping_interval=0.02, stale_after=0.1) as stream,
        feed(impatient.url(), Recorder(), ping_interval=0.02, stale_after=0.1) as other,
    ):
        await until(stream, Connected)
        peer = await backend.peers.get()
        async with asyncio.TaskGroup() as group:
            group.create_task(peer.send(*others))
            # Longer than stale_after, by the clock of a link that does go stale meanwhile.
            await until(other, Lost)
            received = await collect(stream, 1 + len(others))
    assert meter.raw_bytes[1:] == [len(frame) for frame in others]
    assert [sequence(message) for message in received[1:] if has_delta(message)] == list(range(1, 28))
    assert meter.losses == []


# --- what the backend is up to ---


async def test_a_backend_restart_is_distinguished_from_a_gap(backend: Backend, meter: Recorder) -> None:
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        peer = await backend.peers.get()
        await peer.send(*recorded(FIRST_RUN)[1:])
        await until(stream, MempoolChange, lambda message: sequence(message) == 27)
        backend.init, *others = recorded(SECOND_RUN)[:14]
        peer.drop()
        assert (await until(stream, Lost)).reason is LossReason.CLOSED
        # The new process is not in sync: no difficulty in its init object.
        await until(stream, Connected)
        assert await anext(stream) == StateChanged(UpstreamState.DEGRADED, "the backend is not in sync")
        await (await backend.peers.get()).send(*others)
        first = await until(stream, MempoolChange, lambda message: message.continuity is not None)
        assert (sequence(first), first.continuity) == (0, Continuity.RESTARTED)
        recovered = await until(stream, StateChanged)
        assert recovered.state is UpstreamState.CONNECTED
        in_sync = await until(stream, MempoolChange, has_delta)
        assert (sequence(in_sync), in_sync.continuity) == (1, Continuity.IN_ORDER)
    assert meter.continuity.count(Continuity.RESTARTED) == 1
    assert meter.continuity.count(Continuity.NOT_IN_SYNC) == 8


async def test_a_jump_of_the_sequence_after_a_reconnect_is_a_gap(backend: Backend, meter: Recorder) -> None:
    frames = recorded(FIRST_RUN)
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        peer = await backend.peers.get()
        await peer.send(frames[2])
        await until(stream, MempoolChange, lambda message: message.continuity is Continuity.FIRST)
        peer.drop()
        await until(stream, Connected)
        await (await backend.peers.get()).send(frames[8])
        assert (await until(stream, MempoolChange, has_delta)).continuity is Continuity.GAP


def quiet_simulator() -> Simulator:
    return Simulator(SimulatorSettings(port=0, manual=True, rate=0))


async def polled_until(simulator: Simulator, coming: Coroutine[Any, Any, M]) -> M:
    """Let the simulated backend poll its node until the feed has told what is waited for."""
    async with asyncio.TaskGroup() as group:
        told = group.create_task(coming)
        while not told.done():
            await simulator.poll()
    return told.result()


async def test_a_lost_bitcoind_degrades_the_link_until_it_is_back(meter: Recorder) -> None:
    async with (
        Simulator(SimulatorSettings(port=0, manual=True, rate=0)) as simulator,
        feed(simulator.url, meter) as stream,
    ):
        assert (await until(stream, StateChanged)).state is UpstreamState.CONNECTED
        simulator.lose_bitcoind()
        change = await polled_until(simulator, until(stream, StateChanged))
        assert change == StateChanged(UpstreamState.DEGRADED, "the backend is not in sync")
        simulator.find_bitcoind()
        change = await polled_until(simulator, until(stream, StateChanged))
        assert change == StateChanged(UpstreamState.CONNECTED, "in sync")


async def test_the_simulators_whales_arrive(meter: Recorder) -> None:
    async with (
        Simulator(SimulatorSettings(port=0, manual=True, rate=0)) as simulator,
        feed(simulator.url, meter) as stream,
    ):
        await until(stream, Connected)
        simulator.world.pay(150 * 100_000_000)
        delta = delta_of(await polled_until(simulator, until(stream, MempoolChange, has_delta)))
    assert delta is not None
    assert len(delta.at_least(100 * 100_000_000)) == 1


async def test_a_whale_of_the_simulator_gets_its_inputs_over_rest(meter: Recorder) -> None:
    registry = Registry()
    value = registry.collectors.get_sample_value
    async with (
        quiet_simulator() as simulator,
        Rest.open(UpstreamSettings(url=simulator.url), RestMeter(registry)) as rest,
        feed(simulator.url, meter) as stream,
    ):
        await until(stream, Connected)
        simulator.world.pay(150 * 100_000_000)
        delta = delta_of(await polled_until(simulator, until(stream, MempoolChange, has_delta)))
        assert delta is not None
        (whale,) = delta.at_least(100 * 100_000_000)
        assert all(spent.prevout is None for spent in whale.inputs)
        (filled,) = await rest.prevouts([whale], 2.0)
        assert await rest.tip_height() == simulator.world.chain.tip.height
    spent_sat = sum(spent.prevout.value for spent in filled.inputs if spent.prevout is not None)
    assert whale.fee_sat is not None
    assert spent_sat == whale.value_sat + whale.fee_sat
    assert value("whaled_errors_total", {"component": "rest"}) == 0
    assert [value("whaled_rest_inputs_unknown_total", {"reason": reason}) for reason in RestFailure] == [0] * len(
        RestFailure
    )
    assert abs(value("whaled_upstream_clock_skew_seconds") or 0) < 60


# --- garbage ---


@pytest.mark.parametrize("kind", Garbage)
async def test_garbage_is_skipped_and_the_next_frame_arrives(backend: Backend, meter: Recorder, kind: Garbage) -> None:
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        peer = await backend.peers.get()
        await peer.send(PAYLOADS[kind], recorded(FIRST_RUN)[2])
        good = await until(stream, MempoolChange, lambda message: sequence(message) == 1)
    assert len(good.entered.added) == 10
    assert meter.losses == []
    assert meter.faults or meter.value("parts_skipped_total")


async def test_a_flood_of_garbage_is_counted_each_and_logged_once(backend: Backend, meter: Recorder) -> None:
    with capture_logs() as lines:
        async with feed(backend.url(), meter) as stream:
            await until(stream, Connected)
            peer = await backend.peers.get()
            async with asyncio.TaskGroup() as group:
                group.create_task(peer.send(*["<html>"] * 50, recorded(FIRST_RUN)[2]))
                await until(stream, MempoolChange, has_delta)
    assert meter.faults == [DialectFault.MALFORMED] * 50
    (line,) = [line for line in lines if line["event"] == "upstream_message_skipped"]
    assert line["sample"] == "<html>"


async def test_unknown_keys_are_counted_and_the_rest_is_used(backend: Backend, meter: Recorder) -> None:
    frame = json.loads(recorded(FIRST_RUN)[2])
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        await (await backend.peers.get()).send(json.dumps({**frame, "brand-new": 1}))
        await until(stream, MempoolChange, has_delta)
    assert meter.value("keys_unknown_total") == 1


def test_a_sampler_lets_the_first_through_then_one_per_interval_with_the_count() -> None:
    now = 0.0
    sampler = Sampler(10.0, lambda: now)
    assert [sampler.admit("a") for _ in range(3)] == [0, None, None]
    assert sampler.admit("b") == 0
    now = 10.0
    assert [sampler.admit("a"), sampler.admit("a")] == [2, None]


# --- losing the link and coming back ---


async def test_a_dropped_link_is_reported_and_comes_back(backend: Backend, meter: Recorder) -> None:
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        (await backend.peers.get()).drop()
        lost = [await until(stream, StateChanged, lambda change: change.state is UpstreamState.DISCONNECTED)]
        # With the reason of the kernel where it had one: whaled had asked something that was not read any more.
        assert lost[0].why.startswith("the connection ended without a close frame")
        assert (await until(stream, Lost)).reason is LossReason.CLOSED
        assert await until(stream, Connected) == Connected(2)
        assert (await until(stream, StateChanged)).state is UpstreamState.CONNECTED
    assert (meter.value("connects_total"), meter.losses) == (2, [LossReason.CLOSED])


async def test_the_last_frame_of_a_dropped_link_waits_for_no_garbage_collection(
    backend: Backend, meter: Recorder
) -> None:
    filler = json.dumps({"filler": "x" * 100_000})
    gc.collect()
    gc.disable()
    try:
        async with feed(backend.url(), meter) as stream:
            await until(stream, Connected)
            peer = await backend.peers.get()
            await peer.send(filler)
            await until(stream, MempoolChange, lambda _: len(filler) in meter.raw_bytes)
            peer.drop()
            await until(stream, Lost)
            await until(stream, Connected)
            held = [each for each in gc.get_objects() if type(each) is Frame and len(each.data) >= len(filler)]
        assert held == []
    finally:
        gc.enable()


async def test_a_close_by_the_server_is_quoted(backend: Backend, meter: Recorder) -> None:
    with capture_logs() as lines:
        async with feed(backend.url(), meter) as stream:
            await until(stream, Connected)
            await (await backend.peers.get()).connection.close(1013, "come back later")
            assert (await until(stream, Lost)).reason is LossReason.CLOSED
    (line,) = [line for line in lines if line["event"] == "upstream_link_lost"]
    assert "come back later" in line["detail"]


def test_a_delay_is_a_part_of_the_outage_between_its_bounds() -> None:
    upstream = settings("ws://127.0.0.1:1", reconnect_initial=0.5, reconnect_max=30.0)
    assert delay_range_s(upstream, 0.0) == (0.25, 0.5)
    assert delay_range_s(upstream, 2.0) == (0.25, 0.5)
    assert delay_range_s(upstream, 3.0) == (0.375, 0.75)  # a restarted backend is found again within a second
    assert delay_range_s(upstream, 60.0) == (7.5, 15.0)
    assert delay_range_s(upstream, 1e9) == (15.0, 30.0)


def test_an_outage_is_as_long_as_the_link_was_down_and_did_not_hold_since() -> None:
    outage = Outage(1000.0)
    assert outage.lost(1000.0, None) == 0.0
    assert outage.lost(1003.0, None) == 3.0
    assert outage.lost(1046.0, 1004.0) == 0.0  # it held for 42 s: what comes now is another outage
    assert outage.lost(1050.0, None) == 4.0
    for second in range(1, 61):  # accepted and dropped at once, again and again
        assert outage.lost(1050.0 + second, 1050.0 + second) == 4.0 + second


async def test_delays_grow_with_jitter_up_to_the_bound_and_start_over_after_a_stable_link(meter: Recorder) -> None:
    backend, port, now = Backend(), await free_port(), 0.0
    upstream = settings(f"ws://127.0.0.1:{port}", reconnect_initial=0.002, reconnect_max=0.016, stable_after=60.0)
    async with aclosing(Feed(upstream, meter, monotonic=lambda: now).messages()) as stream:
        delays = []
        for _ in range(30):
            low, high = delay_range_s(upstream, now)
            delays.append((await until(stream, Lost)).next_delay_s)
            assert low <= delays[-1] <= high
            now += delays[-1]
        assert max(delays) > 0.008
        assert len(set(delays)) > 15
        async with backend.listening(port):
            assert (await until(stream, Connected)).attempt > 20
            (await backend.peers.get()).drop()  # not stable: it goes on counting
            assert (await until(stream, Lost)).next_delay_s > 0.002
            assert (await until(stream, Connected)).attempt > 21
            now += 60.0
            (await backend.peers.get()).drop()
            assert (await until(stream, Lost)).next_delay_s <= 0.002
            assert (await until(stream, Connected)).attempt == 2


async def test_each_lost_link_is_one_log_line_with_reason_and_delay(meter: Recorder) -> None:
    port = await free_port()
    with capture_logs() as lines:
        async with feed(f"ws://user:secret@127.0.0.1:{port}/ws?key=secret", meter) as stream:
            lost = [await until(stream, Lost) for _ in range(3)]
    assert [line["event"] for line in lines] == ["upstream_link_lost"] * 3
    assert [line["next_attempt_s"] for line in lines] == [round(each.next_delay_s, 3) for each in lost]
    assert {line["reason"] for line in lines} == {"refused"}
    assert {line["url"] for line in lines} == {f"ws://127.0.0.1:{port}/ws"}
    assert "secret" not in repr(lines)
    assert meter.losses == [LossReason.REFUSED] * 3


async def test_silence_with_answered_pings_keeps_the_link(backend: Backend, meter: Recorder) -> None:
    async with feed(backend.url(), meter, ping_interval=0.02, stale_after=0.1) as stream:
        await until(stream, MempoolChange)
        pongs = await collect(stream, 12)
    assert all(is_pong(pong) for pong in pongs)
    assert meter.losses == []
    assert meter.states == [UpstreamState.DISCONNECTED, UpstreamState.CONNECTED]


async def test_silence_with_unanswered_pings_is_suspect_then_stale_then_reconnected(
    backend: Backend, meter: Recorder
) -> None:
    backend.is_mute = True
    async with feed(backend.url(), meter, ping_interval=0.02, stale_after=0.1) as stream:
        await until(stream, MempoolChange)
        assert await anext(stream) == StateChanged(UpstreamState.DEGRADED, "a ping is unanswered")
        assert (await anext(stream)) == StateChanged(
            UpstreamState.DISCONNECTED, "nothing received for 0.1 s (upstream.stale_after), pings unanswered"
        )
        assert (await until(stream, Lost)).reason is LossReason.STALE
        backend.is_mute = False
        await until(stream, Connected)
        assert (await until(stream, StateChanged)).state is UpstreamState.CONNECTED
    assert (await backend.peers.get()).pings == 4


async def test_a_ping_comes_before_the_link_is_stale_whatever_the_intervals(backend: Backend, meter: Recorder) -> None:
    async with feed(backend.url(), meter, ping_interval=30.0, stale_after=0.1) as stream:
        await until(stream, MempoolChange)
        assert is_pong(await until(stream, MempoolChange))


async def test_a_suspect_link_recovers_with_the_next_frame(backend: Backend, meter: Recorder) -> None:
    backend.is_mute = True
    async with feed(backend.url(), meter, ping_interval=0.02, stale_after=5.0) as stream:
        await until(stream, MempoolChange)
        peer = await backend.peers.get()
        assert (await until(stream, StateChanged)).state is UpstreamState.DEGRADED
        await peer.send(recorded(FIRST_RUN)[2])
        assert (await until(stream, StateChanged)).state is UpstreamState.CONNECTED
    assert meter.losses == []


async def test_a_frame_above_the_limit_is_reported_with_the_key_and_the_link_comes_back(
    backend: Backend, meter: Recorder
) -> None:
    enormous = max(recorded(SECOND_RUN), key=len)
    with capture_logs() as lines:
        async with feed(backend.url(), meter, max_message=1_000_000) as stream:
            await until(stream, Connected)
            peer = await backend.peers.get()
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(peer.send(enormous))
                assert (await until(stream, Lost)).reason is LossReason.TOO_BIG
                sending.cancel()
            await until(stream, Connected)
    (line,) = [line for line in lines if line["event"] == "upstream_link_lost"]
    assert "upstream.max_message (1000000 bytes); raise it" in line["detail"]


async def test_a_frame_of_megabytes_arrives_by_default(backend: Backend, meter: Recorder) -> None:
    enormous = max(recorded(SECOND_RUN), key=len)
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        await (await backend.peers.get()).send(enormous)
        received = await until(stream, MempoolChange, lambda _: meter.raw_bytes[-1] == len(enormous))
    assert len(received.entered.added) == 1108


# --- what is no backend ---


async def lost_at(url: str, meter: Recorder, **changes: Any) -> tuple[str, str]:
    """Why no link comes to be, and what the operator reads."""
    with capture_logs() as lines:
        async with feed(url, meter, **changes) as stream:
            reason = (await until(stream, Lost)).reason
    (line,) = [line for line in lines if line["event"] == "upstream_link_lost"]
    assert line["reason"] == reason
    return reason, line["detail"]


@asynccontextmanager
async def tcp_server(answer: bytes | None) -> AsyncIterator[int]:
    """Says one thing to everybody, or nothing (None); the port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None:
            writer.write(answer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def status_server(status: HTTPStatus, location: str | None = None) -> AbstractAsyncContextManager[Server]:
    """A web server that has no WebSocket."""

    def respond(connection: ServerConnection, request: Request) -> Response:
        response = connection.respond(status, "nothing here\n")
        if location is not None:
            response.headers["Location"] = location
        return response

    return Backend().listening(process_request=respond)


async def test_nothing_listening_is_refused_on_every_address_of_a_name(meter: Recorder) -> None:
    port = await free_port()
    for host in ("127.0.0.1", "localhost"):
        assert await lost_at(f"ws://{host}:{port}", meter) == (
            LossReason.REFUSED,
            "nothing listens there; is the mempool backend running?",
        )


@pytest.mark.parametrize(
    ("status", "location", "says"),
    [
        (HTTPStatus.NOT_FOUND, None, r"HTTP 404 for ws://.*/x; is upstream.url a mempool backend\? .*/api/v1/ws"),
        (HTTPStatus.OK, None, "HTTP 200 .*is upstream.url a mempool backend"),
        (HTTPStatus.FORBIDDEN, None, "HTTP 403: the server, or a proxy in front of it, refuses access"),
        (HTTPStatus.BAD_GATEWAY, None, "HTTP 502: a proxy answered, the mempool backend behind it did not"),
        (HTTPStatus.FOUND, "https://h/ws", "302, redirected to https://h/ws; set upstream.url to wss://h/ws"),
        (HTTPStatus.MOVED_PERMANENTLY, "https://[::1", "301, redirected to"),
    ],
)  # fmt: skip
async def test_a_web_server_without_a_websocket_is_reported_by_its_status(
    meter: Recorder, status: HTTPStatus, location: str | None, says: str
) -> None:
    async with status_server(status, location) as server:
        port = server.sockets[0].getsockname()[1]
        reason, detail = await lost_at(f"ws://127.0.0.1:{port}/x", meter)
    assert reason is LossReason.HANDSHAKE
    assert re.search(says, detail)


@pytest.mark.parametrize("head", ODD.values(), ids=ODD.keys())
async def test_an_odd_answer_is_one_more_lost_link_and_tried_again(meter: Recorder, head: bytes) -> None:
    async with answering(head) as place, feed(f"ws://{place}", meter, connect_timeout=5.0) as stream:
        lost = await until(stream, Lost)
        assert lost.reason in {LossReason.BUSY, LossReason.HANDSHAKE, LossReason.CLOSED}
        assert meter.losses == [lost.reason]
        if lost.reason is not LossReason.BUSY:  # it asks to be left alone
            assert (await until(stream, Lost)).reason is lost.reason


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("two Retry-After headers", "HTTP 503: not at the moment; Retry-After of 9 s"),
        ("429, two Retry-After headers", "HTTP 429: too many requests or connections from here; Retry-After of 9 s"),
        ("a valid and an invalid Retry-After", "HTTP 503: not at the moment; Retry-After of 3 s"),
        ("two invalid Retry-After headers", "no Retry-After, so the usual delays apply"),
        ("a nonexistent year", "HTTP 503: a proxy answered, the mempool backend behind it did not"),
        ("two locations", "HTTP 302, redirected to http://a.example/; set upstream.url to ws://a.example/"),
        ("two empty locations", "HTTP 302 for ws://"),
    ],
)
async def test_the_readable_part_of_a_repeated_header_is_reported(meter: Recorder, head: str, says: str) -> None:
    async with answering(ODD[head]) as place:
        _, detail = await lost_at(f"ws://{place}", meter)
    assert says in detail


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 101\r\n\r\n"])
async def test_a_server_of_another_protocol_fails_the_handshake(meter: Recorder, greeting: bytes) -> None:
    async with tcp_server(greeting) as port:
        reason, detail = await lost_at(f"ws://127.0.0.1:{port}", meter)
    assert reason is LossReason.HANDSHAKE
    assert "is upstream.url a mempool backend?" in detail


async def test_a_server_that_accepts_and_sends_nothing_times_out(meter: Recorder) -> None:
    async with tcp_server(None) as port:
        reason, detail = await lost_at(f"ws://127.0.0.1:{port}", meter, connect_timeout=0.05)
    assert (reason, detail) == (LossReason.TIMEOUT, "no connection within upstream.connect_timeout (0.05 s)")


async def test_an_echo_websocket_is_not_accepted_as_a_backend(meter: Recorder) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        reason, detail = await lost_at(f"ws://127.0.0.1:{port}", meter, connect_timeout=0.1)
    assert reason is LossReason.NOT_MEMPOOL
    assert "it sent '{\"track-mempool\":true}'; is upstream.url a mempool backend?" in detail
    assert meter.value("connects_total") == 0


async def test_a_silent_websocket_is_not_accepted_as_a_backend(backend: Backend, meter: Recorder) -> None:
    backend.init = None
    reason, detail = await lost_at(backend.url(), meter, connect_timeout=0.1)
    assert reason is LossReason.NOT_MEMPOOL
    assert "it sent nothing" in detail


async def test_a_broken_websocket_frame_is_a_protocol_error(backend: Backend, meter: Recorder) -> None:
    with capture_logs() as lines:
        async with feed(backend.url(), meter) as stream:
            await until(stream, Connected)
            (await backend.peers.get()).connection.transport.write(b"\xff\xff\xff\xff")
            assert (await until(stream, Lost)).reason is LossReason.PROTOCOL
    assert any("broke the WebSocket protocol" in line.get("detail", "") for line in lines)


async def test_an_untrusted_certificate_is_refused(
    meter: Recorder, certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    chain, key, _ = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    backend = Backend()
    async with backend.listening(ssl=context):
        reason, detail = await lost_at(backend.url(scheme="wss", host="localhost"), meter)
    assert reason is LossReason.TLS
    assert "the certificate is not accepted: " in detail
    assert "SSL_CERT_FILE" in detail


async def test_a_certificate_of_a_trusted_authority_is_accepted(
    meter: Recorder,
    certificate: tuple[Path, Path, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    chain, key, trusting = certificate
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("".join(map(ssl.DER_cert_to_PEM_cert, trusting.get_ca_certs(binary_form=True))))
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    backend = Backend()
    async with backend.listening(ssl=context), feed(backend.url(scheme="wss", host="localhost"), meter) as stream:
        assert await until(stream, Connected) == Connected(1)


async def test_tls_to_a_server_without_it_is_reported(meter: Recorder) -> None:
    async with tcp_server(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") as port:
        reason, detail = await lost_at(f"wss://127.0.0.1:{port}", meter)
    assert reason is LossReason.TLS
    assert "does the server speak TLS" in detail


def test_a_name_that_cannot_be_resolved_is_a_dns_loss() -> None:
    with pytest.raises(socket.gaierror) as caught:
        socket.getaddrinfo("no number", 1, flags=socket.AI_NUMERICHOST)  # fails without asking anybody
    assert diagnose(caught.value, UpstreamSettings()).reason is LossReason.DNS


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)), LossReason.OTHER),
        (ConnectionResetError(errno.ECONNRESET, "reset"), LossReason.CLOSED),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), LossReason.TIMEOUT),
        (EOFError("ended"), LossReason.OTHER),
    ],
)
def test_other_network_errors_have_a_reason(error: Exception, reason: LossReason) -> None:
    assert diagnose(error, UpstreamSettings()).reason is reason


@pytest.mark.parametrize(
    ("url", "proxy", "key"),
    [
        ("http://127.0.0.1:8999/api/v1/ws", None, "upstream.url"),
        ("ws://127.0.0.1:99999", None, "upstream.url"),
        ("ws://[::1", None, "upstream.url"),
        (f"ws://{'a' * 64}.example", None, "upstream.url"),
        ("ws://127.0.0.1:8999", "ftp://127.0.0.1", "upstream.proxy"),
        ("ws://127.0.0.1:8999", "socks4://127.0.0.1:9050", "upstream.proxy"),
    ],
)
async def test_a_url_that_can_never_work_is_the_operators_fault(
    meter: Recorder, url: str, proxy: str | None, key: str
) -> None:
    async with feed(url, meter, proxy=proxy) as stream:
        with pytest.raises(ConfigError, match=rf"^{key}: found .*write it like "):
            await anext(stream)


async def test_a_proxy_in_the_environment_is_not_used(
    backend: Backend, meter: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = await free_port()
    for name in ("ws_proxy", "http_proxy", "all_proxy", "socks_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    async with feed(backend.url(), meter) as stream:
        assert await until(stream, Connected) == Connected(1)


# --- the end ---


async def consume(stream_of: AbstractAsyncContextManager[Stream], seen: asyncio.Queue[StreamMessage]) -> None:
    async with stream_of as stream:
        async for message in stream:
            seen.put_nowait(message)


# What "at once" is told apart from is a minute; a busy machine takes its time.
AT_ONCE_S = 5.0


async def cancelled_within(task: asyncio.Task[None], limit_s: float) -> None:
    task.cancel()
    async with asyncio.timeout(limit_s):
        await asyncio.wait([task])
    assert task.cancelled()


async def test_cancelling_while_connecting_ends_at_once(meter: Recorder) -> None:
    accepted = asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server, asyncio.TaskGroup() as group:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        task = group.create_task(consume(feed(url, meter, connect_timeout=60.0), asyncio.Queue()))
        await accepted.wait()
        await cancelled_within(task, AT_ONCE_S)


async def test_cancelling_while_backing_off_ends_at_once(meter: Recorder) -> None:
    seen: asyncio.Queue[StreamMessage] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        url = f"ws://127.0.0.1:{await free_port()}"
        task = group.create_task(consume(feed(url, meter, reconnect_initial=60.0, reconnect_max=60.0), seen))
        assert isinstance(await seen.get(), Lost)
        await cancelled_within(task, AT_ONCE_S)


async def test_cancelling_while_connected_closes_politely(backend: Backend, meter: Recorder) -> None:
    seen: asyncio.Queue[StreamMessage] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(consume(feed(backend.url(), meter), seen))
        peer = await backend.peers.get()
        while not isinstance(await seen.get(), MempoolChange):
            pass
        await cancelled_within(task, AT_ONCE_S)
    await peer.connection.wait_closed()
    assert peer.connection.close_code == 1000


@pytest.mark.slow
async def test_cancelling_against_a_peer_that_stopped_reading_ends_within_bound(
    backend: Backend, meter: Recorder
) -> None:
    seen: asyncio.Queue[StreamMessage] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(consume(feed(backend.url(), meter), seen))
        peer = await backend.peers.get()
        while not isinstance(await seen.get(), MempoolChange):
            pass
        peer.connection.transport.pause_reading()
        await cancelled_within(task, CLOSE_TIMEOUT_S + AT_ONCE_S)
        peer.connection.transport.resume_reading()


async def test_leaving_the_iteration_closes_the_link(backend: Backend, meter: Recorder) -> None:
    async with feed(backend.url(), meter) as stream:
        await until(stream, Connected)
        peer = await backend.peers.get()
    await peer.connection.wait_closed()
    assert peer.connection.close_code == 1000


async def test_a_dying_sibling_in_the_task_group_takes_the_feed_with_it(backend: Backend, meter: Recorder) -> None:
    async def die() -> None:
        await backend.peers.get()
        raise RuntimeError("sibling")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(consume(feed(backend.url(), meter), asyncio.Queue()))
            group.create_task(die())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert [str(each) for each in caught.value.exceptions] == ["sibling"]
