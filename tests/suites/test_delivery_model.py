"""Delivery as a model: clients join, lag, resume and change filters in any order, and get each event once, in order."""

import asyncio
from collections.abc import Awaitable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kit.delivery import BOUND_BYTES, Client, Log, Meter
from kit.whales import BTC, whale
from whaled.gateway.hub import Hub, OffsetGapError
from whaled.gateway.pages import Pages
from whaled.gateway.replay import Replay
from whaled.gateway.share import LoopShare
from whaled.metrics import Metrics
from whaled.model import Event, Kind
from whaled.whales.filters import EVERYTHING, Filter

FILTERS = [EVERYTHING, Filter(min_sat=300 * BTC), Filter(min_sat=21_000_000 * BTC)]


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.gateway.replay.UNKNOWN_ROOM_BYTES", 1_000)


class Delivery(RuleBasedStateMachine):
    """The real hub and replay between a log and clients of ours; no socket, no clock."""

    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.log = Log()
        self.all: list[Client] = []
        self.run(self._begin())

    def run(self, awaitable: Awaitable[None]) -> None:
        self.loop.run_until_complete(asyncio.wait_for(awaitable, 10))

    async def _begin(self) -> None:
        share = LoopShare(Meter().worked)
        self.hub = Hub(epoch="e", head=0, meter=Metrics().gateway, slice_bytes=BOUND_BYTES)
        pages = Pages(log=self.log, share=share, head=lambda: self.hub.head, at_once=5)
        self.replays = Replay(pages=pages, hub=self.hub, share=share, slow_timeout_s=60)
        self.reading = self.loop.create_task(pages.run())

    def deliver(self, client: Client, cursor: int) -> None:
        client.replay = self.loop.create_task(self.replays.run(client, client, client.chosen, cursor))

    def leave(self, client: Client) -> None:
        self.hub.leave(client)
        if client.replay is not None:
            client.replay.cancel()
            client.replay = None

    async def steps(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    @rule(sizes=st.lists(st.sampled_from([100, 400]), min_size=1, max_size=8))
    def publish(self, sizes: list[int]) -> None:
        first = len(self.log.events) + 1
        events = [
            Event(offset=offset, kind=Kind.ALERT, at=1.0, whale=whale(offset, float(btc)))
            for offset, btc in enumerate(sizes, start=first)
        ]
        self.log.events += events
        self.run(self._publish(events))

    async def _publish(self, events: list[Event]) -> None:
        self.hub.publish(events)

    @rule(target=clients)
    def join(self) -> Client:
        client = Client(self.deliver)
        client.subscribe(EVERYTHING, self.hub.head)
        self.run(self._join(client))
        self.all.append(client)
        return client

    async def _join(self, client: Client) -> None:
        self.hub.join(client, client.chosen)

    @rule(client=clients, chosen=st.sampled_from(FILTERS), back=st.integers(0, 30))
    def resume(self, client: Client, chosen: Filter, back: int) -> None:
        self.run(self._resume(client, chosen, max(0, self.hub.head - back)))

    async def _resume(self, client: Client, chosen: Filter, cursor: int) -> None:
        self.leave(client)
        client.subscribe(chosen, cursor)
        self.deliver(client, cursor)

    @rule(client=clients)
    def read(self, client: Client) -> None:
        client.read()

    @rule(count=st.integers(1, 30))
    def pass_time(self, count: int) -> None:
        self.run(self.steps(count))

    @invariant()
    def nothing_is_doubled_or_out_of_order(self) -> None:
        for client in self.all:
            wanted = self.wanted(client)
            assert client.offsets == wanted[: len(client.offsets)]

    def wanted(self, client: Client) -> list[int]:
        return [event.offset for event in self.log.events[client.start :] if client.chosen.matches(event)]

    def teardown(self) -> None:
        try:
            self.run(self._finish())
        finally:
            self.loop.close()

    async def _finish(self) -> None:
        while any(client.unsent or (client.replay is not None and not client.replay.done()) for client in self.all):
            for client in self.all:
                client.read()
            await self.steps(1)
        for client in self.all:
            assert client.offsets == self.wanted(client)
        self.reading.cancel()


Delivery.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestDelivery = Delivery.TestCase


@pytest.mark.parametrize("offsets", [[2], [0], [1, 3], [1, 1], [2, 1]])
def test_events_that_leave_a_gap_are_not_published(offsets: list[int]) -> None:
    hub = Hub(epoch="e", head=0, meter=Metrics().gateway, slice_bytes=BOUND_BYTES)
    with pytest.raises(OffsetGapError):
        hub.publish([Event(offset=offset, kind=Kind.ALERT, at=1.0, whale=whale(offset)) for offset in offsets])
    assert hub.head == 0
