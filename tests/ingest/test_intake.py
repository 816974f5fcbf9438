"""From frames to events, with the real decoder, detector and log; frames of the recording and of the simulator."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from kit.paths import DATA
from kit.pipeline import Pipeline, PrevoutSource, Priority, Published, brings, opened, pays, received, timed
from kit.transactions import ADDRESSES
from kit.whales import BTC, NOW, txid
from whaled.config.sections import Basis, DetectionSettings, UpstreamSettings, WatchRule
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import queries
from whaled.eventlog.rows import Rows
from whaled.ingest.committer import K, Log, V
from whaled.ingest.intake import OPEN_LIMIT
from whaled.metrics import Metrics
from whaled.model import Block, Draft, Event, Input, Kind, Output, OwnerType, Transaction, UpstreamState
from whaled.registry import Registry
from whaled.simulator.server import Simulator
from whaled.simulator.settings import SimulatorSettings
from whaled.source import Decoded, MempoolChange, Replacement, StateChanged, StreamMessage
from whaled.sources.mempool_space.canary_frame import canary_frame
from whaled.sources.mempool_space.changes import canary_change
from whaled.sources.mempool_space.dialect import decode
from whaled.sources.mempool_space.feed import Feed
from whaled.sources.mempool_space.http import RestMeter
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.rest import Rest
from whaled.whales.detect import Detector, Rules
from whaled.whales.labels import AddressBook
from whaled.whales.lifecycle import confirmed


def pipeline(
    log: Log,
    published: Published,
    inputs: PrevoutSource | None = None,
    metrics: Metrics | None = None,
    priority: Priority | None = None,
) -> Pipeline:
    return Pipeline(
        detector=Detector(Rules.of(DetectionSettings())),
        event_log=log,
        publisher=published,
        priority=priority or Priority(),
        meter=(metrics or Metrics()).detection,
        inputs=inputs,
        inputs_wait_s=2.0,
    )


class Recorded:
    """A feed that has these frames and then nothing."""

    def __init__(self, *frames: bytes | str) -> None:
        self._frames = frames

    async def messages(self) -> AsyncGenerator[StreamMessage, None]:
        yield StateChanged(UpstreamState.CONNECTED, "")
        for raw in self._frames:
            yield received(raw, time.time())


async def test_a_whale_is_committed_then_published_and_its_outcomes_follow(tmp_path: Path) -> None:
    simulator_settings = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0)
    published = Published()
    async with Simulator(simulator_settings) as simulator, opened(tmp_path) as log:
        async with Rest.open(UpstreamSettings(url=simulator.url), RestMeter(Registry())) as rest:
            running = pipeline(log, published, rest)
            feed = Feed(UpstreamSettings(url=simulator.url), FeedMeter(Registry()))
            async with aclosing(feed.messages()) as messages:

                async def step() -> None:
                    """Let the backend look, and take in what it says of it."""
                    await simulator.poll()
                    while True:
                        message = await anext(messages)
                        if isinstance(message, MempoolChange):
                            await running.handle(message)
                            if message.continuity is not None:  # it has a change of the mempool
                                return

                while not isinstance(await anext(messages), MempoolChange):
                    pass
                first = simulator.world.pay(150 * BTC)
                await step()
                second = simulator.world.replace(first.txid)
                await step()
                assert running.detector.seen_count == 1  # the one that was replaced has left
                simulator.world.mine()
                await step()
                assert running.detector.seen_count == 0
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
    path = DATA / "regtest-1.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        for line in lines:
            raw: str = json.loads(line).get("raw", "")
            if raw and (delta := decode(raw).delta) is not None and delta.at_least(100 * BTC):
                return raw
    raise AssertionError("no whale in the recording")


def decoded(number: int, value: int) -> Decoded:
    """A transaction of a source that decodes everything itself."""
    spent = Input(txid(1000 + number), 0, 0xFFFF_FFFD, Output(value + 1_000, "00"))
    paid = Output(value, "51")
    return Decoded((Transaction(txid=txid(number), inputs=(spent,), outputs=(paid,), fee_sat=1_000, vsize=100.0),))


async def test_changes_of_any_source_become_events(tmp_path: Path) -> None:
    published, change = Published(), partial(MempoolChange, received_at=NOW, received_monotonic=0.0)
    block = Block(height=900_000, hash="b1" * 32, previous_hash=None, timestamp=int(NOW))
    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        for each in (
            change(entered=decoded(1, 150 * BTC)),
            change(
                entered=decoded(2, 149 * BTC),
                removed=(txid(1),), replaced=(Replacement(txid(1), txid(2)),),
            ),
            change(mined=(txid(9), txid(2)), block=block),
        ):  # fmt: skip
            await running.handle(each)
    assert [(event.kind, event.whale.alert.transaction_id) for event in published.events] == [
        (Kind.ALERT, txid(1)),
        (Kind.ALERT, txid(2)),
        (Kind.REPLACED, txid(1)),
        (Kind.CONFIRMED, txid(2)),
    ]
    assert published.events[1].whale.alert.replaces == txid(1)


def spends(number: int, *outpoints: int) -> Decoded:
    """A whale that spends these outputs, as a source that decodes everything itself reports it."""
    inputs = tuple(Input(txid(each), 0, 0xFFFF_FFFD, Output(200 * BTC, "00")) for each in outpoints)
    paid = (Output(150 * BTC + number, "51"),)
    return Decoded((Transaction(txid=txid(number), inputs=inputs, outputs=paid, fee_sat=1_000, vsize=100.0),))


async def test_a_whale_that_is_reported_as_replaced_once_more_replaces_nothing(tmp_path: Path) -> None:
    """A backend behind a load balancer may repeat a replacement, together with the whale that was replaced."""
    published, change = Published(), partial(MempoolChange, received_at=NOW, received_monotonic=0.0)
    pair = (Replacement(txid(1), txid(2)),)
    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        await running.handle(change(entered=spends(1, 9)))
        await running.handle(change(entered=spends(2, 9), removed=(txid(1),), replaced=pair))
        await running.handle(change(entered=spends(1, 9), removed=(txid(1),), replaced=pair))
    assert [(event.kind, event.whale.alert.transaction_id) for event in published.events] == [
        (Kind.ALERT, txid(1)),
        (Kind.ALERT, txid(2)),
        (Kind.REPLACED, txid(1)),
    ]


async def test_a_block_that_a_scan_read_before_replaces_the_whales_announced_meanwhile(tmp_path: Path) -> None:
    published, change = Published(), partial(MempoolChange, received_at=NOW, received_monotonic=0.0)
    block = Block(height=900_000, hash="b1" * 32, previous_hash=None, timestamp=int(NOW))
    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        await running.handle(change(entered=spends(1, 9)))

        async def scan() -> list[Draft]:
            return [confirmed(published.events[0].whale, block, NOW)]

        await running.commit(scan)
        await running.handle(change(entered=spends(2, 9)))  # the stream lags behind the node
        await running.handle(change(mined=(txid(1),), block=block))
    assert [(event.kind, event.whale.alert.transaction_id) for event in published.events] == [
        (Kind.ALERT, txid(1)),
        (Kind.CONFIRMED, txid(1)),
        (Kind.ALERT, txid(2)),
        (Kind.REPLACED, txid(2)),
    ]


async def test_a_transaction_that_the_backend_sends_again_is_alerted_once(tmp_path: Path) -> None:
    published = Published()
    frame = recorded_whales()
    async with opened(tmp_path) as log:
        await pipeline(log, published).run(Recorded(frame, frame))
        await pipeline(log, published).run(Recorded(frame))  # after a restart nothing is remembered but the log
    assert [event.offset for event in published.events] == [1]
    assert published.states == [UpstreamState.CONNECTED] * 2


class Watching(Published):
    """Remembers whether clients' requests were held when something was published."""

    def __init__(self, priority: "Priority") -> None:
        super().__init__()
        self.priority = priority
        self.held: list[bool] = []

    def publish(self, events: Sequence[Event]) -> None:
        super().publish(events)
        self.held.append(self.priority.is_held)

    def rehearse(self, event: Event) -> None:
        super().rehearse(event)
        self.held.append(self.priority.is_held)


