"""The WebSocket server: listens, admits connections, and performs the actions of their sessions."""

import asyncio
import itertools
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import structlog

from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.errors import ClientErrorCode, Close
from whaled.gateway import messages
from whaled.gateway.actions import Admit, Attach, Concern, Crowded, Detach, FamilyEnded, Limited, Refused, Rejected
from whaled.gateway.admission import Source, source
from whaled.gateway.client_lines import ClientLines
from whaled.gateway.connection import Connection
from whaled.gateway.credential import Authenticator
from whaled.gateway.drain import Drain
from whaled.gateway.limits import FailureLimit, Refusal, SessionLimits
from whaled.gateway.listener import Listener, Reserve
from whaled.gateway.meters import GatewayMeter
from whaled.gateway.origins import Origins
from whaled.gateway.proxies import Proxies
from whaled.gateway.rechecks import Rechecks
from whaled.gateway.records import ClientRecords, Records
from whaled.gateway.rehearsal import Rehearsal
from whaled.gateway.roster import KEEPALIVE_SLOTS, Roster
from whaled.gateway.session import Session
from whaled.gateway.share import LoopShare
from whaled.gateway.shedding import to_shed
from whaled.gateway.stalls import watched
from whaled.gateway.subscriptions import EventLog, Subscriptions
from whaled.gateway.transport import ClientSocket
from whaled.listening import address_of, open_sockets
from whaled.model import Event, Position, UpstreamState
from whaled.pause import Pause

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Stands for no limit on descriptors: only the configured limit applies.
MANY = 1_000_000_000
# The shortest delay that clients closed to save memory are asked to wait before they reconnect, and the time after
# which one that does not answer the close is cut off.
SHED_AWAY_S = 10.0
SHED_CLOSE_S = 0.5
# A value of SO_LINGER: closing the socket discards unsent bytes and resets the connection.
RESET = struct.pack("ii", 1, 0)
# The interval at which absent clients with a full budget are forgotten.
ABSENT_LOOK_S = 1.0


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
        tls: ssl.SSLContext | None = None,
        connections_possible: int = MANY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Create a gateway that does not listen yet. With `tls`, clients connect by wss:// only.

        `connections_possible` is the number of connections that the limit of descriptors allows.
        """
        self.settings = settings
        self.authenticator = authenticator
        self.origins = Origins.of(settings.origins, needs_token=authenticator is not None)
        self.proxies = Proxies(settings)
        self.now = clock
        self.is_draining = False
        self.is_short_of_memory = False
        self.auth_failures = 0
        self._meter = meter
        self._tls = tls
        self._lines = ClientLines()
        self._records = ClientRecords(meter, self._lines)
        self.records: Records = self._records
        self.share = LoopShare(meter.worked)
        self.roster = Roster(settings, connections_possible, meter)
        self.rechecks = Rechecks(self.roster, self.share, clock)
        self.subscriptions = Subscriptions(event_log, settings, meter, self.share, clock())
        self.hub = self.subscriptions.hub
        self.rehearsal = Rehearsal(self.hub, self.share, settings, tls, clock)
        self._limits = SessionLimits.of(settings, auth)
        self._failures = FailureLimit(auth.failures_per_second, auth.failure_burst)
        self._drain = Drain(self.roster)
        self._reserve = Reserve()
        self._listener: Listener | None = None
        self._is_passed = False
        self._pause = Pause()

    def reconfigure(
        self,
        settings: GatewaySettings,
        auth: AuthSettings,
        authenticator: Authenticator | None,
        connections_possible: int = MANY,
    ) -> None:
        """Apply new limits and keys. Open sessions keep the limits they started with, and nothing counted is lost."""
        self.settings = self.rehearsal.settings = settings
        self.authenticator = authenticator
        self.origins = Origins.of(settings.origins, needs_token=authenticator is not None)
        self.proxies = Proxies(settings)
        self._limits = SessionLimits.of(settings, auth)
        self._failures.reconfigure(auth.failures_per_second, auth.failure_burst)
        self.roster.reconfigure(settings, connections_possible)
        self.subscriptions.reconfigure(settings)
        self.rechecks.request()
        self._pause.changed()

    def recheck(self) -> None:
        """Close the sessions whose credential is no longer in force, after a revocation."""
        self.rechecks.request()

    # --- running ---

    @asynccontextmanager
    async def serving(self, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[str]:
        """Listen and serve; yield the first listening address. On exit, abort the connections that are still open.

        `sockets` are already listening (systemd socket activation). Without them, sockets for `host` and `port` of the
        settings are opened. Raises ListenError.
        """
        async with (
            self._lines,
            watched(self.roster.clients.lost, self.now),
            self.subscriptions.serving(),
            asyncio.TaskGroup() as tasks,
        ):
            self._is_passed = bool(sockets)
            listener = self._listener = Listener(
                sockets or await self._open_sockets(),
                arrive=self.arrive,
                share=self.share,
                meter=self._meter,
                reserve=self._reserve,
            )
            self._reserve.take()
            listener.start(self.settings.backlog)
            self.rehearsal.listens_at(listener.sockets)
            running = [
                tasks.create_task(self._keep_alive(), name="gateway keepalive"),
                tasks.create_task(self._publish_positions(), name="gateway positions"),
                tasks.create_task(self.rechecks.run(), name="gateway credentials"),
                tasks.create_task(self._forget_absent(), name="gateway absent clients"),
            ]
            try:
                yield address_of(listener.sockets[0])
            finally:
                for task in running:
                    task.cancel()
                listener.close()
                self._reserve.release()
                for connection in self.roster.all():
                    connection.close(Close.GOING_AWAY)
                    connection.abort()

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
        behind_s = 0.0 if self._listener is None else self._listener.behind_s
        is_proxy = self.proxies.is_trusted(address)
        is_deep = self._listener is not None and self._listener.is_deep
        if not is_proxy and (reason := self.roster.reason_to_reset(sock, origin, behind_s, is_deep=is_deep)):
            self._reset(sock, origin, reason)
            return
        connection = Connection(self, address, origin, self.roster.next_slot(), is_proxy=is_proxy)
        refusal, _, is_admitted = self.roster.admit(connection, behind_s)
        if not is_admitted:
            self._reset(sock, origin)
            return
        preamble = self.proxies.preamble() if is_proxy else None
        try:
            client = ClientSocket(sock, connection, self.share, origin.network, self._tls, preamble)
        except OSError:  # the peer has already closed it
            sock.close()
            self.roster.forget(connection)
            return
        if self.is_short_of_memory:
            refusal = Refusal.MEMORY
        # A client accepted from a passed socket during the drain connected before whaled stopped accepting from it. It
        # is admitted and asked to reconnect, since a restart under socket activation refuses no client.
        if self.is_draining and not self._is_passed:
            refusal = Refusal.DRAINING
        self.roster.add(connection)
        connection.start(client, refusal)

    def _reset(self, sock: socket.socket, origin: Source, refusal: Refusal = Refusal.CONNECT_RATE) -> None:
        """Reset an accepted socket. After an orderly close the kernel would keep it for a minute."""
        self._records.turned_away(refusal, origin.network)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()

    async def _keep_alive(self) -> None:
        for group in itertools.count():
            await self._pause.interval(lambda: self.settings.ping_interval / KEEPALIVE_SLOTS)
            now = time.monotonic()
            for connection in self.roster.group(group % KEEPALIVE_SLOTS):
                connection.keepalive(now)

    async def _publish_positions(self) -> None:
        while True:
            await self._pause.interval(lambda: self.settings.position_interval)
            self.hub.publish_positions()

    async def _forget_absent(self) -> None:
        while True:
            await asyncio.sleep(ABSENT_LOOK_S)
            self.roster.clients.forget_absent(self.now())

    async def drain(self, window_s: float) -> None:
        """Ask every client to reconnect and close it, spread over part of the window; then cut off the rest."""
        self.is_draining = True
        if self._is_passed and self._listener is not None:
            # systemd keeps the passed sockets open: clients that connect from now on wait there for the next process.
            self._listener.stop()
        await self._drain.run(window_s)

    # --- memory ---

    def short_of_memory(self) -> None:
        """Refuse new clients, and replay without keeping pages, until `relieved` is called."""
        self.is_short_of_memory = True
        self.subscriptions.short_of_memory(is_short=True)

    def relieve(self, excess_bytes: int, *, is_urgent: bool) -> None:
        """Close connections to free about `excess_bytes`, in the order of `shedding.to_shed`."""
        shed = to_shed(self.roster.all(), excess_bytes, is_urgent=is_urgent)
        for connection in shed.strangers:
            connection.displace()
        for connection in (*shed.slow, *shed.others):
            self._records.shed(connection.address, connection.unsent)
        for connection in shed.slow:
            connection.abort()  # a close frame would be queued behind the unsent bytes
        for connection in shed.others:
            away_s = SHED_AWAY_S * (1.0 + random.random())  # noqa: S311 - jitter, not a secret
            connection.send_away(Close.OVERLOADED, away_s, SHED_CLOSE_S)

    def relieved(self) -> None:
        """Accept new clients again: memory is no longer short."""
        self.is_short_of_memory = False
        self.subscriptions.short_of_memory(is_short=False)

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
        self.rehearsal.publish(event)

    def publish_upstream_state(self, state: UpstreamState) -> None:
        """Send clients the state of the link to the backend, if it changed."""
        self.subscriptions.publish_upstream_state(state, self.now())

    @property
    def upstream(self) -> UpstreamState:
        """The state of the link to the backend, as last sent to clients."""
        return self.subscriptions.upstream

    @property
    def connections(self) -> int:
        """The number of open connections, authenticated or not."""
        return self.roster.total

    # --- calls of sessions (Surroundings) ---

    def position(self) -> Position:
        """Return the position of the newest published event."""
        return self.hub.position

    def counters(self) -> messages.Counters:
        """Return the data of the `stats` answer."""
        roster = self.roster
        return messages.Counters(roster.total, roster.authenticated, self.hub.alerts_published, self.auth_failures)

    # --- calls of connections (ConnectionOwner) ---

    def new_session(self, connection: Connection) -> Session:
        """Create the session of a connection whose handshake is complete."""
        self._records.opened()
        self.roster.opened(connection)
        return Session(
            limits=self._limits,
            authenticator=self.authenticator,
            house=self,
            failures=self._failures,
            clients=self.roster.clients,
            address=connection.address,
            now=self.now(),
        )

    def client_named(self, connection: Connection, address: str, *, is_last: bool) -> Refusal | None:
        """Admit or refuse the client of a trusted proxy. `is_last`: no other header will name one behind it."""
        behind_s = 0.0 if self._listener is None else self._listener.behind_s
        is_proxy = not is_last and self.proxies.is_trusted(address)
        return self.roster.move(connection, address, behind_s, is_proxy=is_proxy)

    def opened(self, connection: Connection) -> None:
        """Send away a client that connected during the drain."""
        if self.is_draining:
            self._drain.send_away(connection)

    def perform(self, connection: Connection, action: Concern) -> None:
        """Perform an action that concerns more than the connection."""
        records = self._records
        match action:
            case Admit(grant=grant, may_read=may_read, filter=chosen):
                self.roster.known(connection, has_authenticated=grant is not None)
                records.admitted(connection.address, grant)
                if may_read:
                    self.subscriptions.join(connection, chosen)
            case Attach(filter=chosen, since=since):
                self.subscriptions.attach(connection, chosen, since)
            case Detach():
                self.subscriptions.detach(connection)
            case Refused(message=message, reason=reason, client_id=client_id):
                self.auth_failures += 1
                records.credential_refused(connection.address, message, reason, client_id)
            case FamilyEnded(grant=grant):
                self.rechecks.request()
                records.family_ended(grant)
            case Limited(limit=limit):
                records.limited(limit)
            case Crowded():
                records.rejected(ClientErrorCode.TOO_MANY_CONNECTIONS)
                records.turned_away(Refusal.CLIENT_CAP, connection.source.network)
            case Rejected(code=code):
                records.rejected(code)

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        self.subscriptions.fell_behind(connection, cursor)

    def disconnected(self, connection: Connection) -> None:
        """Forget a connection whose socket is closed."""
        self.subscriptions.detach(connection)
        self.roster.leave(connection)
        session = connection.session
        if session is None:
            return
        if connection.close_code == 1006:
            session.link_lost(self.now())
        self._records.left(
            connection.address,
            session.grant.client_id if session.grant is not None else None,
            was_ready=connection.is_client,
            code=connection.close_code,
            seconds=self.now() - connection.connected_at,
        )
