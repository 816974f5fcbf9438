"""Subscriptions of clients: joins them to the hub, and replays the event log to those that resume or fell behind."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple, Protocol

from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway import commands, messages, positions
from whaled.gateway.connection import Connection
from whaled.gateway.hub import Hub
from whaled.gateway.meters import GatewayMeter
from whaled.gateway.pages import LogReader, LostError, Pages
from whaled.gateway.positions import Start, not_recovered
from whaled.gateway.replay import Replay, TooSlowError
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Position, UpstreamState
from whaled.whales.filters import Filter


class EventLog(LogReader, Protocol):
    """The part of the event log that the gateway uses."""

    epoch: str
    head: int
    oldest: int

    @property
    def whole_from(self) -> int:
        """The offset from which no event is known to be damaged or missing; at least `oldest`."""
        ...

    async def offset_before(self, at: float) -> int:
        """Return the newest offset older than a time (Unix seconds)."""
        ...


class Delivery(NamedTuple):
    """The delivery to one client: its filter, and the offset that it has reached, in replay or live."""

    filter: Filter
    is_replaying: bool
    offset: int


class _Subscription:
    """The filter of a client, and its replay while it is not live."""

    __slots__ = ("cursor", "filter", "replay")

    def __init__(self, chosen: Filter) -> None:
        self.filter = chosen
        self.cursor = 0  # how far the replay is
        self.replay: asyncio.Task[None] | None = None


class Subscriptions:
    """The delivery state of clients: each one that may read is live in the hub, in replay, or has unsubscribed."""

    def __init__(
        self, event_log: EventLog, settings: GatewaySettings, meter: GatewayMeter, share: LoopShare, now: float
    ) -> None:
        self._log = event_log
        self._meter = meter
        self.hub = Hub(
            epoch=event_log.epoch,
            head=event_log.head,
            meter=meter,
            slice_bytes=settings.max_unsent,
            later=partial(share.add, Lane.KNOWN, source="filters"),
        )
        self._upstream: tuple[UpstreamState, float] = (UpstreamState.DISCONNECTED, now)
        self._subscribed: dict[Connection, _Subscription] = {}
        self._tasks = asyncio.TaskGroup()  # entered by `serving`
        meter.replaying.set_function(lambda: self.replaying)
        self._pages = Pages(log=event_log, share=share, head=lambda: self.hub.head, at_once=settings.replay_page)
        self._replay = Replay(pages=self._pages, hub=self.hub, share=share, slow_timeout_s=settings.slow_timeout)

    def short_of_memory(self, *, is_short: bool) -> None:
        """Stop caching pages of the event log while memory is short, or resume it."""
        self._pages.keeps = not is_short
        if is_short:
            self._pages.forget()

    def reconfigure(self, settings: GatewaySettings) -> None:
        """Apply new limits."""
        self.hub.slice_bytes = settings.max_unsent
        self._replay.slow_timeout_s = settings.slow_timeout
        self._pages.resize(settings.replay_page)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run replays, and read the pages that they need, until the body ends. Raises EventLogError in a group."""
        async with self._tasks:
            reading = self._tasks.create_task(self._pages.run(), name="gateway pages")
            try:
                yield
            finally:
                reading.cancel()
                for subscription in self._subscribed.values():
                    if subscription.replay is not None:
                        subscription.replay.cancel()

    @property
    def upstream(self) -> UpstreamState:
        """The state of the link to the backend, as last sent to clients."""
        return self._upstream[0]

    @property
    def replaying(self) -> int:
        """The number of clients in replay."""
        return sum(subscription.replay is not None for subscription in self._subscribed.values())

    def delivery(self, connection: Connection) -> Delivery | None:
        """Return what a client receives; None if it has not subscribed."""
        found = self._subscribed.get(connection)
        if found is None:
            return None
        return Delivery(found.filter, found.replay is not None, found.cursor if found.replay else self.hub.head)

    def publish_upstream_state(self, state: UpstreamState, now: float) -> None:
        """Send clients the state of the link to the backend, if it changed."""
        if state is not self._upstream[0]:
            # Publish before the new state is stored: a client without room for the frame starts a replay that records
            # the old state as the last one sent, and sends the new one at its end.
            self.hub.publish_upstream_state(state, now)
            self._upstream = (state, now)

    def join(self, connection: Connection, chosen: Filter) -> None:
        """Deliver the events that pass `chosen` to a newly admitted client that may read, until it subscribes."""
        state, since = self._upstream
        if state is not UpstreamState.CONNECTED:
            connection.answer(messages.status(state, since))
        self._subscribed[connection] = _Subscription(chosen)
        self.hub.join(connection.outbox, chosen)

    def attach(self, connection: Connection, chosen: Filter, since: commands.Since | None) -> None:
        """Send `subscribed`, then deliver the events that pass `chosen`, from `since` on (None: from now on)."""
        self.detach(connection)
        self._subscribed[connection] = _Subscription(chosen)
        if isinstance(since, commands.At):
            self._start(connection, self._attach_at(connection, since, self.upstream))
        else:
            self._begin(connection, self._start_of(since), self.upstream)

    async def _attach_at(self, connection: Connection, since: commands.At, announced: UpstreamState) -> None:
        before = await self._log.offset_before(since.time.timestamp())
        # Retention may have removed events after that time, unless an event before it is still in the log.
        is_complete = self._log.oldest <= 1 or before >= self._log.oldest
        start = self._start_of(Position(self.hub.epoch, before)) if is_complete else not_recovered(self.hub.head)
        self._answer(connection, start)
        await self._replay_from(connection, start.cursor, announced)

    def _start_of(self, since: Position | commands.Last | None) -> Start:
        log = self._log
        return positions.start(
            since, epoch=self.hub.epoch, head=self.hub.head, oldest=log.oldest, whole_from=log.whole_from
        )

    def _begin(self, connection: Connection, start: Start, announced: UpstreamState) -> None:
        """Send `subscribed` and deliver from `start` on. The client knows the state `announced` of the backend."""
        self._answer(connection, start)
        if start.cursor == self.hub.head and announced is self.upstream:
            self.hub.join(connection.outbox, self._subscribed[connection].filter)
        else:
            self._start(connection, self._replay_from(connection, start.cursor, announced))

    def _answer(self, connection: Connection, start: Start) -> None:
        oldest = None
        if start.recovered is False:
            oldest = Position(self.hub.epoch, self._log.whole_from)
            self._meter.replayed(0, recovered=False)
        chosen = self._subscribed[connection].filter
        connection.answer(
            messages.subscribed(
                chosen.normalised(),
                fixed=chosen.within.normalised() if chosen.within is not None else None,
                recovered=start.recovered,
                start=Position(self.hub.epoch, start.cursor),
                position=self.hub.position,
                oldest=oldest,
            )
        )

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        self._start(connection, self._replay_from(connection, cursor, self.upstream))

    def _start(self, connection: Connection, replay: Coroutine[object, object, None]) -> None:
        self._subscribed[connection].replay = self._tasks.create_task(replay, name="gateway replay")

    async def _replay_from(self, connection: Connection, cursor: int, announced: UpstreamState) -> None:
        subscription = self._subscribed[connection]
        session = connection.session
        assert session is not None  # only a session subscribes
        subscription.cursor = cursor

        def progressed(to: int) -> None:
            subscription.cursor = to

        try:
            frames = await self._replay.run(connection.outbox, session, subscription.filter, cursor, progressed)
        except TooSlowError:
            connection.close(Close.TOO_SLOW)
        except LostError:
            subscription.replay = None
            self._begin(connection, not_recovered(self.hub.head), announced)
        else:
            subscription.replay = None
            self._meter.replayed(frames, recovered=True)
            if self.upstream is not announced:
                # `publish_upstream_state` reaches live members only.
                connection.answer(messages.status(*self._upstream))

    def detach(self, connection: Connection) -> None:
        """Stop delivery to a client."""
        self.hub.leave(connection.outbox)
        subscription = self._subscribed.pop(connection, None)
        if subscription is not None and subscription.replay is not None:
            subscription.replay.cancel()