class Asked:
    """Has no inputs to give, and remembers whether clients' requests were held while it was asked."""

    def __init__(self, priority: "Priority") -> None:
        self.priority = priority
        self.held: list[bool] = []

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        self.held.append(self.priority.is_held)
        return list(transactions)


async def test_client_requests_are_delayed_during_an_alert_but_not_during_a_rest_request(
    tmp_path: Path,
) -> None:
    priority = Priority()
    published, inputs = Watching(priority), Asked(priority)
    async with opened(tmp_path) as log:
        running = pipeline(log, published, inputs, priority=priority)
        await running.run(Recorded(recorded_whales()))
        await running.rehearse(partial(canary_change, txid(1)))
        assert published.held == [True, True]
        assert inputs.held == [False]
        assert not priority.is_held

        async def decide() -> Sequence[Draft]:
            assert not priority.is_held
            return [Draft(kind=Kind.DROPPED, at=NOW, whale=published.events[0].whale)]

        await running.commit(decide)
        assert published.held == [True, True, False]  # a backfill may take minutes


class Broken:
    """A log without events that cannot be written."""

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)

    async def rehearse(self, draft: Draft) -> Event:
        raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)

    async def read_each(self, query: Callable[[Rows, Sequence[K]], dict[str, V]], keys: Iterable[K]) -> dict[str, V]:
        return {}


