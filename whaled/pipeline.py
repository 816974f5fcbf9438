"""The path from an upstream frame to a published event: detect, complete, commit, publish.

Messages are handled one at a time, in order.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Protocol

import structlog
from msgspec.structs import replace

from whaled.detection_meters import DetectionMeter
from whaled.model import (
    SAT_PER_BTC,
    Alert,
    Block,
    Draft,
    Event,
    Kind,
    Market,
    Source,
    Transaction,
    UpstreamState,
    Whale,
)
from whaled.upstream.canary_frame import canary_frame
from whaled.upstream.dialect import Delta, Frame, decode
from whaled.upstream.messages import FeedMessage, Received, Shortfall, StateChanged, degraded_by
from whaled.whales import lifecycle, prices
from whaled.whales.conflicts import Conflicts, linked
from whaled.whales.detect import Detector, needs_inputs
from whaled.whales.history import next_event

# The most transactions of one frame whose inputs are requested only for a watch rule. A backend that restarted sends
# its whole mempool at once.
OPEN_LIMIT = 500
# The stream rarely sends a transaction again after one of these events.
SETTLED = {Kind.CONFIRMED, Kind.REPLACED}

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Feed(Protocol):
    """The link to the backend."""

    def messages(self) -> AsyncGenerator[FeedMessage, None]:
        """Yield messages across reconnects, without end."""
        ...


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

    def observe(self, message: FeedMessage) -> None:
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

    async def run(self, feed: Feed) -> None:
        """Handle messages until cancelled."""
        async with aclosing(feed.messages()) as messages:
            async for message in messages:
                match message:
                    case Received():
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

    async def handle(self, message: Received) -> None:
        """Handle one frame; its events are committed and published when this returns. Raises EventLogError."""
        frame = message.frame
        self._observe(frame, message.received_at)
        if frame.delta is None:
            return
        delta, block = frame.delta, frame.block
        self._meter.transactions(delta.added_count)
        matching, undecided = self._candidates(delta)
        # Client requests are not delayed while the backend answers the request for inputs: the alert cannot advance.
        now = self._clock()
        completed = await self._completed(matching)
        with self._priority.hold():
            await self._publish(message, await self._drafts(completed, delta, block, now))
        if undecided:
            now = self._clock()
            completed = await self._completed_undecided(undecided)
            with self._priority.hold():
                await self._publish(message, self._drafts_of_undecided(completed, delta, block, now))
        for txid in delta.mined:  # the log has the whales among them, and the stream does not send them again
            self.detector.forget(txid)

    async def _publish(self, message: Received, drafts: Sequence[Draft]) -> None:
        drafts = await linked(drafts, self._log)
        if not drafts:
            return
        events = await self._log.append(drafts)
        committed_s = time.monotonic() - message.received_monotonic
        await self._deliver(events)
        if events:
            self._meter.latency(committed_s, time.monotonic() - message.received_monotonic)
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

    async def rehearse(self, txid: str) -> None:
        """Run a canary through the same steps as a whale, after the message being handled.

        Nothing is stored and nothing is counted.
        """
        async with self._ingest_lock:
            detector = self.detector
            frame = decode(canary_frame(txid, detector.canary_sat))
            assert frame.delta is not None
            now = self._clock()
            for transaction in detector.candidates(frame.delta.at_least(detector.minimum_sat)):
                detector.forget(transaction.txid)
                whale = detector.rehearse(transaction, market=self.market, now=now)
                if whale is not None:
                    with self._priority.hold():
                        self._publisher.rehearse(await self._log.rehearse(lifecycle.alerted(whale, now)))

    def _observe(self, frame: Frame, received_at: float) -> None:
        """Update the market from a frame."""
        self.market = _updated(self.market, frame, received_at)
        if frame.price_known:
            price = self.market.price
            self._meter.price(price.at if price is not None else None)
            self.detector.priced(price)
        is_blind = self.is_usd_rule_blind
        if is_blind and not self._was_usd_rule_blind:
            logger.warning("the price is unknown or too old: detection.threshold_usd matches nothing until it is known")
        elif self._was_usd_rule_blind and not is_blind:
            logger.info("detection.threshold_usd is compared with the price again")
        self._was_usd_rule_blind = is_blind

    def _candidates(self, delta: Delta) -> tuple[list[Transaction], list[Transaction]]:
        """Return the new transactions that a rule matches now, and those that a rule may match by their inputs."""
        now = self._clock()
        matching: list[Transaction] = []
        undecided: list[Transaction] = []
        for transaction in self.detector.candidates(delta.at_least(self.detector.minimum_sat)):
            if self.detector.matched(transaction, self.market, now):
                matching.append(transaction)
            elif self.detector.is_open(transaction):
                undecided.append(transaction)
        return matching, undecided

    async def _drafts(
        self, completed: Sequence[Transaction], delta: Delta, block: Block | None, now: float
    ) -> list[Draft]:
        """Return alerts for the whales among the transactions, and the outcomes of whales that the frame reports."""
        for transaction in completed:
            if self.inputs is not None and needs_inputs(transaction):
                self._meter.inputs_unknown()
        whales = self._whales(completed, delta, now)
        drafts = [lifecycle.alerted(whale, now) for whale in whales]
        touched = [*delta.mined, *(replacement.replaced for replacement in delta.replaced)]
        if delta.added_count:
            touched += delta.removed
        if not touched:
            return drafts
        known = await self._log.whales(touched)
        known.update((whale.alert.transaction_id, whale) for whale in whales)
        outcomes = _outcomes(known, delta, block, now)
        replacements = await self._unreported_replacements(delta, known, now)
        return [*drafts, *replacements, *await self._still_current(outcomes)]

    async def _still_current(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts without replacements of whales that are confirmed.

        The stream may lag behind its node: a block scan may already have read the block that contains the whale, while
        the stream still reports an earlier replacement of it. If that block has left the chain, the backfill detects
        this, and the replacement with it.
        """
        replaced = [draft.whale.alert.transaction_id for draft in drafts if draft.kind is Kind.REPLACED]
        histories = await self._log.histories(replaced) if replaced else {}
        confirmed = {txid for txid, history in histories.items() if history[-1][0] is Kind.CONFIRMED}
        return [
            draft
            for draft in drafts
            if draft.kind is not Kind.REPLACED or draft.whale.alert.transaction_id not in confirmed
        ]

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

    def _drafts_of_undecided(
        self, completed: Sequence[Transaction], delta: Delta, block: Block | None, now: float
    ) -> list[Draft]:
        """Return alerts for the transactions that a rule matches by their inputs, and their outcomes in the frame."""
        whales = self._whales(completed, delta, now)
        known = {whale.alert.transaction_id: whale for whale in whales}
        return [lifecycle.alerted(whale, now) for whale in whales] + _outcomes(known, delta, block, now)

    def _whales(self, transactions: Iterable[Transaction], delta: Delta, now: float) -> list[Whale]:
        return [
            whale
            for transaction in transactions
            if (whale := self._assess(transaction, delta.predecessor(transaction.txid), now)) is not None
        ]

    async def _unreported_replacements(self, delta: Delta, known: Mapping[str, Whale], now: float) -> list[Draft]:
        """Return the replacements within a message that the backend does not report as such.

        The backend expects the new transaction to pay a higher fee by itself, which the parent of a package does not.
        """
        reported = {replacement.replaced for replacement in delta.replaced}
        left = [txid for txid in delta.removed if txid in known and txid not in reported]
        if not left or not delta.added_count:
            return []
        spent = {outpoint: txid for txid, found in (await self._log.outpoints(left)).items() for outpoint in found}
        by = {spent[outpoint]: spender for outpoint, spender in delta.spending(spent).items()}
        histories = await self._log.histories(by)
        drafts = (lifecycle.replaced(known[txid], spender, now) for txid, spender in by.items() if spender != txid)
        return [
            news
            for draft in drafts
            if (news := next_event(draft, histories.get(draft.whale.alert.transaction_id, []))) is not None
        ]

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
                "whale update",
                txid=event.whale.alert.transaction_id,
                status=event.update.status.value,
                offset=event.offset,
            )
            return
        alert = event.whale.alert
        self._meter.whale(alert, event.at)
        self.last_whale = (alert, event.at)
        logger.info(
            "whale",
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


def _outcomes(known: Mapping[str, Whale], delta: Delta, block: Block | None, now: float) -> list[Draft]:
    """Return the outcomes that a frame reports for these whales."""
    drafts = [
        lifecycle.replaced(known[replacement.replaced], replacement.by, now)
        for replacement in delta.replaced
        if replacement.replaced in known
    ]
    if block is not None:
        drafts += [lifecycle.confirmed(known[txid], block, now) for txid in delta.mined if txid in known]
    return drafts


def _updated(market: Market, frame: Frame, received_at: float) -> Market:
    """Return the market after a frame; values that the frame does not contain stay as they are."""
    changes: dict[str, object] = {}
    if frame.fees is not None:
        changes["fees"] = frame.fees
    if frame.projected is not None:
        changes["projected"] = frame.projected
    if frame.price_known:
        changes["price"] = prices.received(market.price, frame.btc_usd, frame.price_at, received_at)
    heights = [block.height for block in (*(frame.blocks or ()), *((frame.block,) if frame.block else ()))]
    if heights:
        changes["tip_height"] = max(heights)
    return replace(market, **changes) if changes else market
