"""From frames to events, with the real decoder, detector and log; frames of the recording and of the simulator."""

import gzip
import json
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import pytest

from whaled.config.sections import Basis, Detection, Upstream
from whaled.config.sections import EventLog as EventLogSettings
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog.store import EventLog
from whaled.model import Draft, Event, Kind, Transaction, UpstreamState, Whale
from whaled.ops.metrics import Metrics
from whaled.pipeline import Inputs, Log, Pipeline
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.upstream.dialect import decode
from whaled.upstream.feed import Feed
from whaled.upstream.news import FeedMessage, Received, StateChanged
from whaled.upstream.rehearsal import canary_frame
from whaled.upstream.rest import Rest
from whaled.whales.detect import Detector, Rules
from whaled.whales.history import History

BTC = 10**8


class Published:
    """Remembers what clients would hear."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.states: list[UpstreamState] = []
        self.canaries: list[Event] = []

    def publish(self, events: Sequence[Event]) -> None:
        self.events.extend(events)

    def rehearse(self, event: Event) -> None:
        self.canaries.append(event)

    def tell_upstream(self, state: UpstreamState) -> None:
        self.states.append(state)


def pipeline(log: Log, published: Published, inputs: Inputs | None = None, metrics: Metrics | None = None) -> Pipeline:
    return Pipeline(
        detector=Detector(Rules.of(Detection())),
        log_=log,
        publisher=published,
        meter=(metrics or Metrics()).detection,
        inputs=inputs,
        inputs_wait_s=2.0,
    )


class Recorded:
    """A feed that has these frames and then nothing."""

    def __init__(self, *frames: bytes | str) -> None:
        self._frames = frames

    async def messages(self) -> AsyncGenerator[FeedMessage, None]:
        yield StateChanged(UpstreamState.CONNECTED, "")
        for raw in self._frames:
            yield Received(
                frame=decode(raw), received_at=time.time(), received_monotonic=time.monotonic(), raw_bytes=len(raw)
            )


def opened(directory: Path) -> AbstractAsyncContextManager[EventLog]:
    return EventLog.open(EventLogSettings(path=str(directory / "w.db")), Metrics().eventlog)


async def test_a_whale_is_committed_then_published_and_its_fates_follow(tmp_path: Path) -> None:
    simulator_settings = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0)
    published = Published()
    async with Simulator(simulator_settings) as simulator, opened(tmp_path) as log:
        async with Rest.open(Upstream(url=simulator.url), Metrics().upstream) as rest:
            running = pipeline(log, published, rest)
            feed = Feed(Upstream(url=simulator.url), Metrics().upstream)
            async with aclosing(feed.messages()) as messages:

                async def step() -> None:
                    """Let the backend look, and take in what it says of it."""
                    await simulator.poll()
                    while True:
                        message = await anext(messages)
                        if isinstance(message, Received):
                            await running.handle(message)
                            if message.frame.delta is not None:
                                return

                while not isinstance(await anext(messages), Received):
                    pass
                first = simulator.world.pay(150 * BTC)
                await step()
                second = simulator.world.replace(first.txid)
                await step()
                simulator.world.mine()
                await step()
        kinds = [(event.kind, event.whale.alert.transaction_id) for event in published.events]
        assert kinds == [
            (Kind.ALERT, first.txid),
            (Kind.ALERT, second.txid),
            (Kind.REPLACED, first.txid),
            (Kind.CONFIRMED, second.txid),
        ]
        alert = published.events[0].whale.alert
        assert alert.value_sat == 150 * BTC
        assert alert.moved_sat == simulator.truth[first.txid].moved_sat
        assert published.events[1].whale.alert.replaces == first.txid
        confirmed = published.events[3].update
        assert confirmed is not None
        assert confirmed.block_height == simulator.truth[second.txid].height
        assert await log.between(0, 10, 10) == published.events


def recorded_whales() -> str:
    """The first recorded frame that brings a whale."""
    path = Path(__file__).parent / "data" / "regtest-1.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        for line in lines:
            raw: str = json.loads(line).get("raw", "")
            if raw and (delta := decode(raw).delta) is not None and delta.at_least(100 * BTC):
                return raw
    raise AssertionError("no whale in the recording")


async def test_what_the_backend_sends_again_is_alerted_once(tmp_path: Path) -> None:
    published = Published()
    frame = recorded_whales()
    async with opened(tmp_path) as log:
        await pipeline(log, published).run(Recorded(frame, frame))
        await pipeline(log, published).run(Recorded(frame))  # after a restart nothing is remembered but the log
    assert [event.offset for event in published.events] == [1]
    assert published.states == [UpstreamState.CONNECTED] * 2


class Broken:
    """A log whose disk is full."""

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)

    async def rehearse(self, draft: Draft) -> Event:
        raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        return {}

    async def histories(self, txids: Iterable[str]) -> dict[str, History]:
        return {}

    async def rivals(self, outpoints: Iterable[str]) -> dict[str, list[str]]:
        return {}

    async def outpoints(self, txids: Iterable[str]) -> dict[str, list[str]]:
        return {}


async def test_what_is_not_stored_is_not_published_and_the_failure_is_not_swallowed() -> None:
    published = Published()
    with pytest.raises(EventLogError):
        await pipeline(Broken(), published).run(Recorded(recorded_whales()))
    assert published.events == []


class Unhelpful:
    """A backend that does not know the inputs."""

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        return list(transactions)


async def test_a_whale_whose_inputs_stay_unknown_is_alerted_without_them_and_counted(tmp_path: Path) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        await pipeline(log, published, Unhelpful(), metrics).run(Recorded(recorded_whales()))
    assert published.events[0].whale.alert.moved_sat is None
    assert metrics.registry.get_sample_value("whaled_whales_inputs_unknown_total") == 1
    assert metrics.registry.get_sample_value("whaled_whales_total", {"flow": "unknown"}) == 1


async def test_the_market_is_remembered_between_frames(tmp_path: Path) -> None:
    published = Published()
    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        path = Path(__file__).parent / "data" / "regtest-1.jsonl.gz"
        with gzip.open(path, "rt") as lines:
            raws = [row["raw"] for row in map(json.loads, lines) if row["dir"] == "in"]
        await running.run(Recorded(*raws[:4]))
        assert running.market.fees is not None
        assert running.market.tip_height == 263
        assert running.market.btc_usd is None  # -1 on regtest: unknown is not a price


@pytest.mark.parametrize(
    "detection",
    [
        Detection(),
        Detection(basis=Basis.MOVED),
        Detection(threshold_btc=21_000_000),
        Detection(threshold_btc=0.000_000_01),
    ],
)
async def test_a_canary_is_found_by_every_rule_and_leaves_nothing_behind(tmp_path: Path, detection: Detection) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        running = pipeline(log, published, metrics=metrics)
        running.detector = Detector(Rules.of(detection))
        await running.run(Recorded(recorded_whales()))
        stored = log.head
        for number in range(3):
            await running.rehearse(f"{number:064x}")
        assert [event.whale.alert.transaction_id for event in published.canaries] == [f"{n:064x}" for n in range(3)]
        assert log.head == stored
        assert await log.whales(f"{n:064x}" for n in range(3)) == {}
        assert len(await log.between(0, stored + 3, 10)) == stored == len(published.events)
        assert running.detector.seen_count == stored
        assert metrics.registry.get_sample_value("whaled_transactions_seen_total") == 1
        await running.run(Recorded(recorded_whales()))  # the log goes on as if nothing had been
        assert log.head == stored


async def test_a_canary_meets_what_a_whale_would_meet() -> None:
    running = pipeline(Broken(), Published())
    with pytest.raises(EventLogError):
        await running.rehearse("ab" * 32)


def test_a_canary_has_the_shape_of_a_backend_s_transaction() -> None:
    recorded = json.loads(recorded_whales())["mempool-transactions"]
    made = json.loads(canary_frame("ab" * 32, 5))["mempool-transactions"]
    assert recorded.keys() == made.keys()

    def keys(transaction: Any) -> list[set[str]]:
        parts = (transaction, transaction["vin"][0], transaction["vout"][0], transaction["status"])
        return [set(part) for part in parts]

    assert keys(made["added"][0]) == keys(recorded["added"][0])