async def test_an_event_that_is_not_stored_is_not_published_and_the_failure_is_raised() -> None:
    published = Published()
    with pytest.raises(EventLogError):
        await pipeline(Broken(), published).run(Recorded(recorded_whales()))
    assert published.events == []


class Slow(Published):
    """Takes a few events at once."""

    at_once = 2

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def publish(self, events: Sequence[Event]) -> None:
        super().publish(events)
        self.sizes.append(len(events))


async def test_many_events_are_published_in_parts_and_the_loop_goes_on_between_them(tmp_path: Path) -> None:
    published = Slow()
    seen: list[int] = []

    async def look() -> None:
        while len(published.events) < 6:
            seen.append(len(published.events))
            await asyncio.sleep(0)

    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        await running.run(Recorded(recorded_whales()))
        whale = published.events[0].whale
        drafts = [Draft(kind=Kind.DROPPED, at=NOW, whale=whale, ref=str(number)) for number in range(5)]

        async def decide() -> Sequence[Draft]:
            return drafts

        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(look())
            await running.commit(decide)
        assert published.sizes == [1, 2, 2, 1]
        assert {1, 3, 5} <= set(seen)
        assert [event.offset for event in published.events] == [1, 2, 3, 4, 5, 6]


class Unhelpful:
    """A backend that does not know the inputs."""

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        return list(transactions)


async def test_a_whale_whose_inputs_stay_unknown_is_alerted_without_them_and_counted(tmp_path: Path) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        await pipeline(log, published, Unhelpful(), metrics).run(Recorded(recorded_whales()))
    assert published.events[0].whale.alert.moved_sat is None
    assert metrics.registry.collectors.get_sample_value("whaled_whales_inputs_unknown_total") == 1
    assert metrics.registry.collectors.get_sample_value("whaled_whales_total", {"flow": "unknown"}) == 1


async def test_the_market_is_remembered_between_frames(tmp_path: Path) -> None:
    published = Published()
    async with opened(tmp_path) as log:
        running = pipeline(log, published)
        path = DATA / "regtest-1.jsonl.gz"
        with gzip.open(path, "rt") as lines:
            raws = [row["raw"] for row in map(json.loads, lines) if row["dir"] == "in"]
        await running.run(Recorded(*raws[:4]))
        assert running.market.fees is not None
        assert running.market.tip_height == 263
        assert running.market.price is None  # -1 on regtest: unknown is not a price


@pytest.mark.parametrize(
    "detection",
    [
        DetectionSettings(),
        DetectionSettings(basis=Basis.MOVED),
        DetectionSettings(threshold_btc=21_000_000),
        DetectionSettings(threshold_btc=0.000_000_01),
        DetectionSettings(basis=Basis.INPUTS),
        DetectionSettings(threshold_btc=None, threshold_usd=1e15),
        DetectionSettings(
            threshold_btc=None, watch=(WatchRule(name="own", types=(OwnerType.OWN,), threshold_btc=21e6),)
        ),
        DetectionSettings(watch=(WatchRule(name="own", types=(OwnerType.OWN,)),)),
    ],
)
async def test_a_canary_is_found_by_every_rule_and_leaves_nothing_behind(
    tmp_path: Path, detection: DetectionSettings
) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        running = pipeline(log, published, metrics=metrics)
        running.detector = Detector(Rules.of(detection))
        await running.run(Recorded(recorded_whales()))
        stored = log.head
        for number in range(3):
            await running.rehearse(partial(canary_change, f"{number:064x}"))
        assert [event.whale.alert.transaction_id for event in published.canaries] == [f"{n:064x}" for n in range(3)]
        assert log.head == stored
        assert await log.read_each(queries.whales, [f"{n:064x}" for n in range(3)]) == {}
        assert len(await log.between(0, stored + 3, 10)) == stored == len(published.events)
        assert running.detector.seen_count == stored
        assert metrics.registry.collectors.get_sample_value("whaled_transactions_seen_total") == 1
        await running.run(Recorded(recorded_whales()))  # the log goes on as if nothing had been
        assert log.head == stored


