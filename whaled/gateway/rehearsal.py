"""The connections of canaries, which whaled opens to itself to test delivery.

They are accepted, use TLS, and are written to like those of clients, but they are in no count, limit or group.
"""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from whaled.config.sections import GatewaySettings
from whaled.gateway import messages
from whaled.gateway.actions import Admit, Concern
from whaled.gateway.admission import Source
from whaled.gateway.clients import Clients
from whaled.gateway.connection import Connection
from whaled.gateway.hub import Group, Hub
from whaled.gateway.limits import FailureLimit, Refusal, SessionLimits
from whaled.gateway.origins import Origins
from whaled.gateway.proxies import Proxies
from whaled.gateway.records import Records
from whaled.gateway.session import Session
from whaled.gateway.share import LoopShare
from whaled.gateway.transport import ClientSocket
from whaled.model import Event, Position
from whaled.whales.filters import EVERYTHING

SOURCE = Source("canary", "canary")
# Canaries send nothing but the handshake request, so these limits never apply.
LIMITS = SessionLimits(messages_per_second=1.0, message_burst=10.0, max_addresses=1, expiry_grace_s=1.0)


class Rehearsal:
    """The owner of the connections of canaries, recognised by a peer name in `expected`.

    These are names of sockets that this process has bound, so no other process can connect from them in the meantime.
    """

    def __init__(
        self,
        hub: Hub,
        share: LoopShare,
        settings: GatewaySettings,
        tls: ssl.SSLContext | None,
        clock: Callable[[], float],
    ) -> None:
        self.expected: set[object] = set()
        self.place: tuple[socket.AddressFamily, Any] | None = None  # None until something listens
        self.group = Group(EVERYTHING, hub.head)
        self.tls = tls
        self.settings = settings
        self.origins = Origins.of(("*",), needs_token=False)
        self.records = Records()
        self.proxies = Proxies(GatewaySettings())
        self.is_draining = False  # canaries continue until the end of a drain, to watch it too
        self.now = clock
        self._hub = hub
        self._share = share

    def listens_at(self, sockets: Sequence[socket.socket]) -> None:
        """Choose where canaries connect among the listening sockets, preferring IPv4.

        A process can listen on `::` on a host without `::1`.
        """
        sock = min(sockets, key=lambda sock: sock.family != socket.AF_INET)
        name = sock.getsockname()
        if sock.family in (socket.AF_INET, socket.AF_INET6) and ipaddress.ip_address(name[0]).is_unspecified:
            name = ("127.0.0.1" if sock.family == socket.AF_INET else "::1", *name[1:])
        self.place = sock.family, name

    def is_expected(self, sock: socket.socket) -> bool:
        """Return whether an accepted socket is a canary's."""
        try:
            return bool(self.expected) and sock.getpeername() in self.expected
        except OSError:  # the peer has already closed it
            return False

    def admit(self, sock: socket.socket) -> None:
        """Take an accepted socket, or one end of a pair. Raises OSError if the peer has already closed it."""
        connection = Connection(self, "canary", SOURCE, 0)
        connection.start(ClientSocket(sock, connection, self._share, SOURCE.network, self.tls), None)

    def publish(self, event: Event) -> None:
        """Deliver the event of a canary to the connections of canaries."""
        self._hub.rehearse(event, self.group)

    # --- calls of connections and sessions (ConnectionOwner, Surroundings) ---

    def new_session(self, connection: Connection) -> Session:
        """Create a session without authentication, since the client is this process."""
        return Session(
            limits=LIMITS,
            authenticator=None,
            house=self,
            failures=FailureLimit(1.0, 1.0),
            clients=Clients(max_connections=1, rate=1.0, burst=1.0),
            address=connection.address,
            now=self.now(),
        )

    def client_named(self, connection: Connection, address: str, *, is_last: bool) -> Refusal | None:
        """Do nothing: no canary comes through a proxy."""

    def opened(self, connection: Connection) -> None:
        """Do nothing: canaries continue until the end of a drain."""

    def perform(self, connection: Connection, action: Concern) -> None:
        """Deliver canaries to an admitted connection. Canaries cause no other actions."""
        if isinstance(action, Admit):
            self.group.add(connection.outbox)

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Do nothing. The canary is not replayed, so it is reported as missed."""

    def disconnected(self, connection: Connection) -> None:
        """Stop delivering canaries to a connection whose socket is closed."""
        self.group.discard(connection.outbox)

    def position(self) -> Position:
        """Return the position of the newest published event."""
        return self._hub.position

    def counters(self) -> messages.Counters:
        """Return zeros. Canaries do not send `stats`."""
        return messages.Counters(0, 0, 0, 0)
