"""A pipeline on a real log, its publisher a list, and transactions as a backend sends them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kit.clocks import SetClock
from kit.whales import NOW, txid
from whaled.config.sections import DetectionSettings, EventLogSettings
from whaled.detection_meters import DetectionMeter
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.gateway.share import LoopShare
from whaled.ingest.committer import Committer, Log, Publisher
from whaled.ingest.ingest import Ingest
from whaled.ingest.intake import Intake, StatePublisher
from whaled.metrics import Metrics
from whaled.model import Event, Market, Transaction, UpstreamState
from whaled.registry import Registry
from whaled.source import MempoolChange, Stream, StreamMessage
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.dialect import decode
from whaled.whales.detect import Detector, Rules
from whaled.whales.labels import AddressBook


class Published:
    """A publisher that remembers what clients would receive."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.states: list[UpstreamState] = []
        self.canaries: list[Event] = []

    at_once = 1000

    def publish(self, events: Sequence[Event]) -> None:
        self.events.extend(events)

    def rehearse(self, event: Event) -> None:
        self.canaries.append(event)

    def publish_upstream_state(self, state: UpstreamState) -> None:
        self.states.append(state)


class Priority:
    """A priority that knows whether others were asked to wait."""

    def __init__(self) -> None:
        self.is_held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        assert not self.is_held
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False


def opened(directory: Path) -> AbstractAsyncContextManager[EventLog]:
    return EventLog.open(EventLogSettings(path=str(directory / "w.db")), EventLogMeter(Registry()))


class PrevoutSource(Protocol):
    """A source of the outputs that a transaction spends."""

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]: ...


class AnyPublisher(Publisher, StatePublisher, Protocol):
    """The delivery to clients, as the gateway does it."""


class Pipeline:
    """The path from a message of the stream to a published event, wired as in `whaled.service`."""

    def __init__(
        self, *, detector: Detector, event_log: Log, publisher: AnyPublisher, priority: Priority | LoopShare,
        meter: DetectionMeter, inputs: PrevoutSource | None, inputs_wait_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.ingest = Ingest(detector)
        self.committer = Committer(event_log=event_log, publisher=publisher, meter=meter, settled=self.ingest.forget)
        self.intake = Intake(
            ingest=self.ingest,
            committer=self.committer,
            event_log=event_log,
            publisher=publisher,
            priority=priority,
            meter=meter,
            inputs=None if inputs is None else partial(inputs.prevouts, deadline_s=inputs_wait_s),
            clock=clock,
        )
        self.handle = self.intake.take
        self.rehearse = self.intake.rehearse
        self.commit = self.committer.commit

    @property
    def detector(self) -> Detector:
        return self.ingest.detector

    @detector.setter
    def detector(self, detector: Detector) -> None:
        self.ingest.detector = detector

    @property
    def market(self) -> Market:
        return self.ingest.market

    @property
    def is_usd_rule_blind(self) -> bool:
        return self.intake.is_usd_rule_blind

    async def run(self, stream: Stream, observe: Callable[[StreamMessage], None] = lambda _: None) -> None:
        async with aclosing(stream.messages()) as messages:
            async for message in messages:
                await self.intake.take(message)
                observe(message)


def received(raw: bytes | str, at: float) -> MempoolChange:
    return change_of(decode(raw), received_at=at, received_monotonic=time.monotonic())


def brings(*transactions: dict[str, Any]) -> bytes:
    """Return the message that brings these transactions."""
    delta = {"sequence": 1, "added": transactions, "removed": [], "mined": [], "replaced": []}
    return json.dumps({"mempool-transactions": delta}, separators=(",", ":")).encode()


def pays(number: int, value: int, address: str = "", fee: int = 100) -> dict[str, Any]:
    """Return a transaction as a backend without electrs sends it: what it spends is not in it."""
    return {
        "txid": txid(number),
        "version": 2,
        "vin": [{"txid": txid(1000 + number), "vout": 0, "sequence": 1, "prevout": None}],
        "vout": [{"value": value, "scriptpubkey": f"0014{number}", "scriptpubkey_address": address}],
        "fee": fee,
        "vsize": 141,
    }


def timed(
    log: Log, detection: DetectionSettings, published: Published, *, book: AddressBook | None = None,
    inputs: PrevoutSource | None = None, metrics: Metrics | None = None,
) -> tuple[Pipeline, SetClock]:  # fmt: skip
    clock = SetClock(NOW)
    running = Pipeline(
        detector=Detector(Rules.of(detection), book),
        event_log=log,
        publisher=published,
        priority=Priority(),
        meter=(metrics or Metrics()).detection,
        inputs=inputs,
        inputs_wait_s=2.0,
        clock=clock,
    )
    return running, clock