async def test_a_canary_fails_wherever_a_whale_would() -> None:
    running = pipeline(Broken(), Published())
    with pytest.raises(EventLogError):
        await running.rehearse(partial(canary_change, "ab" * 32))


def test_a_canary_has_the_shape_of_a_backend_s_transaction() -> None:
    recorded = json.loads(recorded_whales())["mempool-transactions"]
    made = json.loads(canary_frame("ab" * 32, 5))["mempool-transactions"]
    assert recorded.keys() == made.keys()

    def keys(transaction: Any) -> list[set[str]]:
        parts = (transaction, transaction["vin"][0], transaction["vout"][0], transaction["status"])
        return [set(part) for part in parts]

    assert keys(made["added"][0]) == keys(recorded["added"][0])


# --- the price ---


def priced(usd: float, at: float | None) -> bytes:
    """The message with the price."""
    return json.dumps({"conversions": {"USD": usd, **({"time": at} if at is not None else {})}}).encode()


@pytest.mark.parametrize("stated", [NOW, None])
async def test_a_price_that_is_no_longer_updated_expires(tmp_path: Path, stated: float | None) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        running, clock = timed(log, DetectionSettings(), published, metrics=metrics)
        await running.handle(received(priced(64_000, stated), NOW))
        for number, age in enumerate((7200, 7201)):
            clock.now = NOW + age
            await running.handle(received(brings(pays(number, 100 * BTC)), clock.now))
    assert [event.whale.alert.usd_value for event in published.events] == [6_400_000.0, None]
    assert metrics.registry.collectors.get_sample_value("whaled_price_timestamp_seconds") == NOW
    assert published.events[0].whale.alert.price_timestamp == "2027-01-15T08:00:00.000+00:00"


async def test_the_time_of_an_unknown_price_is_zero(tmp_path: Path) -> None:
    metrics = Metrics()
    async with opened(tmp_path) as log:
        running, _ = timed(log, DetectionSettings(), Published(), metrics=metrics)
        assert metrics.registry.collectors.get_sample_value("whaled_price_timestamp_seconds") == 0
        await running.handle(received(priced(64_000, NOW), NOW))
        await running.handle(received(priced(-1, 0), NOW))
    assert metrics.registry.collectors.get_sample_value("whaled_price_timestamp_seconds") == 0


async def test_a_rule_in_dollars_follows_the_price_and_is_logged_as_blind_without_one(tmp_path: Path) -> None:
    published, metrics = Published(), Metrics()
    value = metrics.registry.collectors.get_sample_value
    blind = "usd_threshold_suspended"
    async with opened(tmp_path) as log:
        running, clock = timed(
            log, DetectionSettings(threshold_btc=None, threshold_usd=640_000.0), published, metrics=metrics
        )
        with capture_logs() as lines:
            await running.handle(received(brings(pays(1, 1000 * BTC)), NOW))
            await running.handle(received(brings(pays(2, 1000 * BTC)), NOW))
        assert [line["event"] for line in lines] == [blind]
        assert running.is_usd_rule_blind
        assert value("whaled_threshold_usd_blind") == 1
        with capture_logs() as lines:
            await running.handle(received(priced(64_000, NOW), NOW))
            await running.handle(received(brings(pays(3, 10 * BTC), pays(4, 10 * BTC - 1)), NOW))
        assert [line["event"] for line in lines if line["event"] != "whale_detected"] == ["usd_threshold_resumed"]
        assert value("whaled_threshold_usd_blind") == 0
        clock.now = NOW + 7201
        with capture_logs() as lines:
            await running.handle(received(brings(pays(5, 1000 * BTC)), NOW))
        assert [line["event"] for line in lines] == [blind]
    assert [event.whale.alert.transaction_id for event in published.events] == [txid(3)]
    assert published.events[0].whale.alert.matched_rules == ("threshold_usd",)


