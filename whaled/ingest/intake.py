"""Takes the messages of the stream, one at a time and in order: detect, complete, commit.

The caller passes each message on to the backfill only after that, so that the backfill finds its events in the log.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import structlog

from whaled.detection_meters import DetectionMeter
from whaled.eventlog import queries
from whaled.ingest import ingest as rules
from whaled.ingest.committer import Committer, Log
from whaled.ingest.ingest import Ingest
from whaled.model import Draft, Transaction, UpstreamState, Whale
from whaled.source import MempoolChange, Shortfall, StateChanged, StreamMessage, degraded_by
from whaled.whales import lifecycle
from whaled.whales.detect import needs_inputs

# The most transactions of one frame whose inputs are requested only for a watch rule. A backend that restarted sends
# its whole mempool at once.
OPEN_LIMIT = 500

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


Inputs = Callable[[Sequence[Transaction]], Awaitable[list[Transaction]]]
"""Returns the transactions with the outputs that they spend, unchanged where these do not arrive in time. It never
raises."""


class StatePublisher(Protocol):
    """The delivery of the link's state to clients."""

    def publish_upstream_state(self, state: UpstreamState) -> None:
        """Publish the new state of the link."""
        ...


class Priority(Protocol):
    """The means to delay work for client requests while an alert is in progress."""

    def hold(self) -> AbstractContextManager[None]:
        """Delay client requests within the context: an alert is in progress."""
        ...


class Intake:
    """The handler of the stream's messages.

    `shortfall` describes what the backend cannot provide; None if nothing is missing. Without `inputs`, what
    transactions spend is not requested.
    """

    def __init__(
        self,
        *,
        ingest: Ingest,
        committer: Committer,
        event_log: Log,
        publisher: StatePublisher,
        priority: Priority,
        meter: DetectionMeter,
        inputs: Inputs | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shortfall: str | None = None
        self._ingest = ingest
        self._committer = committer
        self._log = event_log
        self._publisher = publisher
        self._priority = priority
        self._meter = meter
        self._inputs = inputs
        self._clock = clock
        self._link = UpstreamState.DISCONNECTED
        # False at the start, although no price is known yet: the first price must not be logged as a recovery.
        self._was_usd_rule_blind = False
        meter.usd_rule_blind.set_function(lambda: self.is_usd_rule_blind)
        meter.book_addresses.set_function(lambda: len(ingest.detector.book.owners))
        meter.book_owners.set_function(lambda: ingest.detector.book.owners.labels)

    async def take(self, message: StreamMessage) -> None:
        """Handle one message; its events are committed and published when this returns. Raises EventLogError."""
        match message:
            case MempoolChange():
                async with self._committer.turn():
                    await self._handle(message)
            case StateChanged(state=state):
                self._link = state
                self._publisher.publish_upstream_state(degraded_by(self.shortfall, state))
            case Shortfall(why=why):
                self.shortfall = why
                self._publisher.publish_upstream_state(degraded_by(why, self._link))
            case _:
                pass

    async def rehearse(self, canary: Callable[[int], MempoolChange]) -> None:
        """Run a canary through the same steps as a whale, after the message being handled.

        `canary` returns the change with a canary that moves a value in satoshi, decoded as a message of the stream.
        Nothing is stored and nothing is counted.
        """
        async with self._committer.turn():
            for draft in self._ingest.rehearsed(canary(self._ingest.detector.canary_sat), self._clock()):
                with self._priority.hold():
                    await self._committer.rehearse(draft)

    @property
    def is_usd_rule_blind(self) -> bool:
        """True if `detection.threshold_usd` matches nothing because the price is unknown or too old."""
        return self._ingest.is_usd_rule_blind(self._clock())

    async def _handle(self, change: MempoolChange) -> None:
        self._observe(change)
        self._meter.transactions(len(change.entered.added))
        matching, undecided = self._ingest.candidates(change, self._clock())
        # Client requests are not delayed while the backend answers the request for inputs: the alert cannot advance.
        now = self._clock()
        completed = await self._completed(matching)
        with self._priority.hold():
            await self._committer.store(await self._drafts(completed, change, now), change.received_monotonic)
        if undecided:
            now = self._clock()
            completed = await self._completed_undecided(undecided)
            with self._priority.hold():
                drafts = await self._drafts_of_undecided(completed, change, now)
                await self._committer.store(drafts, change.received_monotonic)
        for txid in change.mined:  # the log has the whales among them, and the stream does not send them again
            self._ingest.forget(txid)

    def _observe(self, change: MempoolChange) -> None:
        self._ingest.observe(change)
        if change.price is not None:
            price = self._ingest.market.price
            self._meter.price(price.at if price is not None else None)
        is_blind = self.is_usd_rule_blind
        if is_blind and not self._was_usd_rule_blind:
            logger.warning("usd_threshold_suspended")
        elif self._was_usd_rule_blind and not is_blind:
            logger.info("usd_threshold_resumed")
        self._was_usd_rule_blind = is_blind

    async def _drafts(self, completed: Sequence[Transaction], change: MempoolChange, now: float) -> list[Draft]:
        """Return alerts for the whales among the transactions, and the outcomes of whales that the change reports."""
        for transaction in completed:
            if self._inputs is not None and needs_inputs(transaction):
                self._meter.inputs_unknown()
        whales = self._ingest.whales(completed, change, now)
        alerts = [lifecycle.alerted(whale, now) for whale in whales]
        touched = rules.touched(change)
        if not touched:
            return alerts
        known = await self._log.read_each(queries.whales, touched)
        known.update((whale.alert.transaction_id, whale) for whale in whales)
        left = rules.left_without_reason(change, known)
        outpoints = await self._log.read_each(queries.outpoints, left)
        inferred = rules.unreported_replacements(known, outpoints, change, now)
        return [*alerts, *await self._valid(rules.outcomes(known, change, now), inferred)]

    async def _drafts_of_undecided(
        self, completed: Sequence[Transaction], change: MempoolChange, now: float
    ) -> list[Draft]:
        """Return alerts for the transactions that a rule matches by their inputs, and their outcomes in the change."""
        whales = self._ingest.whales(completed, change, now)
        known: dict[str, Whale] = {whale.alert.transaction_id: whale for whale in whales}
        outcomes = await self._valid(rules.outcomes(known, change, now), [])
        return [*(lifecycle.alerted(whale, now) for whale in whales), *outcomes]

    async def _valid(self, reported: Sequence[Draft], inferred: Sequence[Draft]) -> list[Draft]:
        """Return those outcomes that may follow the events in the log."""
        txids = {draft.whale.alert.transaction_id for draft in (*reported, *inferred)}
        return rules.valid(reported, inferred, await self._log.read_each(queries.histories, txids))

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

    async def _completed(self, transactions: Sequence[Transaction]) -> list[Transaction]:
        """Return the transactions with their inputs where the backend provides them in time."""
        if self._inputs is None:
            return list(transactions)
        missing = [transaction for transaction in transactions if needs_inputs(transaction)]
        found = await self._inputs(missing) if missing else []
        fetched = {each.txid: each for each in found}
        return [fetched.get(transaction.txid, transaction) for transaction in transactions]
