"""The connections of canaries: accepted, agreed and written to like clients', but in no count, limit or group."""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from whaled.config.sections import Gateway as GatewaySettings
from whaled.gateway import wire
from whaled.gateway.admission import Source
from whaled.gateway.clients import Clients
from whaled.gateway.connection import Connection
from whaled.gateway.hub import Hub
from whaled.gateway.limits import FailureLimit, Refusal
from whaled.gateway.origins import Origins
from whaled.gateway.session import Action, Admit, Session, SessionLimits
from whaled.gateway.share import LoopShare
from whaled.gateway.transport import ClientSocket
from whaled.model import Position

SOURCE = Source("canary", "canary")
# Canaries say nothing but their request: any limits do.
LIMITS = SessionLimits(messages_per_second=1.0, message_burst=10.0, max_addresses=1, expiry_grace_s=1.0)


class Rehearsal:
    """Owns the connections of canaries. Whoever connects from a name in `expected` is one.

    Names are those of sockets that this process has bound: nobody else can connect from them meanwhile.
    """

    def __init__(self, hub: Hub, share: LoopShare, settings: GatewaySettings, clock: Callable[[], float]) -> None:
        self.expected: set[object] = set()
        self.tls: ssl.SSLContext | None = None
        self.place: tuple[socket.AddressFamily, Any] | None = None
        self.settings = settings
        self.origins = Origins.of(("*",), needs_token=False)
        self.retry_after_s = 1
        self.is_draining = False  # canaries fly until the end of a drain, which is watched too
        self._hub = hub
        self._share = share
        self._clock = clock

    def listens_at(self, sockets: Sequence[socket.socket]) -> None:
        """Clients connect to these sockets. Canaries take one of IPv4 if there is one: `::` can be listened on, and
        `::1` be missing.
        """
        sock = min(sockets, key=lambda sock: sock.family != socket.AF_INET)
        name = sock.getsockname()
        if sock.family in (socket.AF_INET, socket.AF_INET6) and ipaddress.ip_address(name[0]).is_unspecified:
            name = ("127.0.0.1" if sock.family == socket.AF_INET else "::1", *name[1:])
        self.place = sock.family, name

    def is_expected(self, sock: socket.socket) -> bool:
        """Whether an accepted socket is a canary's."""
        try:
            return bool(self.expected) and sock.getpeername() in self.expected
        except OSError:  # it is gone already
            return False

    def admit(self, sock: socket.socket) -> None:
        """Take an accepted socket, or one end of a pair. Raises OSError if it is gone already."""
        connection = Connection(self, "canary", SOURCE, 0)
        connection.start(ClientSocket(sock, connection, self._share, SOURCE.network, self.tls), None)

    # --- what a connection asks of its owner ---

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def new_session(self, connection: Connection) -> Session:
        """A session that is ready at once: what connects is this process."""
        return Session(
            limits=LIMITS,
            authenticator=None,
            house=self,
            failures=FailureLimit(1.0, 1.0),
            clients=Clients(max_connections=1, rate=1.0, burst=1.0),
            address=connection.address,
            now=self.now(),
        )

    def perform(self, connection: Connection, action: Action) -> None:
        """Deliver canaries to the connection; it asks for nothing."""
        if isinstance(action, Admit):
            self._hub.rehearse_to(connection)

    def disconnected(self, connection: Connection) -> None:
        """The socket is gone."""
        self._hub.rehearse_no_more(connection)

    def position(self) -> Position:
        """The newest event published."""
        return self._hub.position

    def counters(self) -> wire.Counters:
        """Nothing: canaries do not ask."""
        return wire.Counters(0, 0, 0, 0)

    def refused(self, connection: Connection, reason: Refusal) -> None:
        """Not counted: the canary notices."""

    def tls_failed(self, reason: str) -> None:
        """Not counted: the canary notices."""

    def origin_refused(self, connection: Connection, origin: str) -> None:
        """Never: canaries come from no page."""

    def received(self, kind: wire.MessageType, size_bytes: int) -> None:
        """Not counted."""

    def answered(self, size_bytes: int) -> None:
        """Not counted."""

    def ask_to_reconnect(self, connection: Connection) -> None:
        """Stay until the end of the drain, which is watched too."""

    def failed(self, connection: Connection) -> None:
        """Not counted: the canary notices."""

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        """Lost, as a canary that is not read: it is missed."""