# --- the watch list ---


WATCHING = DetectionSettings(watch=(WatchRule(name="states", types=(OwnerType.GOVERNMENT,)),))
BOOK = AddressBook.parse(f"Treasury,{ADDRESSES[2]},government", "book.csv")


class Helpful:
    """Knows what every transaction spends: it is of the watched owner, or of nobody in particular."""

    def __init__(self, *watched: int) -> None:
        self._watched = {txid(number) for number in watched}
        self.asked: list[str] = []

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        return [self._completed(transaction) for transaction in transactions]

    def _completed(self, transaction: Transaction) -> Transaction:
        self.asked.append(transaction.txid)
        address = ADDRESSES[2] if transaction.txid in self._watched else ADDRESSES[0]
        prevout = Output(transaction.value_sat + 100, f"script of {address}", address)
        spent = [replace(each, prevout=prevout) for each in transaction.inputs]
        return replace(transaction, inputs=tuple(spent))


async def test_a_watched_payer_is_found_by_its_inputs_after_matching_whales_are_published(tmp_path: Path) -> None:
    published, inputs, metrics = Published(), Helpful(2), Metrics()
    async with opened(tmp_path) as log:
        running, _ = timed(log, WATCHING, published, book=BOOK, inputs=inputs, metrics=metrics)
        some = [pays(1, 5), pays(2, 6), pays(3, 100 * BTC), pays(4, 1, ADDRESSES[2])]
        await running.handle(received(brings(*some), NOW))
    alerts = [event.whale.alert for event in published.events]
    assert [(alert.transaction_id, alert.matched_rules) for alert in alerts] == [
        (txid(3), ("threshold_btc",)),
        (txid(4), ("watch:states",)),
        (txid(2), ("watch:states",)),
    ]
    assert inputs.asked == [txid(3), txid(4), txid(1), txid(2)]
    value = metrics.registry.collectors.get_sample_value
    assert value("whaled_watch_inputs_unknown_total") == 0
    assert value("whaled_whale_rules_total", {"rule": "watch"}) == 2
    assert value("whaled_whale_rules_total", {"rule": "threshold_btc"}) == 1


@pytest.mark.parametrize("inputs", [Unhelpful(), None])
async def test_unknown_inputs_that_a_watch_rule_needs_are_counted(tmp_path: Path, inputs: PrevoutSource | None) -> None:
    published, metrics = Published(), Metrics()
    async with opened(tmp_path) as log:
        running, _ = timed(log, WATCHING, published, book=BOOK, inputs=inputs, metrics=metrics)
        await running.handle(received(brings(pays(1, 5), pays(2, 6), pays(3, 7, ADDRESSES[2])), NOW))
    assert [event.whale.alert.transaction_id for event in published.events] == [txid(3)]
    assert metrics.registry.collectors.get_sample_value("whaled_watch_inputs_unknown_total") == 2


async def test_the_inputs_of_a_whole_mempool_are_not_requested_but_counted(tmp_path: Path) -> None:
    published, inputs, metrics = Published(), Helpful(0, OPEN_LIMIT + 9), Metrics()
    async with opened(tmp_path) as log:
        running, _ = timed(log, WATCHING, published, book=BOOK, inputs=inputs, metrics=metrics)
        await running.handle(received(brings(*(pays(number, 5) for number in range(OPEN_LIMIT + 10))), NOW))
    assert len(inputs.asked) == OPEN_LIMIT
    assert [event.whale.alert.transaction_id for event in published.events] == [txid(OPEN_LIMIT + 9)]
    assert metrics.registry.collectors.get_sample_value("whaled_watch_inputs_unknown_total") == 10


async def test_without_watch_rules_no_further_inputs_are_requested(tmp_path: Path) -> None:
    inputs = Helpful()
    async with opened(tmp_path) as log:
        running, _ = timed(log, DetectionSettings(), Published(), book=BOOK, inputs=inputs)
        await running.handle(received(brings(pays(1, 5), pays(2, 100 * BTC - 1, fee=1), pays(3, 100 * BTC)), NOW))
    assert inputs.asked == [txid(3)]
