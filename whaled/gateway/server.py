"""The WebSocket server: listens, counts, performs what sessions decide, keeps connections alive, drains."""

import asyncio
import itertools
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog
from websockets.typing import Origin

from whaled.config.sections import Auth as AuthSettings
from whaled.config.sections import Gateway as GatewaySettings
from whaled.errors import ClientErrorCode, Close, ListenError, TokenRefusal
from whaled.gateway import wire
from whaled.gateway.connection import Connection
from whaled.gateway.hub import Hub, HubMeter
from whaled.gateway.limits import ConnectionCaps, FailureLimit, Refusal
from whaled.gateway.replay import LogReader, LostError, Replay, TooSlowError
from whaled.gateway.session import (
    Action,
    Admit,
    Attach,
    Authenticator,
    Detach,
    Limited,
    Refused,
    Rejected,
    Session,
    SessionLimits,
    resume,
)
from whaled.model import Event, Position, UpstreamState
from whaled.whales.filters import EVERYTHING, Filter

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Connections are pinged in turns, so that 10,000 pings do not go out in one instant.
KEEPALIVE_SLOTS = 32
# A drain closes clients this far apart, so that they do not all come back at once.
DRAIN_SPACING_S = 0.002
DRAIN_SPREAD_PART = 0.5
# Connections beyond the caps that wait for their refusal. They are descriptors too: further ones are cut off at once.
TURNED_AWAY_LIMIT = 256


class EventLog(LogReader, Protocol):
    """What the gateway needs of the event log."""

    epoch: str
    head: int
    oldest: int

    async def offset_before(self, at: float) -> int:
        """The newest offset older than a time."""
        ...


class GatewayMeter(HubMeter, Protocol):
    """What the gateway counts."""

    def refused(self, reason: Refusal) -> None:
        """A connection that did not become a session."""
        ...

    def opened(self) -> None:
        """A session."""
        ...

    def closed(self, code: int) -> None:
        """A session ended with this close code."""
        ...

    def authenticated(self, failure: TokenRefusal | wire.AuthMessage | None) -> None:
        """A credential was judged; None is success."""
        ...

    def received(self, size_bytes: int) -> None:
        """A message from a client."""
        ...

    def rejected(self, code: ClientErrorCode) -> None:
        """A message that was answered with an error."""
        ...

    def failed(self) -> None:
        """A bug met while serving a client."""
        ...

    def replayed(self, frames: int, *, recovered: bool) -> None:
        """A replay ended, or a position was not honoured."""
        ...


