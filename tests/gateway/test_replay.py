"""Replays to clients without a socket: pages in order, the end of a replay, and clients that do not keep up."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kit.delivery import BOUND_BYTES, Client, Log, Meter
from kit.whales import BTC, whale
from whaled.gateway.hub import Hub
from whaled.gateway.pages import LostError, Pages
from whaled.gateway.replay import Replay, TooSlowError
from whaled.gateway.share import LoopShare
from whaled.metrics import Metrics
from whaled.model import Event, Kind
from whaled.whales.filters import EVERYTHING, Filter

NOTHING = Filter(min_sat=21_000_000 * BTC)


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.gateway.replay.UNKNOWN_ROOM_BYTES", 1_000)


def events(*offsets: int) -> list[Event]:
    return [Event(offset=offset, kind=Kind.ALERT, at=1.0, whale=whale(offset)) for offset in offsets]


class Rig:
    """A log of events, and a hub whose head is the newest of them."""

    def __init__(self, stored: list[Event], slow_timeout_s: float) -> None:
        self.log = Log()
        self.log.events = stored
        share = LoopShare(Meter().worked)
        self.hub = Hub(epoch="e", head=stored[-1].offset, meter=Metrics().gateway, slice_bytes=BOUND_BYTES)
        self.pages = Pages(log=self.log, share=share, head=lambda: self.hub.head, at_once=5)
        self.replay = Replay(pages=self.pages, hub=self.hub, share=share, slow_timeout_s=slow_timeout_s)

    async def run(self, client: Client, chosen: Filter = EVERYTHING, cursor: int = 0) -> int:
        """Replay to a client that reads all the time."""
        run = asyncio.ensure_future(self.replay.run(client, client, chosen, cursor))
        while not run.done():
            client.read()
            await asyncio.sleep(0)
        client.read()
        return run.result()


@asynccontextmanager
async def rig(*stored: int, slow_timeout_s: float = 60.0) -> AsyncIterator[Rig]:
    made = Rig(events(*stored), slow_timeout_s)
    reading = asyncio.create_task(made.pages.run())
    try:
        yield made
    finally:
        reading.cancel()


async def test_a_replay_sends_what_follows_the_cursor_and_then_delivers_live() -> None:
    async with rig(*range(1, 31)) as made:
        client = Client()
        assert await made.run(client, cursor=7) == 23
        assert client.offsets == list(range(8, 31))
        assert client.charged == 23
        made.hub.publish(events(31))
        client.read()
        assert client.offsets[-1] == 31


async def test_a_replay_without_a_match_ends_with_the_position_and_is_charged_all_the_same() -> None:
    async with rig(*range(1, 31)) as made:
        client = Client()
        assert await made.run(client, NOTHING) == 0
        assert client.charged == 30
        payload = client.received[client.received.index(b"{") :]
        assert json.loads(payload)["position"] == {"epoch": "e", "offset": 30}


async def test_an_event_published_during_a_replay_arrives_once() -> None:
    async with rig(*range(1, 31)) as made:
        client = Client()
        run = asyncio.ensure_future(made.replay.run(client, client, EVERYTHING, 0))
        for offset in range(31, 41):
            client.read()
            await asyncio.sleep(0)
            new = events(offset)
            made.log.events += new
            made.hub.publish(new)
        while not run.done():
            client.read()
            await asyncio.sleep(0)
        client.read()
        assert client.offsets == list(range(1, 41))


async def test_a_client_that_does_not_read_is_too_slow() -> None:
    async with rig(*range(1, 31), slow_timeout_s=0.01) as made:
        client = Client()
        with pytest.raises(TooSlowError):
            await made.replay.run(client, client, EVERYTHING, 0)
        client.read()
        assert client.offsets == list(range(1, len(client.offsets) + 1))


async def test_an_event_that_retention_removed_ends_the_replay() -> None:
    async with rig(*range(11, 21)) as made:
        with pytest.raises(LostError):
            await made.run(Client(), cursor=3)
