"""The actions that a session returns. The connection and the gateway perform them in this order.

Pure.
"""

from msgspec import Struct

from whaled.errors import ClientErrorCode, Close, TokenRefusal
from whaled.gateway import commands, messages
from whaled.gateway.limits import Limit
from whaled.model import Grant
from whaled.whales.filters import EVERYTHING, Filter


class Send(Struct, frozen=True):
    """Send this message."""

    message: bytes


class Admit(Struct, frozen=True):
    """Count the client as authenticated, and deliver the events that pass `filter` to it if it may read."""

    grant: Grant | None
    may_read: bool
    filter: Filter = EVERYTHING


class Attach(Struct, frozen=True):
    """Send `subscribed`, then deliver the events that pass `filter`, from `since` on (None: from now on)."""

    filter: Filter
    since: commands.Since | None


class Detach(Struct, frozen=True):
    """Stop delivery."""


class Refused(Struct, frozen=True):
    """Count a failed authentication.

    `reason` is None if there was no credential to verify. `client_id` is known if the credential was once valid.
    """

    message: messages.AuthMessage
    reason: TokenRefusal | None = None
    client_id: str = ""


class FamilyEnded(Struct, frozen=True):
    """End this client's sessions that use a token of this family, because one token was refreshed twice."""

    grant: Grant


class Limited(Struct, frozen=True):
    """Count a message over the rate limit."""

    limit: Limit


class Crowded(Struct, frozen=True):
    """Count the refusal of a client that already has its maximum number of connections."""


class Rejected(Struct, frozen=True):
    """Count a message that was answered with an error."""

    code: ClientErrorCode


class Stop(Struct, frozen=True):
    """Close the connection."""

    close: Close


# Actions that concern more than the connection itself.
Concern = Admit | Attach | Detach | Refused | FamilyEnded | Limited | Crowded | Rejected
Action = Send | Stop | Concern
