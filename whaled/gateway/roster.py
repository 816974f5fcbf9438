"""The connections that are open, and the counts of them."""

import asyncio
import itertools
import socket
import time
from collections.abc import Hashable

from whaled.config.sections import GatewaySettings
from whaled.gateway.admission import TIME_TO_BEGIN_S, Admission, Source, Verdict, has_failed, source
from whaled.gateway.clients import Clients
from whaled.gateway.connection import Connection
from whaled.gateway.limits import Refusal
from whaled.gateway.listener import has_left
from whaled.gateway.meters import GatewayMeter

# Connections are pinged in this many groups, one after the other, so that 10,000 pings are not sent at once.
KEEPALIVE_SLOTS = 32


class Roster:
    """The open connections, how many of each kind there are, and the limits of these numbers.

    `connections_possible` is the number of connections that the limit of descriptors allows.
    """

    def __init__(self, settings: GatewaySettings, connections_possible: int, meter: GatewayMeter) -> None:
        self._slots: tuple[dict[Connection, None], ...] = tuple({} for _ in range(KEEPALIVE_SLOTS))
        self._next_slot = 0
        self._numbers = itertools.count(1)
        self._displaced: set[Connection] = set()  # closing, and counted no more
        self._emptied = asyncio.Event()
        self.admission = Admission(
            total=min(settings.max_connections, connections_possible),
            per_address=settings.max_connections_per_address,
            unauthenticated=settings.max_unauthenticated,
            failed_connects=settings.max_failed_connects,
        )
        self.clients = Clients(
            max_connections=settings.max_connections_per_client,
            rate=settings.client_messages_per_second,
            burst=settings.client_message_burst,
        )
        self.authenticated = 0
        self.compressed = 0  # clients that accept compressed frames
        meter.connections.set_function(lambda: self.total)
        meter.unauthenticated.set_function(lambda: self.unauthenticated)
        meter.limit.set_function(lambda: self.limit)
        meter.compressed_clients.set_function(lambda: self.compressed)
        meter.unsent.set_function(lambda: self.unsent_bytes)

    def reconfigure(self, settings: GatewaySettings, connections_possible: int) -> None:
        """Apply new limits. The counts remain, and so do connections beyond a lower limit."""
        self.admission.total_limit = min(settings.max_connections, connections_possible)
        self.admission.per_address_limit = settings.max_connections_per_address
        self.admission.unauthenticated_limit = settings.max_unauthenticated
        self.admission.failures.limit = settings.max_failed_connects
        self.clients.reconfigure(
            max_connections=settings.max_connections_per_client,
            rate=settings.client_messages_per_second,
            burst=settings.client_message_burst,
        )

    # --- the life of a connection ---

    def next_slot(self) -> int:
        """Return the keepalive group of the next connection."""
        return self._next_slot

    def reason_to_reset(self, sock: socket.socket, origin: Source, behind_s: float, *, is_deep: bool) -> Refusal | None:
        """Return why an accepted socket is to be reset before anything is allocated for it; None if it is not.

        Its network counts as a flood, or the accept queue `is_deep` and the client has already left: its request would
        only be read to be thrown away, while new clients wait behind it.
        """
        if behind_s and self.admission.is_flood(origin, behind_s, is_deep=is_deep):
            return Refusal.CONNECT_RATE
        if is_deep and has_left(sock):
            self.admission.failures.failed(origin.network)
            return Refusal.LEFT
        return None

    def admit(self, connection: Connection, behind_s: float) -> Verdict:
        """Count a new connection, and cut off the one that it displaces.

        For `behind_s` seconds, connections have arrived faster than they can be accepted. If the verdict does not admit
        the connection, it is not counted; `forget` or `leave` must be called once for any other.
        """

        def may_displace(member: Hashable) -> bool:
            assert isinstance(member, Connection)
            return _may_displace(member, time.monotonic(), is_behind=behind_s > 0)

        verdict = self.admission.admit(connection, connection.source, may_displace, is_proxy=connection.is_proxy)
        if isinstance(verdict.displaced, Connection):
            verdict.displaced.displace()
            self._displaced.add(verdict.displaced)
            self.forget(verdict.displaced)
        return verdict

    def move(self, connection: Connection, address: str, behind_s: float, *, is_proxy: bool) -> Refusal | None:
        """Count the connection of a trusted proxy as the client's, now that it is named. Return the refusal, if any.

        A connection that is not admitted is cut off: there are too many of its network.
        """
        self.admission.leave(connection, connection.source, has_failed=False)
        connection.named(address, source(address), is_proxy=is_proxy)
        is_flood = behind_s > 0 and not is_proxy and self.admission.is_flood(connection.source, behind_s)
        verdict = Verdict(is_admitted=False) if is_flood else self.admit(connection, behind_s)
        if verdict.is_admitted:
            return verdict.refusal
        self._displaced.add(connection)
        connection.displace(Refusal.CONNECT_RATE)
        return Refusal.CONNECT_RATE

    def add(self, connection: Connection) -> None:
        """Keep a connection that was admitted, until `leave`."""
        connection.number = next(self._numbers)
        self._slots[connection.slot][connection] = None
        self._next_slot = (self._next_slot + 1) % KEEPALIVE_SLOTS

    def opened(self, connection: Connection) -> None:
        """Count a connection whose WebSocket is open."""
        self.compressed += connection.outbox.takes_deflate

    def known(self, connection: Connection, *, has_authenticated: bool) -> None:
        """Count a connection as a client's."""
        self.admission.known(connection)
        self.authenticated += has_authenticated

    def forget(self, connection: Connection) -> None:
        """Remove a connection from the counts that limits apply to, when it begins to close or has never begun."""
        self.admission.leave(
            connection,
            connection.source,
            has_failed=not connection.is_proxy and has_failed(connection.refusal, is_waiting=connection.is_waiting),
        )

    def leave(self, connection: Connection) -> None:
        """Remove a connection whose socket is closed."""
        del self._slots[connection.slot][connection]
        if connection in self._displaced:
            self._displaced.remove(connection)
        else:
            self.forget(connection)
        if not self.total:
            self._emptied.set()
        session = connection.session
        if session is None:
            return
        self.compressed -= connection.outbox.takes_deflate
        if session.client is not None:
            self.clients.leave(session.client)
        if session.grant is not None:
            self.authenticated -= connection.is_client

    # --- the connections ---

    def all(self) -> list[Connection]:
        """Return all open connections."""
        return [connection for slot in self._slots for connection in slot]

    def group(self, number: int) -> list[Connection]:
        """Return the connections of a keepalive group, 0 to KEEPALIVE_SLOTS - 1."""
        return list(self._slots[number])

    async def empty(self) -> None:
        """Wait until no connection is open."""
        while self.total:
            self._emptied.clear()
            await self._emptied.wait()

    @property
    def total(self) -> int:
        """The number of open connections, authenticated or not."""
        return self.admission.total

    @property
    def limit(self) -> int:
        """The maximum number of connections."""
        return self.admission.total_limit

    @property
    def unauthenticated(self) -> int:
        """The number of open connections that have not authenticated yet."""
        return self.admission.unauthenticated

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes queued for all clients that the kernel has not taken yet."""
        return sum(connection.unsent for connection in self.all())


def _may_displace(connection: Connection, now: float, *, is_behind: bool) -> bool:
    """Return whether an unauthenticated connection may be displaced by a new one of its own network.

    A connection whose bytes wait to be read is not displaced. While connections arrive faster than they can be
    accepted, neither is one that has not had time to begin: otherwise a flood would displace every handshake of its
    network before it is read, including those of clients there. `now` is monotonic.
    """
    had_time = not is_behind or now - connection.arrived_at > TIME_TO_BEGIN_S
    return had_time and not connection.is_waiting
