"""From an upstream frame to a published event: detect, complete, commit, publish. One message at a time, in order."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Protocol

import structlog
from msgspec.structs import replace

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

# Of one frame at most so many transactions are asked for inputs that only a watch rule needs: a backend that restarted
# brings its whole mempool at once.
OPEN_LIMIT = 500
# After these the stream rarely brings a whale again.
SETTLED = {Kind.CONFIRMED, Kind.REPLACED}

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Feed(Protocol):
    """The link to the backend."""

    def messages(self) -> AsyncGenerator[FeedMessage, None]:
        """What arrives, over reconnects, without end."""
        ...


class Inputs(Protocol):
    """Asks the backend for the outputs a transaction spends."""

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        """The transactions with their prevouts, or as they were if these cannot be had in time."""
        ...


class Log(Conflicts, Protocol):
    """The event log, as far as new events go."""

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Commit; returns what was new."""
        ...

    async def rehearse(self, draft: Draft) -> Event:
        """Take a draft the way of `append` and keep nothing of it."""
        ...


class Publisher(Protocol):
    """Who hears of events."""

    @property
    def at_once(self) -> int:
        """How many events to publish before the loop is let go."""
        ...

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events."""
        ...

    def rehearse(self, event: Event) -> None:
        """Deliver the event of a canary to no client."""
        ...

    def publish_upstream_state(self, state: UpstreamState) -> None:
        """The link changed."""
        ...


class Priority(Protocol):
    """Lets what clients ask for wait."""

    def hold(self) -> AbstractContextManager[None]:
        """An alert is on its way."""
        ...


class Observer(Protocol):
    """Who hears every message after it was handled."""

    def observe(self, message: FeedMessage) -> None:
        """Take note; nothing waits here."""
        ...


class PipelineMeter(Protocol):
    """What detection counts."""

    def transactions(self, count: int) -> None:
        """Transactions looked at."""
        ...

    def whale(self, alert: Alert, at: float) -> None:
        """A whale, committed."""
        ...

    def inputs_unknown(self) -> None:
        """A whale whose inputs could not be had in time."""
        ...

    def watch_inputs_unknown(self, count: int) -> None:
        """Transactions that watch rules could not be tried on in full: their inputs are unknown."""
        ...

    def price(self, at: float | None) -> None:
        """The price that is known now, by its time; None if it is unknown."""
        ...

    def updated(self, kind: Kind, blocks_off: int | None) -> None:
        """A whale's fate, committed; `blocks_off` is how far the predicted block was off."""
        ...

    def latency(self, committed_s: float, published_s: float) -> None:
        """From the frame's arrival to the commit, and to the last client's socket."""
        ...


