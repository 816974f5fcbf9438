"""Sessions without a socket."""

from whaled.gateway import messages
from whaled.gateway.clients import Clients
from whaled.gateway.credential import Authenticator
from whaled.gateway.limits import FailureLimit, SessionLimits
from whaled.gateway.session import Session
from whaled.model import Position

LIMITS = SessionLimits(
    messages_per_second=10.0, message_burst=20.0, max_addresses=10, expiry_grace_s=25.0, leeway_s=10.0
)


class House:
    def position(self) -> Position:
        return Position("e", 7)

    def counters(self) -> messages.Counters:
        return messages.Counters(3, 2, 1, 0)


def new(
    authenticator: Authenticator | None,
    failures: FailureLimit | None = None,
    clients: Clients | None = None,
    limits: SessionLimits = LIMITS,
) -> Session:
    return Session(
        limits=limits,
        authenticator=authenticator,
        house=House(),
        failures=failures or FailureLimit(0.1, 3),
        clients=clients or Clients(max_connections=3, rate=100.0, burst=400.0),
        address="127.0.0.1",
        now=0.0,
    )
