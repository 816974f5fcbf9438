"""The WebSocket server: listens, admits connections, performs the actions of sessions, pings clients, and drains."""

import asyncio
import itertools
import math
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import structlog

from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.errors import ClientErrorCode, Close, TokenRefusal
from whaled.gateway import wire
from whaled.gateway.admission import Admission, Source, source
from whaled.gateway.client_lines import ClientLines
from whaled.gateway.clients import Clients
from whaled.gateway.connection import Connection
from whaled.gateway.limits import FailureLimit, Limit, Refusal
from whaled.gateway.listener import Listener, ListenerMeter, Reserve
from whaled.gateway.origins import Origins
from whaled.gateway.rehearsal import Rehearsal
from whaled.gateway.session import (
    Action,
    Admit,
    Attach,
    Authenticator,
    Crowded,
    Detach,
    FamilyEnded,
    Limited,
    Refused,
    Rejected,
    Session,
    SessionLimits,
)
from whaled.gateway.share import Lane, LoopShare, ShareMeter
from whaled.gateway.stalls import watched
from whaled.gateway.subscriptions import DeliveryMeter, EventLog, Subscriptions
from whaled.gateway.transport import ClientSocket
from whaled.listening import address_of, open_sockets
from whaled.model import Event, Position, UpstreamState

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Stands for no limit on descriptors: only the configured limit applies.
MANY = 1_000_000_000
# Connections are pinged in this many groups, one after the other, so that 10,000 pings are not sent at once.
KEEPALIVE_SLOTS = 32
# A drain closes clients at this interval, so that they do not all reconnect at once. It spends at most this part of the
# window on that.
DRAIN_SPACING_S = 0.002
DRAIN_SPREAD_PART = 0.5
# The part of the clients that is closed each time memory is urgently needed, and the shortest delay that they are asked
# to wait before they reconnect.
SHED_PART = 0.05
SHED_AWAY_S = 10.0
# While memory is short, a client that does not answer the close within this time is cut off.
SHED_CLOSE_S = 0.5
# A value of SO_LINGER: closing the socket discards unsent bytes and resets the connection.
RESET = struct.pack("ii", 1, 0)
# The interval at which absent clients with a full budget are forgotten.
ABSENT_LOOK_S = 1.0
# The interval at which the wall clock is compared with the monotonic clock, and the difference that counts as a step. A
# slewed clock (at most 500 ppm) takes half an hour to reach it, and an unnecessary recheck does no harm.
CLOCK_LOOK_S = 1.0
CLOCK_STEP_S = 1.0
# The time that one job spends on rechecking sessions.
RECHECK_SLICE_S = 0.0005


class GatewayMeter(DeliveryMeter, ShareMeter, ListenerMeter, Protocol):
    """The counters of the gateway."""

    def refused(self, reason: Refusal) -> None:
        """Count a connection that did not become a session."""
        ...

    def tls_failed(self, reason: str) -> None:
        """Count a failed TLS handshake."""
        ...

    def opened(self) -> None:
        """Count an opened session."""
        ...

    def closed(self, code: int) -> None:
        """Count a session that ended with this close code."""
        ...

    def authenticated(self, failure: TokenRefusal | wire.AuthMessage | None) -> None:
        """Count an authentication. `failure` is None if it succeeded."""
        ...

    def received(self, kind: wire.MessageType, size_bytes: int) -> None:
        """Count a message from a client."""
        ...

    def rejected(self, code: ClientErrorCode) -> None:
        """Count a message that was answered with an error."""
        ...

    def limited(self, limit: Limit) -> None:
        """Count a message that was refused because a budget was used up."""
        ...

    def failed(self) -> None:
        """Count a bug met while serving a client."""
        ...

    def shed(self) -> None:
        """Count a session that was closed to save memory."""
        ...

    def family_ended(self) -> None:
        """Count a token family that ended because one of its tokens was refreshed twice."""
        ...


