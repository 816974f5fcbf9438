"""The gateway as a connection sees it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from whaled.config.sections import GatewaySettings
from whaled.gateway.actions import Concern
from whaled.gateway.limits import Refusal
from whaled.gateway.origins import Origins
from whaled.gateway.proxies import Proxies
from whaled.gateway.records import Records
from whaled.gateway.session import Session

if TYPE_CHECKING:
    from whaled.gateway.connection import Connection


class ConnectionOwner(Protocol):
    """The gateway as a connection sees it."""

    settings: GatewaySettings
    origins: Origins
    records: Records
    proxies: Proxies
    is_draining: bool
    now: Callable[[], float]  # the wall clock, in Unix seconds

    def new_session(self, connection: "Connection") -> Session:
        """Create the session of a connection whose handshake is complete."""
        ...

    def client_named(self, connection: "Connection", address: str, *, is_last: bool) -> Refusal | None:
        """Admit or refuse the client of a trusted proxy. `is_last`: no other header will name one behind it."""
        ...

    def opened(self, connection: "Connection") -> None:
        """Handle a WebSocket that has just opened, after the first actions of its session."""
        ...

    def perform(self, connection: "Connection", action: Concern) -> None:
        """Perform an action that concerns more than the socket."""
        ...

    def fell_behind(self, connection: "Connection", cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        ...

    def disconnected(self, connection: "Connection") -> None:
        """Forget a connection whose socket is closed."""
        ...