class Pipeline:
    """Handles upstream messages. `detector` may be replaced between two messages (reload)."""

    def __init__(
        self,
        *,
        detector: Detector,
        event_log: Log,
        publisher: Publisher,
        priority: Priority,
        meter: PipelineMeter,
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
        # What the backend cannot give, None if nothing is missing.
        self.shortfall: str | None = None
        self._hand = asyncio.Lock()
        self.observer: Observer | None = None
        # The start is silent: no price is known before the first frame.
        self._was_usd_rule_blind = False

    async def run(self, feed: Feed) -> None:
        """Handle messages until cancelled."""
        async with aclosing(feed.messages()) as messages:
            async for message in messages:
                match message:
                    case Received():
                        async with self._hand:
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
        """Wait until the message in hand, if any, is committed and published."""
        async with self._hand:
            pass

    async def handle(self, message: Received) -> None:
        """Take in one frame: what it says is committed and published when this returns. Raises EventLogError."""
        frame = message.frame
        self._observe(frame, message.received_at)
        if frame.delta is None:
            return
        delta, block = frame.delta, frame.block
        self._meter.transactions(delta.added_count)
        sure, open_ = self._candidates(delta)
        # While the backend is asked for inputs nothing of the alert is to be done here: clients need not wait.
        now = self._clock()
        completed = await self._completed(sure)
        with self._priority.hold():
            await self._publish(message, await self._drafts(completed, delta, block, now))
        if open_:
            now = self._clock()
            completed = await self._completed_open(open_)
            with self._priority.hold():
                await self._publish(message, self._drafts_of_open(completed, delta, block, now))
        for txid in delta.mined:  # the log knows the whales among them, and the stream does not bring them again
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
        """Publish what is committed. A block may confirm hundreds of whales, and thousands of filters look at each."""
        while events:
            count = self._publisher.at_once
            self._publisher.publish(events[:count])
            events = events[count:]
            if events:
                await asyncio.sleep(0)

    async def commit(self, decide: Callable[[], Awaitable[Sequence[Draft]]]) -> list[Event]:
        """Commit and publish what was learned beside the stream, between two of its messages: nothing of it happens
        from the moment that `decide` begins to look until its drafts are stored.
        """
        async with self._hand:
            # Clients' requests go on meanwhile: a backfill may take minutes.
            events = await self._log.append(await linked(await decide(), self._log))
            await self._deliver(events)
        for event in events:
            self._report(event)
        return events

    def assess(
        self, transaction: Transaction, *, source: Source, now: float, market: Market, replaces: str | None = None
    ) -> Whale | None:
        """The whale that this transaction is by the rules in force, None if it is none."""
        return self.detector.assess(transaction, market=market, now=now, source=source, replaces=replaces)

    @property
    def minimum_sat(self) -> int:
        """The least sum of outputs and fee that is worth looking at."""
        return self.detector.minimum_sat

    @property
    def is_usd_rule_blind(self) -> bool:
        """Whether `detection.threshold_usd` matches nothing because the price is unknown or too old."""
        rules = self.detector.rules
        return (
            rules.threshold_usd is not None and prices.usable(self.market, self._clock(), rules.price_max_age_s) is None
        )

    async def rehearse(self, txid: str) -> None:
        """Take a canary the way of every whale, behind the message in hand; nothing is kept and nothing counted."""
        async with self._hand:
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
        """Take in what a frame says of the market."""
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
        """New transactions that a rule matches as they are known, and those that one may match by their inputs."""
        now = self._clock()
        sure: list[Transaction] = []
        open_: list[Transaction] = []
        for transaction in self.detector.candidates(delta.at_least(self.detector.minimum_sat)):
            if self.detector.matched(transaction, self.market, now):
                sure.append(transaction)
            elif self.detector.is_open(transaction):
                open_.append(transaction)
        return sure, open_

    async def _drafts(
        self, completed: Sequence[Transaction], delta: Delta, block: Block | None, now: float
    ) -> list[Draft]:
        """Alerts of the whales among the transactions, and the fates that the frame tells of all whales."""
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
        return [*drafts, *await self._unnamed(delta, known, now), *await self._not_outdated(outcomes)]

    async def _not_outdated(self, drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without replacements of whales that are confirmed.

        The stream may be behind its node: a scan has seen the block that holds a whale which was replaced and came back
        before. If that block is dead, the backfill finds it out, and the replacement with it.
        """
        replaced = [draft.whale.alert.transaction_id for draft in drafts if draft.kind is Kind.REPLACED]
        histories = await self._log.histories(replaced) if replaced else {}
        confirmed = {txid for txid, history in histories.items() if history[-1][0] is Kind.CONFIRMED}
        return [
            draft
            for draft in drafts
            if draft.kind is not Kind.REPLACED or draft.whale.alert.transaction_id not in confirmed
        ]

    async def _completed_open(self, open_: Sequence[Transaction]) -> list[Transaction]:
        """Those that a rule may match by their inputs, with these.

        They are asked for after the alerts of the frame went out, which do not wait for them. What is left unknown is
        looked at again when it is in a block.
        """
        completed = await self._completed(open_[-OPEN_LIMIT:])
        unknown = len(open_) - len(completed) + sum(map(needs_inputs, completed))
        if unknown:
            self._meter.watch_inputs_unknown(unknown)
        return completed

    def _drafts_of_open(
        self, completed: Sequence[Transaction], delta: Delta, block: Block | None, now: float
    ) -> list[Draft]:
        """Alerts of those that a rule matches by their inputs, and what the frame tells of their fates."""
        whales = self._whales(completed, delta, now)
        known = {whale.alert.transaction_id: whale for whale in whales}
        return [lifecycle.alerted(whale, now) for whale in whales] + _outcomes(known, delta, block, now)

    def _whales(self, transactions: Iterable[Transaction], delta: Delta, now: float) -> list[Whale]:
        return [
            whale
            for transaction in transactions
            if (whale := self._assess(transaction, delta.predecessor(transaction.txid), now)) is not None
        ]

    async def _unnamed(self, delta: Delta, known: Mapping[str, Whale], now: float) -> list[Draft]:
        """Replacements within a message that the backend does not name as such: it expects the new transaction to pay
        a higher fee by itself, which the parent of a package does not.
        """
        named = {replacement.replaced for replacement in delta.replaced}
        left = [txid for txid in delta.removed if txid in known and txid not in named]
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
        """The transactions with their inputs, as far as the backend gives them in time."""
        inputs = self.inputs
        if inputs is None:
            return list(transactions)
        wanting = [transaction for transaction in transactions if needs_inputs(transaction)]
        answers = {each.txid: each for each in await inputs.prevouts(wanting, self.inputs_wait_s)} if wanting else {}
        return [answers.get(transaction.txid, transaction) for transaction in transactions]

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
    """The fates that a frame tells of these whales."""
    drafts = [
        lifecycle.replaced(known[replacement.replaced], replacement.by, now)
        for replacement in delta.replaced
        if replacement.replaced in known
    ]
    if block is not None:
        drafts += [lifecycle.confirmed(known[txid], block, now) for txid in delta.mined if txid in known]
    return drafts


def _updated(market: Market, frame: Frame, received_at: float) -> Market:
    """The market after a frame: what it does not mention stays as it was known."""
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
