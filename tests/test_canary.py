"""Canaries through the real pipeline, log and hub; what stops a whale stops them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support import Rig, ask, receive, receive_type, running_gateway
from whaled.canary import Canary, Subscriber
from whaled.config import sections
from whaled.errors import CanaryFailure, EventLogError, LogFailure
from whaled.pipeline import Pipeline
from whaled.whales.detect import Detector, Rules

QUICK = sections.Canary(interval=0.02, deadline=0.2)


class Counted:
    """A meter that can be waited on."""

    def __init__(self) -> None:
        self.sent_count = 0
        self.seconds: list[float] = []
        self.failures: list[CanaryFailure] = []
        self._changed = asyncio.Event()

    def sent(self) -> None:
        self.sent_count += 1

    def arrived(self, seconds: float, at: float) -> None:
        self.seconds.append(seconds)
        self._changed.set()

    def failed(self, reason: CanaryFailure) -> None:
        self.failures.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def singing(
    rig: Rig, settings: sections.Canary = QUICK, send: Callable[[str], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[Canary, Counted]]:
    pipeline = Pipeline(
        detector=Detector(Rules.of(sections.Detection())),
        log_=rig.log,
        publisher=rig.gateway,
        priority=rig.gateway.share,
        meter=rig.metrics.detection,
        inputs=None,
        inputs_wait_s=1.0,
    )
    counted = Counted()
    with Subscriber.connected() as subscriber:
        rig.gateway.hub.rehearse_to(subscriber)
        canary = Canary(settings, send=send or pipeline.rehearse, subscriber=subscriber, meter=counted)
        task = asyncio.create_task(canary.run())
        try:
            yield canary, counted
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_canaries_arrive_and_no_client_hears_of_them(tmp_path: Path) -> None:
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


async def test_a_hub_that_delivers_nothing_is_noticed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, singing(rig) as (canary, counted):
        await counted.until(lambda: len(counted.seconds) >= 2)
        members = dict(rig.gateway.hub._rehearsal.members)
        rig.gateway.hub._rehearsal.members.clear()
        await counted.until(lambda: len(counted.failures) >= 3)
        assert not canary.is_alive()
        rig.gateway.hub._rehearsal.members.update(members)
        arrived = len(counted.seconds)
        await counted.until(lambda: len(counted.seconds) > arrived)


@pytest.mark.parametrize("error", [EventLogError("disk full", reason=LogFailure.DISK_FULL), RuntimeError("a bug")])
async def test_what_breaks_a_canary_is_counted_and_the_next_one_tries_again(tmp_path: Path, error: Exception) -> None:
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
    async with running_gateway(tmp_path):
        with Subscriber.connected() as subscriber:
            canary = Canary(
                sections.Canary(interval=30.0, deadline=10.0),
                send=lambda _: asyncio.sleep(0), subscriber=subscriber, meter=Counted(), monotonic=lambda: now,
            )  # fmt: skip
            assert canary.is_alive()
            now = 140.0
            assert canary.is_alive()
            now = 140.1
            assert not canary.is_alive()
