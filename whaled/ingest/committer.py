"""The only writer of events: whatever found them, they are committed, published and reported here, in one order."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import structlog

from whaled.detection_meters import DetectionMeter
from whaled.eventlog import queries
from whaled.eventlog.rows import Rows
from whaled.model import SAT_PER_BTC, Alert, Draft, Event, Kind
from whaled.whales.conflicts import linked, present

# The stream rarely sends a transaction again after one of these events.
SETTLED = {Kind.CONFIRMED, Kind.REPLACED}

K = TypeVar("K")
V = TypeVar("V")

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Log(Protocol):
    """The part of the event log that new events need."""

    async def read_each(self, query: Callable[[Rows, Sequence[K]], dict[str, V]], keys: Iterable[K]) -> dict[str, V]:
        """Run one of the event log's queries for any number of keys."""
        ...

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Commit the drafts and return the events that were new."""
        ...

    async def rehearse(self, draft: Draft) -> Event:
        """Run a draft through the same steps as `append` and store nothing."""
        ...


class Publisher(Protocol):
    """The delivery of events to clients."""

    @property
    def at_once(self) -> int:
        """The number of events to publish before yielding to the event loop."""
        ...

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events."""
        ...

    def rehearse(self, event: Event) -> None:
        """Deliver the event of a canary to the canary's connection only."""
        ...


class Committer:
    """Commits and publishes events. Its turn orders the stream's messages and what the backfill found between them.

    `settled` is called with the txid of a whale whose outcome was committed. `last_whale` is the newest one and the
    time of its alert (Unix seconds), None if there was none.
    """

    def __init__(
        self,
        *,
        event_log: Log,
        publisher: Publisher,
        meter: DetectionMeter,
        settled: Callable[[str], None],
        last_whale: tuple[Alert, float] | None = None,
    ) -> None:
        self.last_whale = last_whale
        self._log = event_log
        self._publisher = publisher
        self._meter = meter
        self._settled = settled
        self._turn = asyncio.Lock()

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Let nothing else be decided or committed within the context."""
        return self._turn

    async def idle(self) -> None:
        """Wait until what has the turn, if anything, is committed and published."""
        async with self._turn:
            pass

    async def commit(self, decide: Callable[[], Awaitable[Sequence[Draft]]]) -> list[Event]:
        """Commit and publish drafts that do not come from the stream, between two of its messages.

        No message is handled between the call of `decide` and the commit of its drafts.
        """
        async with self._turn:
            return await self.store(await decide())

    async def store(self, drafts: Sequence[Draft], received_monotonic: float | None = None) -> list[Event]:
        """Commit, publish and report drafts, within a turn that began before they were decided.

        Return the events that were new. The latency is measured from `received_monotonic`. Raises EventLogError, and
        then nothing is published.
        """
        assert self._turn.locked(), "drafts are decided and stored in one turn"
        drafts = await self._linked(drafts)
        if not drafts:
            return []
        events = await self._log.append(drafts)
        committed = time.monotonic()
        await self._publish(events)
        if events and received_monotonic is not None:
            self._meter.latency(committed - received_monotonic, time.monotonic() - received_monotonic)
        for event in events:
            self._report(event)
        return events

    async def rehearse(self, draft: Draft) -> None:
        """Run a draft through the same steps. Nothing is stored and nothing is counted."""
        self._publisher.rehearse(await self._log.rehearse(draft))

    async def _linked(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts with the replacements that follow from whales which spend the same output."""
        spending = present(drafts)
        if not spending:
            return list(drafts)
        rivals = await self._log.read_each(queries.rivals, spending.items())
        return linked(drafts, rivals)

    async def _publish(self, events: Sequence[Event]) -> None:
        """Publish committed events, yielding to the event loop after each `at_once` of them.

        A block may confirm hundreds of whales, and each event is matched against thousands of filters.
        """
        while events:
            count = self._publisher.at_once
            self._publisher.publish(events[:count])
            events = events[count:]
            if events:
                await asyncio.sleep(0)

    def _report(self, event: Event) -> None:
        if event.update is not None:
            if event.kind in SETTLED:
                self._settled(event.whale.alert.transaction_id)
            self._meter.updated(event.kind, event.update.blocks_off)
            logger.info(
                "whale_updated",
                txid=event.whale.alert.transaction_id,
                status=event.update.status.value,
                offset=event.offset,
            )
            return
        alert = event.whale.alert
        self._meter.whale(alert, event.at)
        self.last_whale = (alert, event.at)
        logger.info(
            "whale_detected",
            btc=alert.value_sat / SAT_PER_BTC,
            txid=alert.transaction_id,
            flow=alert.flow_type.value,
            flow_btc=None if alert.flow_sat is None else alert.flow_sat / SAT_PER_BTC,
            shape=alert.shape.value,
            source=alert.source.value,
            fee_rate=alert.fee_rate,
            rules=",".join(alert.matched_rules),
            offset=event.offset,
        )