class Gateway:
    """All client connections of this process."""

    def __init__(
        self,
        settings: GatewaySettings,
        auth: AuthSettings,
        *,
        log_: EventLog,
        authenticator: Authenticator | None,
        meter: GatewayMeter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log_
        self._meter = meter
        self.now = clock
        self.hub = Hub(epoch=log_.epoch, head=log_.head, meter=meter, slice_bytes=settings.max_unsent)
        self.auth_failures = 0
        self.authenticated = 0
        self.turned_away = 0
        self.retry_after_s = 5
        self.is_draining = False
        self._upstream: tuple[UpstreamState, float] = (UpstreamState.DISCONNECTED, clock())
        self._connections: tuple[dict[Connection, None], ...] = tuple({} for _ in range(KEEPALIVE_SLOTS))
        self._next_slot = 0
        self._emptied = asyncio.Event()
        self._filters: dict[Connection, Filter] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._caps = ConnectionCaps(
            total=settings.max_connections,
            per_address=settings.max_connections_per_address,
            unauthenticated=settings.max_unauthenticated,
        )
        self.reconfigure(settings, auth, authenticator)

    def reconfigure(self, settings: GatewaySettings, auth: AuthSettings, authenticator: Authenticator | None) -> None:
        """Take other limits and keys from now on. Open sessions keep the limits they started with."""
        self.settings = settings
        self.authenticator = authenticator
        self.allowed_origins: list[Origin | None] | None = (
            None if "*" in settings.origins else [None, *map(Origin, settings.origins)]
        )
        self._limits = SessionLimits.of(settings, auth)
        self._failures = FailureLimit(auth.failures_per_second, auth.failure_burst)
        self._caps.total_limit = settings.max_connections
        self._caps.per_address_limit = settings.max_connections_per_address
        self._caps.unauthenticated_limit = settings.max_unauthenticated
        self.hub.slice_bytes = settings.max_unsent
        self._replay = Replay(
            log=self._log,
            hub=self.hub,
            page=settings.replay_page,
            slice_bytes=settings.max_unsent,
            slow_timeout_s=settings.slow_timeout,
        )

    # --- running ---

    @asynccontextmanager
    async def serving(
        self, sockets: Sequence[socket.socket] = (), tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[tuple[str, int]]:
        """Listen and serve; yields the first address listened on. Leaving it aborts what `drain` left open.

        `sockets` are already listening (systemd); without them `host` and `port` of the settings are opened.
        Raises ListenError.
        """
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            servers = await self._listen(sockets, tls)
            keepalive = tasks.create_task(self._keep_alive(), name="gateway keepalive")
            positions = tasks.create_task(self._tell_positions(), name="gateway positions")
            try:
                yield servers[0].sockets[0].getsockname()[:2]
            finally:
                keepalive.cancel()
                positions.cancel()
                for server in servers:
                    server.close()
                for connection in self._all():
                    connection.close(Close.GOING_AWAY)
                    connection.abort()
                self._cancel_replays()

    async def _listen(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> list[asyncio.Server]:
        loop = asyncio.get_running_loop()
        settings = self.settings
        handshake_s = settings.handshake_timeout if tls is not None else None
        if sockets:
            # asyncio listens again with its own backlog (100 by default): give ours.
            return [
                await loop.create_server(
                    lambda: Connection(self), sock=sock, ssl=tls, backlog=settings.backlog,
                    ssl_handshake_timeout=handshake_s,
                )
                for sock in sockets
            ]  # fmt: skip
        try:
            return [
                await loop.create_server(
                    lambda: Connection(self), settings.host, settings.port, ssl=tls, backlog=settings.backlog,
                    ssl_handshake_timeout=handshake_s,
                )
            ]  # fmt: skip
        except OSError as error:
            raise ListenError(settings.host, settings.port, error, "set gateway.host and gateway.port") from error

    async def _keep_alive(self) -> None:
        for slot in itertools.cycle(self._connections):
            await asyncio.sleep(self.settings.ping_interval / KEEPALIVE_SLOTS)
            now = time.monotonic()
            for connection in list(slot):
                connection.keepalive(now)

    async def _tell_positions(self) -> None:
        while True:
            await asyncio.sleep(self.settings.position_interval)
            self.hub.tell_positions()

    async def drain(self, window_s: float) -> None:
        """Tell every client to come back later and close it, spread over part of the window; then cut off the rest."""
        self.is_draining = True
        clients = self._all()
        spread_s = min(window_s * DRAIN_SPREAD_PART, len(clients) * DRAIN_SPACING_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + window_s
        started = loop.time()
        for number, connection in enumerate(clients):
            retry_after_s = 0.5 + random.random() * max(1.0, spread_s)  # noqa: S311 - jitter, not a secret
            if connection.session is None:
                connection.abort()
                continue
            connection.write(wire.closing_frame(Close.RESTART, retry_after_s))
            connection.close(Close.RESTART)
            if number % 50 == 49:
                await asyncio.sleep(max(0.0, started + spread_s * (number + 1) / len(clients) - loop.time()))
        try:
            async with asyncio.timeout_at(deadline):
                while self._caps.total:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            stragglers = self._all()
            log.warning("drain window over, cutting off clients", clients=len(stragglers))
            for connection in stragglers:
                connection.abort()

    # --- what the daemon tells clients ---

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events."""
        self.hub.publish(events)

    def tell_upstream(self, state: UpstreamState) -> None:
        """Tell clients that the link to the backend changed."""
        if state is not self._upstream[0]:
            since = self.now()
            # Who has no room for it falls behind knowing the old state, and is told when there is room.
            self.hub.tell_upstream(state, since)
            self._upstream = (state, since)

    # --- what sessions ask (Surroundings) ---

    def position(self) -> Position:
        """The newest event published."""
        return self.hub.position

    def counters(self) -> wire.Counters:
        """The answer to `stats`."""
        return wire.Counters(self._caps.total, self.authenticated, self.hub.alerts_published, self.auth_failures)

    @property
    def upstream(self) -> UpstreamState:
        """The link to the backend, as clients were told last."""
        return self._upstream[0]

    @property
    def connections(self) -> int:
        """Open connections, authenticated or not."""
        return self._caps.total

    @property
    def unauthenticated(self) -> int:
        """Open connections that have not authenticated yet."""
        return self._caps.unauthenticated

    @property
    def replaying(self) -> int:
        """Connections that are being brought up to date from the log."""
        return sum(connection.delivery is not None for connection in self._filters)

    # --- what connections tell (ConnectionOwner) ---

    def connected(self, connection: Connection) -> Refusal | None:
        """Count a new connection, or say why it is refused."""
        refusal = Refusal.DRAINING if self.is_draining else self._caps.admit(connection.address)
        if refusal is not None:
            self.turned_away += 1
            if self.turned_away > TURNED_AWAY_LIMIT:
                self._meter.refused(refusal)
                connection.abort()
            return refusal
        connection.is_counted = True
        connection.slot = self._next_slot
        self._connections[self._next_slot][connection] = None
        self._next_slot = (self._next_slot + 1) % KEEPALIVE_SLOTS
        return None

    def refused(self, reason: Refusal) -> None:
        """A handshake did not lead to a session."""
        self._meter.refused(reason)

    def new_session(self, connection: Connection) -> Session:
        """The rules for a connection whose handshake is done."""
        self._meter.opened()
        return Session(
            limits=self._limits,
            authenticator=self.authenticator,
            house=self,
            failures=self._failures,
            address=connection.address,
            now=self.now(),
        )

    def received(self, connection: Connection, size_bytes: int) -> None:  # noqa: ARG002 - counted for all clients together
        """A message came in."""
        self._meter.received(size_bytes)

    def failed(self) -> None:
        """A bug met while serving a client; the connection logs it and closes."""
        self._meter.failed()

    def perform(self, connection: Connection, action: Action) -> None:
        """An action that concerns more than the socket."""
        match action:
            case Admit(grant=grant, may_read=may_read):
                self._admit(connection, authenticated=grant is not None, may_read=may_read)
            case Attach(filter=chosen, since=since):
                self._attach(connection, chosen, since)
            case Detach():
                self._detach(connection)
            case Refused(message=message, reason=reason):
                self.auth_failures += 1
                self._meter.authenticated(reason or message)
                log.info("authentication refused", address=connection.address, reason=str(reason or message))
            case Limited():
                self._meter.rejected(ClientErrorCode.RATE_LIMITED)
            case Rejected(code=code):
                self._meter.rejected(code)

    def _admit(self, connection: Connection, *, authenticated: bool, may_read: bool) -> None:
        self._caps.ready()
        if authenticated:
            self.authenticated += 1
            self._meter.authenticated(None)
        session = connection.session
        client_id = session.grant.client_id if session is not None and session.grant is not None else None
        log.info("client connected", address=connection.address, client_id=client_id)
        state, since = self._upstream
        if may_read:
            if state is not UpstreamState.CONNECTED:
                connection.write(wire.status_frame(state, since))
            self._filters[connection] = EVERYTHING
            self.hub.join(connection, EVERYTHING)

    def _attach(self, connection: Connection, chosen: Filter, since: wire.Since | None) -> None:
        self._detach(connection)
        self._filters[connection] = chosen
        state = self.upstream
        if isinstance(since, wire.At):
            self._deliver(connection, self._attach_at(connection, chosen, since, state))
        else:
            self._resume(connection, chosen, since, state)

    async def _attach_at(self, connection: Connection, chosen: Filter, since: wire.At, told: UpstreamState) -> None:
        before = await self._log.offset_before(since.time.timestamp())
        # Retention may have removed events after that time, unless an event before it is still held.
        is_complete = self._log.oldest <= 1 or before >= self._log.oldest
        position = Position(self.hub.epoch, before if is_complete else -1)
        await self._replay_from(connection, chosen, self._answer(connection, chosen, position), told)

    def _resume(
        self,
        connection: Connection,
        chosen: Filter,
        since: Position | wire.Last | None,
        told: UpstreamState,
    ) -> None:
        cursor = self._answer(connection, chosen, since)
        if cursor == self.hub.head and told is self.upstream:
            self.hub.join(connection, chosen)
        else:
            self._deliver(connection, self._replay_from(connection, chosen, cursor, told))

    def _answer(self, connection: Connection, chosen: Filter, since: Position | wire.Last | None) -> int:
        """Send `subscribed`; returns where delivery starts."""
        start = resume(since, epoch=self.hub.epoch, head=self.hub.head, oldest=self._log.oldest)
        oldest = None
        if start.recovered is False:
            oldest = Position(self.hub.epoch, self._log.oldest)
            self._meter.replayed(0, recovered=False)
        connection.write(
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
        """The connection goes on from the log once it has drained."""
        self._deliver(connection, self._replay_from(connection, self._filters[connection], cursor, self.upstream))

    def _deliver(self, connection: Connection, replay: Coroutine[object, object, None]) -> None:
        assert self._tasks is not None
        connection.delivery = self._tasks.create_task(replay, name="gateway replay")

    async def _replay_from(self, connection: Connection, chosen: Filter, cursor: int, told: UpstreamState) -> None:
        try:
            frames = await self._replay.run(connection, chosen, cursor)
        except TooSlowError:
            connection.close(Close.TOO_SLOW)
        except LostError:
            connection.delivery = None
            self._resume(connection, chosen, Position(self.hub.epoch, -1), told)
        else:
            connection.delivery = None
            self._meter.replayed(frames, recovered=True)
            if self.upstream is not told:
                # `tell_upstream` reaches live members only.
                connection.write(wire.status_frame(*self._upstream))

    def _detach(self, connection: Connection) -> None:
        self.hub.leave(connection)
        self._filters.pop(connection, None)
        if connection.delivery is not None:
            connection.delivery.cancel()
            connection.delivery = None

    def disconnected(self, connection: Connection) -> None:
        """The socket is gone."""
        self._detach(connection)
        if connection.is_counted:
            del self._connections[connection.slot][connection]
            self._caps.release(connection.address, was_ready=connection.is_ready)
        else:
            self.turned_away -= 1
        if not self._caps.total:
            self._emptied.set()
        session = connection.session
        if session is None:
            return
        self._meter.closed(connection.close_code)
        client_id = None
        if session.grant is not None:
            self.authenticated -= connection.is_ready
            client_id = session.grant.client_id
        log.info(
            "client left",
            address=connection.address,
            client_id=client_id,
            code=connection.close_code,
            seconds=round(self.now() - connection.connected_at, 1),
        )

    def _all(self) -> list[Connection]:
        return [connection for slot in self._connections for connection in slot]

    def _cancel_replays(self) -> None:
        for connection in list(self._filters):
            if connection.delivery is not None:
                connection.delivery.cancel()
