"""Canaries through the real pipeline, log and hub; what stops a whale stops them."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kit.gateway import Rig, ask, receive, receive_type, running_gateway
from whaled.canary import Canary, CanaryMeter, Subscriber
from whaled.config.sections import CanarySettings, DetectionSettings
from whaled.errors import CanaryFailure, EventLogError, LogFailure
from whaled.gateway.share import Lane
from whaled.pipeline import Pipeline
from whaled.registry import Registry
from whaled.sources.mempool_space.changes import canary_change
from whaled.whales.detect import Detector, Rules
from whaled.whales.filters import EVERYTHING, Filter

QUICK = CanarySettings(interval=0.02, deadline=0.2, lost_after=0.2)


class Counted(CanaryMeter):
    """A meter that can be waited on."""

    def __init__(self) -> None:
        self._registry = Registry()
        super().__init__(self._registry)
        self.seconds: list[float] = []
        self.late_count = 0
        self._changed = asyncio.Event()

    def _value(self, metric: str, **labels: str) -> int:
        value = self._registry.collectors.get_sample_value(f"whaled_{metric}", labels)
        assert value is not None, metric
        return int(value)

    @property
    def sent_count(self) -> int:
        return self._value("canaries_sent_total")

    @property
    def connects(self) -> int:
        return self._value("canary_connect_seconds_count")

    @property
    def unreachable_count(self) -> int:
        return self._value("canary_connects_failed_total")

    @property
    def failures(self) -> list[CanaryFailure]:
        """The reason of each failure, in the order of the enum."""
        return [reason for reason in CanaryFailure for _ in range(self._value("canaries_failed_total", reason=reason))]

    def unreachable(self) -> None:
        super().unreachable()
        self._changed.set()

    def arrived_late(self, at: float) -> None:
        super().arrived_late(at)
        self.late_count += 1
        self._changed.set()

    def arrived(self, seconds: float, at: float) -> None:
        super().arrived(seconds, at)
        self.seconds.append(seconds)
        self._changed.set()

    def failed(self, reason: CanaryFailure) -> None:
        super().failed(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def singing(
    rig: Rig, settings: CanarySettings = QUICK, send: Callable[[str], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[Canary, Counted]]:
    pipeline = Pipeline(
        detector=Detector(Rules.of(DetectionSettings())),
        event_log=rig.log,
        publisher=rig.gateway,
        priority=rig.gateway.share,
        meter=rig.metrics.detection,
        inputs=None,
        inputs_wait_s=1.0,
    )

    async def rehearse(txid: str) -> None:
        await pipeline.rehearse(partial(canary_change, txid))

    counted = Counted()
    with Subscriber.connected(rig.gateway.rehearsal) as subscriber:
        canary = Canary(settings, send=send or rehearse, subscriber=subscriber, meter=counted)
        task = asyncio.create_task(canary.run())
        try:
            yield canary, counted
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.slow
async def test_canaries_arrive_and_reach_no_client(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as client, singing(rig) as (canary, counted):
        await rig.alerts(1)
        await counted.until(lambda: len(counted.seconds) >= 20)
        assert canary.is_alive()
        assert counted.failures == []
        await rig.alerts(2)
        frames = [await receive(client) for _ in range(4)]
        assert [frame["type"] for frame in frames] == ["welcome", "status", "whale_alert", "whale_alert"]
        assert [frame["position"]["offset"] for frame in frames[2:]] == [1, 2]
        await ask(client, type="subscribe", since={"last": 100})
        await receive_type(client, "subscribed")
        assert [(await receive(client))["position"]["offset"] for _ in range(2)] == [1, 2]
        assert rig.log.head == rig.gateway.hub.head == 2
        assert rig.gateway.hub.live_members == 1
        assert rig.value("whaled_events_published_total") == 2
        assert rig.value("whaled_messages_sent_total", type="whale_alert") == 4  # live two, replayed two
        assert rig.value("whaled_eventlog_events_total") == 2
        assert rig.value("whaled_whales_total", flow="unknown") == 0


async def test_a_writer_thread_that_hangs_is_noticed_and_nothing_piles_up_behind_it(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, singing(rig) as (canary, counted):
        await counted.until(lambda: len(counted.seconds) >= 2)
        release = threading.Event()
        rig.log._threads.write_thread.submit(release.wait)
        await counted.until(lambda: len(counted.failures) >= 3)
        assert set(counted.failures) == {CanaryFailure.LATE}
        assert not canary.is_alive()
        sent = counted.sent_count
        assert rig.log._threads.write_thread._work_queue.qsize() <= 1
        release.set()
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) > arrived + 2)
        assert canary.is_alive()
        assert counted.sent_count > sent


@pytest.mark.slow
async def test_a_hub_that_delivers_nothing_is_noticed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, singing(rig) as (canary, counted):
        await counted.until(lambda: len(counted.seconds) >= 2)
        rehearsal = rig.gateway.rehearsal.group
        rehearsal.filter = Filter(min_sat=21_000_000 * 10**8)
        await counted.until(lambda: len(counted.failures) >= 3)
        assert not canary.is_alive()
        rehearsal.filter = EVERYTHING
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) > arrived)


@pytest.mark.slow
@pytest.mark.parametrize("error", [EventLogError("disk full", reason=LogFailure.DISK_FULL), RuntimeError("a bug")])
async def test_a_failed_canary_is_counted_and_the_next_one_is_sent(tmp_path: Path, error: Exception) -> None:
    calls = 0

    async def broken(txid: str) -> None:
        nonlocal calls
        calls += 1
        raise error

    async with running_gateway(tmp_path) as rig, singing(rig, send=broken) as (canary, counted):
        await counted.until(lambda: len(counted.failures) >= 3)
        assert set(counted.failures) == {CanaryFailure.ERROR}
        await counted.until(lambda: not canary.is_alive())
    assert calls >= 3


async def test_the_start_has_the_time_of_one_canary(tmp_path: Path) -> None:
    now = 100.0
    async with running_gateway(tmp_path) as rig:
        with Subscriber.connected(rig.gateway.rehearsal) as subscriber:
            canary = Canary(
                CanarySettings(interval=30.0, deadline=2.0, lost_after=10.0),
                send=lambda _: asyncio.sleep(0), subscriber=subscriber, meter=Counted(), monotonic=lambda: now,
            )  # fmt: skip
            assert canary.is_alive()
            now = 140.0
            assert canary.is_alive()
            now = 140.1
            assert not canary.is_alive()


@pytest.mark.parametrize("is_secure", [False, True])
async def test_canaries_come_in_as_clients_do_and_count_as_none(
    tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext], *, is_secure: bool
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if is_secure else None
    if tls is not None:
        tls.load_cert_chain(*certificate[:2])
    # No place for a client, and none to wait for its token.
    async with running_gateway(tmp_path, tls=tls, max_connections=1, max_unauthenticated=1) as rig:
        assert rig.gateway.rehearsal.place is not None
        held = socket.create_connection(rig.gateway.rehearsal.place[1][:2])
        with held:
            async with singing(rig) as (_, counted):
                await counted.until(lambda: min(len(counted.seconds), counted.connects) >= 5)
                assert counted.failures == []
                assert len(rig.gateway.rehearsal.group) <= 2  # the last one, and the one before on its way out
                assert rig.gateway.connections <= 1
                assert rig.gateway.hub.live_members == 0
                assert held.getpeername()
        for metric in ("opened", "shed"):
            assert rig.value(f"whaled_connections_{metric}_total") == 0
        assert rig.value("whaled_messages_sent_total", type="control") == 0
        assert rig.gateway.rehearsal.expected == set()


async def test_canaries_arrive_compressed_and_plain_by_turns(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, singing(rig) as (_, counted):
        group = rig.gateway.rehearsal.group
        forms: set[str] = set()

        def both_ways() -> bool:
            forms.update(
                form for form, members in (("plain", group.plain), ("compressed", group.compressed)) if members
            )
            return len(forms) == 2 and len(counted.seconds) >= 6

        await counted.until(both_ways)
        assert counted.failures == []


async def test_canaries_that_cannot_connect_are_logged_and_bypass_the_listener(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        place, rig.gateway.rehearsal.place = rig.gateway.rehearsal.place, None
        with capture_logs() as lines:
            async with singing(rig) as (canary, counted):
                await counted.until(lambda: len(counted.seconds) >= 3)
                assert canary.is_alive()
                assert counted.failures == []
                assert counted.unreachable_count == 0
                rig.gateway.rehearsal.place = place
                await counted.until(lambda: counted.connects >= 2)
        events = [line["event"] for line in lines if line["event"].startswith("canary_listener_")]
        assert events == [
            "canary_listener_bypassed",
            "canary_listener_restored",
        ]


@pytest.mark.slow
async def test_a_listener_that_accepts_no_connection_is_detected_and_canaries_still_arrive(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, singing(rig) as (canary, counted):
        await counted.until(lambda: len(counted.seconds) >= 2)
        assert rig.gateway._listener is not None
        rig.gateway._listener.stop()
        await counted.until(lambda: counted.unreachable_count >= 2)
        assert counted.failures == []
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) > arrived)
        assert canary.is_alive()


async def test_a_late_canary_is_counted_and_is_a_sign_of_life_all_the_same(tmp_path: Path) -> None:
    settings = CanarySettings(interval=0.02, deadline=0.05, lost_after=30.0)
    async with running_gateway(tmp_path) as rig, singing(rig, settings) as (canary, counted):
        await counted.until(lambda: len(counted.seconds) >= 2)
        release = threading.Event()
        rig.log._threads.write_thread.submit(release.wait)
        await counted.until(lambda: CanaryFailure.LATE in counted.failures)
        assert canary.is_alive()
        release.set()
        await counted.until(lambda: counted.late_count == 1)
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) > arrived)


@pytest.mark.slow
async def test_a_loop_that_clients_keep_busy_delays_canaries_too(tmp_path: Path) -> None:
    """What the share of the loop cannot bound, here jobs of 30 ms, a canary feels."""
    async with running_gateway(tmp_path) as rig, singing(rig) as (_, counted):
        await counted.until(lambda: len(counted.seconds) >= 3)
        quiet_s, is_over = min(counted.seconds), False

        def job() -> bool:
            time.sleep(0.03)
            return not is_over

        rig.gateway.share.add(Lane.KNOWN, job)
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) >= arrived + 3)
        is_over = True
        assert min(counted.seconds[arrived + 1 :]) > quiet_s + 0.03
