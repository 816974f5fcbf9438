"""Load shedding: which connections are closed first when memory is short.

Pure.
"""

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from whaled.gateway.phase import Phase

# The part of the clients that is closed each time memory is urgently needed.
SHED_PART = 0.05


class Sheddable(Protocol):
    """A connection as shedding sees it."""

    is_client: bool
    connected_at: float
    phase: Phase

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        ...

    @property
    def progress(self) -> tuple[bool, bool]:
        """The progress of an unauthenticated connection: (TLS handshake complete, HTTP handshake complete)."""
        ...


C = TypeVar("C", bound=Sheddable)


class Shed(NamedTuple, Generic[C]):
    """The connections to close: unauthenticated ones, clients with unsent bytes, and other clients, in this order."""

    strangers: Sequence[C]
    slow: Sequence[C]
    others: Sequence[C]


def to_shed(connections: Sequence[C], excess_bytes: int, *, is_urgent: bool) -> Shed[C]:
    """Return the connections to close, to free about `excess_bytes`.

    Unauthenticated connections go first, one stage at a time: those in the TLS handshake, then those in the HTTP
    handshake, then those that have not authenticated. Next are the clients with the most unsent bytes. If that is not
    enough and `is_urgent`, a part of the remaining clients is closed, newest first. No client loses an event: it
    reconnects and resumes at its position.
    """
    strangers = [connection for connection in connections if not connection.is_client]
    if strangers:
        # Only one stage at a time: the memory it frees shows at the next check.
        least = min(connection.progress for connection in strangers)
        strangers = [connection for connection in strangers if connection.progress == least]
        if not is_urgent:
            return Shed(strangers, (), ())
    gone = set(strangers)
    slow: list[C] = []
    for connection in sorted(connections, key=_unsent, reverse=True):
        if excess_bytes <= 0 or not connection.unsent:
            break
        if connection not in gone:
            excess_bytes -= connection.unsent
            slow.append(connection)
    if not is_urgent or excess_bytes <= 0:
        return Shed(strangers, slow, ())
    others = [each for each in connections if each.is_client and each.phase < Phase.CLOSING and not each.unsent]
    others.sort(key=_connected_at, reverse=True)
    return Shed(strangers, slow, others[: math.ceil(len(others) * SHED_PART)])


def _unsent(connection: Sheddable) -> int:
    return connection.unsent


def _connected_at(connection: Sheddable) -> float:
    return connection.connected_at
