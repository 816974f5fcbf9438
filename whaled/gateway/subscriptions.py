"""Subscriptions of clients: joins them to the hub, and replays the event log to those that resume or fell behind."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Protocol

from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway import wire
from whaled.gateway.connection import Connection
from whaled.gateway.hub import Hub, HubMeter
from whaled.gateway.pages import LogReader, LostError, Pages
from whaled.gateway.replay import Replay, TooSlowError
from whaled.gateway.session import Resume, resume
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Position, UpstreamState
from whaled.whales.filters import EVERYTHING, Filter


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


class DeliveryMeter(HubMeter, Protocol):
    """The counters of deliveries."""

    def replayed(self, frames: int, *, recovered: bool) -> None:
        """Count a replay that ended, or, if not `recovered`, a position that could not be recovered."""
        ...


class Subscriptions:
    """The delivery state of clients: each one that may read is live in the hub, in replay, or has unsubscribed."""

    def __init__(
        self, event_log: EventLog, settings: GatewaySettings, meter: DeliveryMeter, share: LoopShare, now: float
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
        self._filters: dict[Connection, Filter] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._reading: asyncio.Task[None] | None = None
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

    def run_in(self, tasks: asyncio.TaskGroup) -> None:
        """Run replays, and the reader of their pages, as tasks of this group."""
        self._tasks = tasks
        self._reading = tasks.create_task(self._pages.run(), name="gateway pages")

    @property
    def upstream(self) -> UpstreamState:
        """The state of the link to the backend, as last sent to clients."""
        return self._upstream[0]

    @property
    def replaying(self) -> int:
        """The number of clients in replay."""
        return sum(connection.delivery is not None for connection in self._filters)

    def publish_upstream_state(self, state: UpstreamState, now: float) -> None:
        """Send clients the state of the link to the backend, if it changed."""
        if state is not self._upstream[0]:
            # Publish before the new state is stored: a client without room for the frame starts a replay that records
            # the old state as the last one sent, and sends the new one at its end.
            self.hub.publish_upstream_state(state, now)
            self._upstream = (state, now)

    def join(self, connection: Connection) -> None:
        """Deliver all events to a newly admitted client that may read, until it subscribes."""
        state, since = self._upstream
        if state is not UpstreamState.CONNECTED:
            connection.answer(wire.status_frame(state, since))
        self._filters[connection] = EVERYTHING
        self.hub.join(connection, EVERYTHING)

    def attach(self, connection: Connection, chosen: Filter, since: wire.Since | None) -> None:
        """Send `subscribed`, then deliver the events that pass `chosen`, from `since` on (None: from now on)."""
        self.detach(connection)
        self._filters[connection] = chosen
        state = self.upstream
        if isinstance(since, wire.At):
            self._deliver(connection, self._attach_at(connection, chosen, since, state))
        else:
            self._resume(connection, chosen, since, state)

    async def _attach_at(
        self, connection: Connection, chosen: Filter, since: wire.At, announced: UpstreamState
    ) -> None:
        before = await self._log.offset_before(since.time.timestamp())
        # Retention may have removed events after that time, unless an event before it is still in the log.
        is_complete = self._log.oldest <= 1 or before >= self._log.oldest
        position = Position(self.hub.epoch, before if is_complete else -1)
        await self._replay_from(connection, chosen, self._answer(connection, chosen, position), announced)

    def _resume(
        self,
        connection: Connection,
        chosen: Filter,
        since: Position | wire.Last | None,
        announced: UpstreamState,
    ) -> None:
        cursor = self._answer(connection, chosen, since)
        if cursor == self.hub.head and announced is self.upstream:
            self.hub.join(connection, chosen)
        else:
            self._deliver(connection, self._replay_from(connection, chosen, cursor, announced))

    def _answer(self, connection: Connection, chosen: Filter, since: Position | wire.Last | None) -> int:
        """Send `subscribed` and return the cursor at which delivery starts."""
        start = resume(since, epoch=self.hub.epoch, head=self.hub.head, oldest=self._log.oldest)
        if start.recovered and start.cursor < self._log.whole_from - 1:
            start = Resume(self.hub.head, recovered=False)  # damage after the cursor, and recovery is all or nothing
        oldest = None
        if start.recovered is False:
            oldest = Position(self.hub.epoch, self._log.whole_from)
            self._meter.replayed(0, recovered=False)
        connection.answer(
            wire.subscribed_frame(
                chosen.normalised(),
                recovered=start.recovered,
                start=Position(self.hub.epoch, start.cursor),
                position=self.hub.position,
                oldest=oldest,
            )
        )
        return start.cursor

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        self._deliver(connection, self._replay_from(connection, self._filters[connection], cursor, self.upstream))

    def _deliver(self, connection: Connection, replay: Coroutine[object, object, None]) -> None:
        assert self._tasks is not None
        connection.delivery = self._tasks.create_task(replay, name="gateway replay")

    async def _replay_from(self, connection: Connection, chosen: Filter, cursor: int, announced: UpstreamState) -> None:
        try:
            session = connection.session
            assert session is not None  # a replay is only started by a session
            frames = await self._replay.run(connection, session, chosen, cursor)
        except TooSlowError:
            connection.close(Close.TOO_SLOW)
        except LostError:
            connection.delivery = None
            self._resume(connection, chosen, Position(self.hub.epoch, -1), announced)
        else:
            connection.delivery = None
            self._meter.replayed(frames, recovered=True)
            if self.upstream is not announced:
                # `publish_upstream_state` reaches live members only.
                connection.answer(wire.status_frame(*self._upstream))

    def detach(self, connection: Connection) -> None:
        """Stop delivery to a client."""
        self.hub.leave(connection)
        self._filters.pop(connection, None)
        if connection.delivery is not None:
            connection.delivery.cancel()
            connection.delivery = None

    def cancel(self) -> None:
        """Cancel all replays and the reader of their pages."""
        if self._reading is not None:
            self._reading.cancel()
        for connection in list(self._filters):
            if connection.delivery is not None:
                connection.delivery.cancel()