class Gateway:
    """All client connections of this process."""

    def __init__(
        self,
        settings: GatewaySettings,
        auth: AuthSettings,
        *,
        event_log: EventLog,
        authenticator: Authenticator | None,
        meter: GatewayMeter,
        connections_possible: int = MANY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Create a gateway that does not listen yet.

        `connections_possible` is the number of connections that the limit of descriptors allows.
        """
        self._meter = meter
        self.connections_possible = connections_possible
        self.now = clock
        self.share = LoopShare(meter)
        self.subscriptions = Subscriptions(event_log, settings, meter, self.share, clock())
        self.hub = self.subscriptions.hub
        self.rehearsal = Rehearsal(self.hub, self.share, settings, clock)
        self.auth_failures = 0
        self.authenticated = 0
        self.compressed = 0  # clients that accept compressed frames
        self.clock_steps = 0
        self.retry_after_s = 5
        self._spread_s = 0.0
        self.is_draining = False
        self.is_short_of_memory = False
        self._lines = ClientLines()
        self.reserve = Reserve()
        self._tls: ssl.SSLContext | None = None
        self._listener: Listener | None = None
        self._is_passed = False
        self._connections: tuple[dict[Connection, None], ...] = tuple({} for _ in range(KEEPALIVE_SLOTS))
        self._next_slot = 0
        self._emptied = asyncio.Event()
        self._recheck = asyncio.Event()
        self._failures = FailureLimit(auth.failures_per_second, auth.failure_burst)
        self._admission = Admission(
            total=settings.max_connections,
            per_address=settings.max_connections_per_address,
            unauthenticated=settings.max_unauthenticated,
            failed_connects=settings.max_failed_connects,
        )
        self.clients = Clients(
            max_connections=settings.max_connections_per_client,
            rate=settings.client_messages_per_second,
            burst=settings.client_message_burst,
        )
        self.reconfigure(settings, auth, authenticator)

    def reconfigure(self, settings: GatewaySettings, auth: AuthSettings, authenticator: Authenticator | None) -> None:
        """Apply new limits and keys. Open sessions keep the limits they started with."""
        self.settings = self.rehearsal.settings = settings
        self.authenticator = authenticator
        self.origins = Origins.of(settings.origins, needs_token=authenticator is not None)
        self._limits = SessionLimits.of(settings, auth)
        self._failures.reconfigure(auth.failures_per_second, auth.failure_burst)
        self._recheck.set()
        self._admission.total_limit = min(settings.max_connections, self.connections_possible)
        self._admission.per_address_limit = settings.max_connections_per_address
        self._admission.unauthenticated_limit = settings.max_unauthenticated
        self._admission.failures.limit = settings.max_failed_connects
        self.clients.reconfigure(
            max_connections=settings.max_connections_per_client,
            rate=settings.client_messages_per_second,
            burst=settings.client_message_burst,
        )
        self.subscriptions.reconfigure(settings)

    # --- running ---

    @asynccontextmanager
    async def serving(
        self, sockets: Sequence[socket.socket] = (), tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[str]:
        """Listen and serve; yield the first listening address. On exit, abort the connections that are still open.

        `sockets` are already listening (systemd socket activation). Without them, sockets for `host` and `port` of the
        settings are opened. Raises ListenError.
        """
        async with self._lines, watched(self.clients.lost, self.now), asyncio.TaskGroup() as tasks:
            self.subscriptions.run_in(tasks)
            settings = self.settings
            self._tls = self.rehearsal.tls = tls
            self._is_passed = bool(sockets)
            listener = self._listener = Listener(
                sockets or await self._open_sockets(),
                arrive=self.arrive,
                share=self.share,
                meter=self._meter,
                reserve=self.reserve,
            )
            self.reserve.take()
            listener.start(settings.backlog)
            self.rehearsal.listens_at(listener.sockets)
            keepalive = tasks.create_task(self._keep_alive(), name="gateway keepalive")
            positions = tasks.create_task(self._publish_positions(), name="gateway positions")
            credentials = tasks.create_task(self._watch_credentials(), name="gateway credentials")
            absent = tasks.create_task(self._forget_absent(), name="gateway absent clients")
            try:
                yield address_of(listener.sockets[0])
            finally:
                keepalive.cancel()
                positions.cancel()
                credentials.cancel()
                absent.cancel()
                listener.close()
                self.reserve.release()
                for connection in self._all():
                    connection.close(Close.GOING_AWAY)
                    connection.abort()
                self.subscriptions.cancel()

    async def _open_sockets(self) -> tuple[socket.socket, ...]:
        settings = self.settings
        opened = await open_sockets(settings.host, settings.port, settings.backlog, section="gateway")
        for missing in opened.missing:
            logger.warning("listen_address_missing", key="gateway.host", address=missing.host, reason=missing.reason)
        return opened.sockets

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that clients connect to."""
        return tuple(map(address_of, self._listener.sockets)) if self._listener is not None else ()

    def arrive(self, sock: socket.socket, address: str) -> None:
        """Take an accepted socket, and admit or refuse it before TLS is set up or anything is read from it."""
        if self.rehearsal.is_expected(sock):
            self.rehearsal.admit(sock)
            return
        origin = source(address)
        behind_s = self._behind_s()
        if behind_s and self._admission.is_flood(origin, behind_s):
            self._reset(sock, origin)
            return
        connection = Connection(self, address, origin, self._next_slot)
        refusal, displaced, is_admitted = self._admission.admit(connection, origin, self._may_displace)
        if not is_admitted:
            self._reset(sock, origin)
            return
        if isinstance(displaced, Connection):
            displaced.displace()
            self._leave(displaced)
        try:
            client = ClientSocket(sock, connection, self.share, origin.network, self._tls)
        except OSError:  # the peer has already closed it
            sock.close()
            self._leave(connection)
            return
        if self.is_short_of_memory:
            refusal = Refusal.MEMORY
        # A client accepted from a passed socket during the drain connected before whaled stopped accepting from it. It
        # is admitted and asked to reconnect, since a restart under socket activation refuses no client.
        if self.is_draining and not self._is_passed:
            refusal = Refusal.DRAINING
        self._connections[self._next_slot][connection] = None
        self._next_slot = (self._next_slot + 1) % KEEPALIVE_SLOTS
        connection.start(client, refusal)

    def _reset(self, sock: socket.socket, origin: Source) -> None:
        """Reset an accepted socket. After an orderly close the kernel would keep it for a minute."""
        self._count_refusal(Refusal.CONNECT_RATE, origin)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()

    def _behind_s(self) -> float:
        return 0.0 if self._listener is None else self._listener.behind_s

    async def _keep_alive(self) -> None:
        for slot in itertools.cycle(self._connections):
            await asyncio.sleep(self.settings.ping_interval / KEEPALIVE_SLOTS)
            now = time.monotonic()
            for connection in list(slot):
                connection.keepalive(now)

    async def _publish_positions(self) -> None:
        while True:
            await asyncio.sleep(self.settings.position_interval)
            self.hub.publish_positions()

    async def _forget_absent(self) -> None:
        while True:
            await asyncio.sleep(ABSENT_LOOK_S)
            self.clients.forget_absent(self.now())

    async def _watch_credentials(self) -> None:
        """Close sessions whose key was retired, whose family ended, or whose token expired by a step of the clock.

        Timers run on the monotonic clock, but tokens expire by the wall clock, so the two are compared every second.
        """
        offset = self.now() - time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOCK_LOOK_S):
                    await self._recheck.wait()
            moved_s = self.now() - time.monotonic() - offset
            if abs(moved_s) >= CLOCK_STEP_S:
                offset += moved_s
                self.clock_steps += 1
                logger.warning("system_clock_stepped", seconds=round(moved_s, 1))
            elif not self._recheck.is_set():
                continue
            self._recheck.clear()
            self._recheck_all()

    def _recheck_all(self) -> None:
        """Recheck every session, in slices. A check takes about 5 us, a close 50 us, and there may be 10,000."""
        waiting = self._all()

        def job() -> bool:
            until = time.perf_counter() + RECHECK_SLICE_S
            while waiting and time.perf_counter() < until:
                waiting.pop().recheck()
            return bool(waiting)

        self.share.add(Lane.KNOWN, job, "credentials")

    async def drain(self, window_s: float) -> None:
        """Ask every client to reconnect and close it, spread over part of the window; then cut off the rest."""
        self.is_draining = True
        if self._is_passed and self._listener is not None:
            # systemd keeps the passed sockets open: clients that connect from now on wait there for the next process.
            self._listener.stop()
        clients = self._all()
        self._spread_s = min(window_s * DRAIN_SPREAD_PART, len(clients) * DRAIN_SPACING_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + window_s
        started = loop.time()
        for number, connection in enumerate(clients):
            if connection.session is not None:
                self.ask_to_reconnect(connection)
            if number % 50 == 49:
                await asyncio.sleep(max(0.0, started + self._spread_s * (number + 1) / len(clients) - loop.time()))
        try:
            async with asyncio.timeout_at(deadline):
                while self._admission.total:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            stragglers = self._all()
            logger.warning("drain_window_exceeded", clients=len(stragglers))
            for connection in stragglers:
                connection.abort()

    def ask_to_reconnect(self, connection: Connection) -> None:
        """Ask a client to reconnect after a random delay, and close the connection."""
        connection.answer(wire.closing_frame(Close.RESTART, self._reconnect_delay_s()))
        connection.close(Close.RESTART)

    def _reconnect_delay_s(self) -> float:
        return 0.5 + random.random() * max(1.0, self._spread_s)  # noqa: S311 - jitter, not a secret

    def _may_displace(self, member: Hashable) -> bool:
        """Return whether an unauthenticated connection may be displaced by a new one of its own network.

        A connection whose bytes wait to be read is not displaced. While connections arrive faster than they can be
        accepted, neither is one that has not had time to begin: otherwise a flood would displace every handshake of
        its network before it is read, including those of clients there.
        """
        assert isinstance(member, Connection)
        return member.is_idle(time.monotonic()) if self._behind_s() else not member.is_waiting

    def _leave(self, connection: Connection) -> None:
        """Remove a connection from the counts of admission, as soon as it begins to close."""
        if connection.is_admitted:
            connection.is_admitted = False
            self._admission.leave(connection, connection.source, has_failed=connection.has_failed)

    # --- memory ---

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes queued for all clients that the kernel has not taken yet."""
        return sum(connection.unsent for connection in self._all())

    def short_of_memory(self) -> None:
        """Refuse new clients, and replay without keeping pages, until `relieved` is called."""
        self.is_short_of_memory = True
        self.subscriptions.short_of_memory(is_short=True)

    def relieve(self, excess_bytes: int, *, is_urgent: bool) -> None:
        """Close connections to free about `excess_bytes`.

        Unauthenticated connections go first, one stage at a time: those in the TLS handshake, then those in the HTTP
        handshake, then those that have not authenticated. Next are the clients with the most unsent bytes. If that is
        not enough and `is_urgent`, a part of the remaining clients is closed, newest first. No client loses an event:
        it reconnects and resumes at its position.
        """
        clients = self._all()
        unauthenticated = [connection for connection in clients if not connection.is_ready]
        if unauthenticated:
            # Only one stage at a time: the memory it frees shows at the next check.
            least = min(unauthenticated, key=_progress)
            for connection in unauthenticated:
                if _progress(connection) == _progress(least):
                    connection.displace()
            if not is_urgent:
                return
        for connection in sorted(clients, key=lambda connection: connection.unsent, reverse=True):
            if excess_bytes <= 0 or not connection.unsent:
                break
            excess_bytes -= connection.unsent
            self._shed(connection)
            connection.abort()  # a close frame would be queued behind the unsent bytes
        if not is_urgent or excess_bytes <= 0:
            return
        ready = sorted(
            (connection for connection in clients if connection.is_ready and connection.closing is None),
            key=lambda connection: connection.connected_at,
            reverse=True,
        )
        for connection in ready[: math.ceil(len(ready) * SHED_PART)]:
            self._shed(connection)
            connection.answer(wire.closing_frame(Close.OVERLOADED, SHED_AWAY_S * (1.0 + random.random())))  # noqa: S311 - jitter, not a secret
            connection.close(Close.OVERLOADED, SHED_CLOSE_S)

    def relieved(self) -> None:
        """Accept new clients again: memory is no longer short."""
        self.is_short_of_memory = False
        self.subscriptions.short_of_memory(is_short=False)

    def _shed(self, connection: Connection) -> None:
        self._meter.shed()
        self._lines.shed(connection.address, connection.unsent)

    # --- calls of the daemon ---

    @property
    def at_once(self) -> int:
        """The number of events to publish before the event loop runs other work."""
        return self.hub.at_once

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events to live clients."""
        self.hub.publish(events)

    def rehearse(self, event: Event) -> None:
        """Deliver the event of a canary to the canary's connections only."""
        self.hub.rehearse(event)

    def publish_upstream_state(self, state: UpstreamState) -> None:
        """Send clients the state of the link to the backend, if it changed."""
        self.subscriptions.publish_upstream_state(state, self.now())

    # --- calls of sessions (Surroundings) ---

    def position(self) -> Position:
        """Return the position of the newest published event."""
        return self.hub.position

    def counters(self) -> wire.Counters:
        """Return the data of the `stats` answer."""
        return wire.Counters(self._admission.total, self.authenticated, self.hub.alerts_published, self.auth_failures)

    @property
    def upstream(self) -> UpstreamState:
        """The state of the link to the backend, as last sent to clients."""
        return self.subscriptions.upstream

    @property
    def connections(self) -> int:
        """The number of open connections, authenticated or not."""
        return self._admission.total

    @property
    def connections_limit(self) -> int:
        """The maximum number of connections."""
        return self._admission.total_limit

    @property
    def unauthenticated(self) -> int:
        """The number of open connections that have not authenticated yet."""
        return self._admission.unauthenticated

    @property
    def replaying(self) -> int:
        """The number of connections that are in replay."""
        return self.subscriptions.replaying

    # --- calls of connections (ConnectionOwner) ---

    def refused(self, connection: Connection, reason: Refusal) -> None:
        """Count a handshake that did not lead to a session."""
        self._count_refusal(reason, connection.source)

    def _count_refusal(self, reason: Refusal, origin: Source) -> None:
        self._meter.refused(reason)
        if reason is not Refusal.NO_UPGRADE:  # health checks
            self._lines.turned_away(reason.value, origin.network)

    def tls_failed(self, reason: str) -> None:
        """Count a failed TLS handshake."""
        self._meter.tls_failed(reason)

    def origin_refused(self, connection: Connection, origin: str) -> None:
        """Log a connection attempt by a page whose origin is not allowed."""
        self._lines.origin_refused(connection.address, origin)

    def new_session(self, connection: Connection) -> Session:
        """Create the session of a connection whose handshake is complete."""
        self._meter.opened()
        self.compressed += connection.takes_deflate
        return Session(
            limits=self._limits,
            authenticator=self.authenticator,
            house=self,
            failures=self._failures,
            clients=self.clients,
            address=connection.address,
            now=self.now(),
        )

    def received(self, kind: wire.MessageType, size_bytes: int) -> None:
        """Count a received message."""
        self._meter.received(kind, size_bytes)

    def answered(self, size_bytes: int) -> None:
        """Count a frame that was sent to one client alone."""
        self._meter.sent(wire.Sent.CONTROL, 1, size_bytes)

    def failed(self, connection: Connection) -> None:
        """Log and count the exception being handled, a bug met while serving a client. The connection closes."""
        self._lines.failed(connection.address)
        self._meter.failed()

    def perform(self, connection: Connection, action: Action) -> None:
        """Perform an action that concerns more than the socket."""
        match action:
            case Admit(grant=grant, may_read=may_read):
                self._admit(connection, authenticated=grant is not None, may_read=may_read)
            case Attach(filter=chosen, since=since):
                self.subscriptions.attach(connection, chosen, since)
            case Detach():
                self.subscriptions.detach(connection)
            case Refused(message=message, reason=reason, client_id=client_id):
                self.auth_failures += 1
                is_limited = message is wire.AuthMessage.RATE_LIMITED
                self._meter.authenticated(message if is_limited or reason is None else reason)
                self._lines.refused(connection.address, str(reason or message), client_id or None)
            case FamilyEnded(grant=grant):
                self._recheck.set()
                self._meter.family_ended()
                logger.warning(
                    "token_family_ended",
                    client_id=grant.client_id,
                    family=grant.family,
                )
            case Limited(limit=limit):
                self._meter.rejected(ClientErrorCode.RATE_LIMITED)
                self._meter.limited(limit)
            case Crowded():
                self._meter.rejected(ClientErrorCode.TOO_MANY_CONNECTIONS)
                self._count_refusal(Refusal.CLIENT_CAP, connection.source)
            case Rejected(code=code):
                self._meter.rejected(code)

    def _admit(self, connection: Connection, *, authenticated: bool, may_read: bool) -> None:
        self._admission.known(connection)
        if authenticated:
            self.authenticated += 1
            self._meter.authenticated(None)
        session = connection.session
        client_id = session.grant.client_id if session is not None and session.grant is not None else None
        self._lines.connected(connection.address, client_id)
        if may_read:
            self.subscriptions.join(connection)

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        self.subscriptions.fell_behind(connection, cursor)

    def disconnected(self, connection: Connection) -> None:
        """Forget a connection whose socket is closed."""
        self.subscriptions.detach(connection)
        del self._connections[connection.slot][connection]
        self._leave(connection)
        if not self._admission.total:
            self._emptied.set()
        session = connection.session
        if session is None:
            return
        self._meter.closed(connection.close_code)
        self.compressed -= connection.takes_deflate
        if session.client is not None:
            self.clients.leave(session.client)
        if connection.close_code == 1006:
            session.link_lost(self.now())
        client_id = None
        if session.grant is not None:
            self.authenticated -= connection.is_ready
            client_id = session.grant.client_id
        self._lines.left(
            connection.address,
            client_id,
            was_ready=connection.is_ready,
            code=connection.close_code,
            seconds=round(self.now() - connection.connected_at, 1),
        )

    def _all(self) -> list[Connection]:
        return [connection for slot in self._connections for connection in slot]


def _progress(connection: Connection) -> tuple[bool, bool]:
    """Return how far an unauthenticated connection has come: (TLS handshake complete, HTTP handshake complete)."""
    return connection.is_agreed, connection.session is not None
