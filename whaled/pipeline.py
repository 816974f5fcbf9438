"""The path from an upstream frame to a published event: detect, complete, commit, publish.

Messages are handled one at a time, in order.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Protocol

import structlog
from msgspec.structs import replace

from whaled.detection_meters import DetectionMeter
from whaled.model import (
    SAT_PER_BTC,
    Alert,
    Draft,
    Event,
    Kind,
    Market,
    Source,
    Transaction,
    UpstreamState,
    Whale,
)
from whaled.source import MempoolChange, Shortfall, StateChanged, Stream, StreamMessage, degraded_by
from whaled.whales import lifecycle, prices
from whaled.whales.conflicts import Conflicts, linked
from whaled.whales.detect import Detector, needs_inputs
from whaled.whales.lifecycle import Origin

# The most transactions of one frame whose inputs are requested only for a watch rule. A backend that restarted sends
# its whole mempool at once.
OPEN_LIMIT = 500
# The stream rarely sends a transaction again after one of these events.
SETTLED = {Kind.CONFIRMED, Kind.REPLACED}

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Inputs(Protocol):
    """A source of the outputs that a transaction spends."""

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        """Return the transactions with their prevouts, unchanged where these do not arrive within `deadline_s`."""
        ...


class Log(Conflicts, Protocol):
    """The part of the event log that new events need."""

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

    def publish_upstream_state(self, state: UpstreamState) -> None:
        """Publish the new state of the link."""
        ...


class Priority(Protocol):
    """The means to delay work for client requests while an alert is in progress."""

    def hold(self) -> AbstractContextManager[None]:
        """Delay client requests within the context: an alert is in progress."""
        ...


class Observer(Protocol):
    """A receiver of every message after it was handled."""

    def observe(self, message: StreamMessage) -> None:
        """Record the message without waiting for anything."""
        ...


class Pipeline:
    """The handler of upstream messages. `detector` may be replaced between two messages (reload)."""

    def __init__(
        self,
        *,
        detector: Detector,
        event_log: Log,
        publisher: Publisher,
        priority: Priority,
        meter: DetectionMeter,
        inputs: Inputs | None,
        inputs_wait_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.detector = detector
        self.inputs = inputs
        self.inputs_wait_s = inputs_wait_s
        self.market = Market()
        self.last_whale: tuple[Alert, float] | None = None
        self._log = event_log
        self._publisher = publisher
        self._priority = priority
        self._meter = meter
        self._clock = clock
        self._link = UpstreamState.DISCONNECTED
        # Describes what the backend cannot provide; None if nothing is missing.
        self.shortfall: str | None = None
        self._ingest_lock = asyncio.Lock()
        self.observer: Observer | None = None
        # False at the start, although no price is known yet: the first price must not be logged as a recovery.
        self._was_usd_rule_blind = False
        meter.usd_rule_blind.set_function(lambda: self.is_usd_rule_blind)
        meter.book_addresses.set_function(lambda: len(self.detector.book.owners))
        meter.book_owners.set_function(lambda: self.detector.book.owners.labels)

    async def run(self, stream: Stream) -> None:
        """Handle messages until cancelled."""
        async with aclosing(stream.messages()) as messages:
            async for message in messages:
                match message:
                    case MempoolChange():
                        async with self._ingest_lock:
                            await self.handle(message)
                    case StateChanged(state=state):
                        self._link = state
                        self._publisher.publish_upstream_state(degraded_by(self.shortfall, state))
                    case Shortfall(why=why):
                        self.shortfall = why
                        self._publisher.publish_upstream_state(degraded_by(why, self._link))
                    case _:
                        pass
                if self.observer is not None:
                    self.observer.observe(message)

    async def idle(self) -> None:
        """Wait until the message being handled, if any, is committed and published."""
        async with self._ingest_lock:
            pass

    async def handle(self, change: MempoolChange) -> None:
        """Handle one change; its events are committed and published when this returns. Raises EventLogError."""
        self._observe(change)
        self._meter.transactions(len(change.entered.added))
        matching, undecided = self._candidates(change)
        # Client requests are not delayed while the backend answers the request for inputs: the alert cannot advance.
        now = self._clock()
        completed = await self._completed(matching)
        with self._priority.hold():
            await self._publish(change, await self._drafts(completed, change, now))
        if undecided:
            now = self._clock()
            completed = await self._completed_undecided(undecided)
            with self._priority.hold():
                await self._publish(change, await self._drafts_of_undecided(completed, change, now))
        for txid in change.mined:  # the log has the whales among them, and the stream does not send them again
            self.detector.forget(txid)

    async def _publish(self, change: MempoolChange, drafts: Sequence[Draft]) -> None:
        drafts = await linked(drafts, self._log)
        if not drafts:
            return
        events = await self._log.append(drafts)
        committed_s = time.monotonic() - change.received_monotonic
        await self._deliver(events)
        if events:
            self._meter.latency(committed_s, time.monotonic() - change.received_monotonic)
        for event in events:
            self._report(event)

    async def _deliver(self, events: Sequence[Event]) -> None:
        """Publish committed events, yielding to the event loop after each `at_once` of them.

        A block may confirm hundreds of whales, and each event is matched against thousands of filters.
        """
        while events:
            count = self._publisher.at_once
            self._publisher.publish(events[:count])
            events = events[count:]
            if events:
                await asyncio.sleep(0)

    async def commit(self, decide: Callable[[], Awaitable[Sequence[Draft]]]) -> list[Event]:
        """Commit and publish drafts that do not come from the stream, between two of its messages.

        No message is handled between the call of `decide` and the commit of its drafts.
        """
        async with self._ingest_lock:
            # Client requests are not delayed here: a backfill may take minutes.
            events = await self._log.append(await linked(await decide(), self._log))
            await self._deliver(events)
        for event in events:
            self._report(event)
        return events

    def assess(
        self, transaction: Transaction, *, source: Source, now: float, market: Market, replaces: str | None = None
    ) -> Whale | None:
        """Return the whale that the rules in force make of this transaction, None if no rule matches."""
        return self.detector.assess(transaction, market=market, now=now, source=source, replaces=replaces)

    @property
    def minimum_sat(self) -> int:
        """The least sum of outputs and fee, in satoshi, that a rule can match."""
        return self.detector.minimum_sat

    @property
    def is_usd_rule_blind(self) -> bool:
        """True if `detection.threshold_usd` matches nothing because the price is unknown or too old."""
        rules = self.detector.rules
        return (
            rules.threshold_usd is not None and prices.usable(self.market, self._clock(), rules.price_max_age_s) is None
        )

    async def rehearse(self, canary: Callable[[int], MempoolChange]) -> None:
        """Run a canary through the same steps as a whale, after the message being handled.

        `canary` returns the change with a canary that moves a value in satoshi, decoded as a message of the stream.
        Nothing is stored and nothing is counted.
        """
        async with self._ingest_lock:
            detector = self.detector
            change = canary(detector.canary_sat)
            now = self._clock()
            for transaction in detector.candidates(change.entered.at_least(detector.minimum_sat)):
                detector.forget(transaction.txid)
                whale = detector.rehearse(transaction, market=self.market, now=now)
                if whale is not None:
                    with self._priority.hold():
                        self._publisher.rehearse(await self._log.rehearse(lifecycle.alerted(whale, now)))

    def _observe(self, change: MempoolChange) -> None:
        """Update the market from a change."""
        self.market = _updated(self.market, change)
        if change.price is not None:
            price = self.market.price
            self._meter.price(price.at if price is not None else None)
            self.detector.priced(price)
        is_blind = self.is_usd_rule_blind
        if is_blind and not self._was_usd_rule_blind:
            logger.warning("usd_threshold_suspended")
        elif self._was_usd_rule_blind and not is_blind:
            logger.info("usd_threshold_resumed")
        self._was_usd_rule_blind = is_blind

    def _candidates(self, change: MempoolChange) -> tuple[list[Transaction], list[Transaction]]:
        """Return the new transactions that a rule matches now, and those that a rule may match by their inputs."""
        now = self._clock()
        matching: list[Transaction] = []
        undecided: list[Transaction] = []
        for transaction in self.detector.candidates(change.entered.at_least(self.detector.minimum_sat)):
            if self.detector.matched(transaction, self.market, now):
                matching.append(transaction)
            elif self.detector.is_open(transaction):
                undecided.append(transaction)
        return matching, undecided

    async def _drafts(self, completed: Sequence[Transaction], change: MempoolChange, now: float) -> list[Draft]:
        """Return alerts for the whales among the transactions, and the outcomes of whales that the change reports."""
        for transaction in completed:
            if self.inputs is not None and needs_inputs(transaction):
                self._meter.inputs_unknown()
        whales = self._whales(completed, change, now)
        drafts = [lifecycle.alerted(whale, now) for whale in whales]
        touched = [*change.mined, *(replacement.replaced for replacement in change.replaced)]
        if change.entered.added:
            touched += change.removed
        if not touched:
            return drafts
        known = await self._log.whales(touched)
        known.update((whale.alert.transaction_id, whale) for whale in whales)
        return [
            *drafts,
            *await self._valid(await self._unreported_replacements(change, known, now), Origin.POLLED),
            *await self._valid(_outcomes(known, change, now), Origin.STREAM),
        ]

    async def _valid(self, drafts: Sequence[Draft], origin: Origin) -> list[Draft]:
        """Return those drafts of updates that may follow the events in the log."""
        if not drafts:
            return []
        histories = await self._log.histories({draft.whale.alert.transaction_id for draft in drafts})
        return lifecycle.valid(drafts, histories, origin)

    async def _completed_undecided(self, undecided: Sequence[Transaction]) -> list[Transaction]:
        """Return the newest undecided transactions, at most OPEN_LIMIT, with their inputs.

        The inputs are requested after the alerts of the frame were published, so that alerts do not wait for them. A
        transaction whose inputs stay unknown is examined again when its block is scanned.
        """
        completed = await self._completed(undecided[-OPEN_LIMIT:])
        unknown = len(undecided) - len(completed) + sum(map(needs_inputs, completed))
        if unknown:
            self._meter.watch_inputs_unknown(unknown)
        return completed

    async def _drafts_of_undecided(
        self, completed: Sequence[Transaction], change: MempoolChange, now: float
    ) -> list[Draft]:
        """Return alerts for the transactions that a rule matches by their inputs, and their outcomes in the change."""
        whales = self._whales(completed, change, now)
        known = {whale.alert.transaction_id: whale for whale in whales}
        outcomes = await self._valid(_outcomes(known, change, now), Origin.STREAM)
        return [*(lifecycle.alerted(whale, now) for whale in whales), *outcomes]

    def _whales(self, transactions: Iterable[Transaction], change: MempoolChange, now: float) -> list[Whale]:
        return [
            whale
            for transaction in transactions
            if (whale := self._assess(transaction, change.predecessor(transaction.txid), now)) is not None
        ]

    async def _unreported_replacements(
        self, change: MempoolChange, known: Mapping[str, Whale], now: float
    ) -> list[Draft]:
        """Return the replacements within a message that the backend does not report as such.

        The backend expects the new transaction to pay a higher fee by itself, which the parent of a package does not.
        """
        reported = {replacement.replaced for replacement in change.replaced}
        left = [txid for txid in change.removed if txid in known and txid not in reported]
        if not left or not change.entered.added:
            return []
        spent = {outpoint: txid for txid, found in (await self._log.outpoints(left)).items() for outpoint in found}
        by = {spent[outpoint]: spender for outpoint, spender in change.entered.spending(spent).items()}
        return [lifecycle.replaced(known[txid], spender, now) for txid, spender in by.items() if spender != txid]

    def _assess(self, transaction: Transaction, replaces: str | None, now: float) -> Whale | None:
        return self.assess(transaction, source=Source.LIVE, now=now, market=self.market, replaces=replaces)

    async def _completed(self, transactions: Sequence[Transaction]) -> list[Transaction]:
        """Return the transactions with their inputs where the backend provides them in time."""
        inputs = self.inputs
        if inputs is None:
            return list(transactions)
        missing = [transaction for transaction in transactions if needs_inputs(transaction)]
        fetched = {each.txid: each for each in await inputs.prevouts(missing, self.inputs_wait_s)} if missing else {}
        return [fetched.get(transaction.txid, transaction) for transaction in transactions]

    def _report(self, event: Event) -> None:
        if event.update is not None:
            if event.kind in SETTLED:
                self.detector.forget(event.whale.alert.transaction_id)
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


def _outcomes(known: Mapping[str, Whale], change: MempoolChange, now: float) -> list[Draft]:
    """Return the outcomes that a change reports for these whales."""
    block = change.block
    drafts = [
        lifecycle.replaced(known[replacement.replaced], replacement.by, now)
        for replacement in change.replaced
        if replacement.replaced in known
    ]
    if block is not None:
        drafts += [lifecycle.confirmed(known[txid], block, now) for txid in change.mined if txid in known]
    return drafts


def _updated(market: Market, change: MempoolChange) -> Market:
    """Return the market after a change; values that it does not contain stay as they are."""
    fields: dict[str, object] = {}
    if change.fees is not None:
        fields["fees"] = change.fees
    if change.projected is not None:
        fields["projected"] = change.projected
    if change.price is not None:
        fields["price"] = prices.received(market.price, change.price.usd, change.price.stated_at, change.received_at)
    heights = [block.height for block in (*(change.blocks or ()), *((change.block,) if change.block else ()))]
    if heights:
        fields["tip_height"] = max(heights)
    return replace(market, **fields) if fields else market
