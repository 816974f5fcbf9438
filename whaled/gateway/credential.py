"""The verifier of credentials, and the credential that a connection was admitted with.

Pure.
"""

from typing import Protocol

from whaled.model import CredentialKind, Grant

# How long before its end a client is warned, at most, and as a part of the token's life.
WARN_BEFORE_EXPIRY_S = 300.0
WARN_BEFORE_EXPIRY_PART = 0.1
# A connection that breaks within this time after a refresh may have lost the new token. TCP would take much longer to
# report a dead connection, but pings (gateway.ping_interval, ping_timeout) end it within about this time.
ANSWER_LOST_S = 60.0


class Authenticator(Protocol):
    """The verifier of credentials."""

    def verify(self, credential: str, now: float) -> Grant:
        """Return the client and its permissions. Raises TokenError."""
        ...

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """Return a new token, and its grant, for the same client with the same permissions. Raises TokenError."""
        ...

    def is_in_force(self, grant: Grant, now: float) -> bool:
        """Return whether an earlier grant is still accepted, apart from its expiry."""
        ...

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        """Record that the refreshed token `child` may not have reached its client."""
        ...


class Credential:
    """A grant in use. Times are Unix seconds.

    A token that had expired on arrival was accepted within the leeway for clock differences. Such a connection closes
    when the leeway ends, and its token cannot be refreshed: the grace period does not apply in addition. An API key has
    neither a leeway nor a grace period, because the clock that judges it also set its end.
    """

    __slots__ = ("grant", "is_key", "is_late", "replaced", "used_at", "was_warned")

    def __init__(self, grant: Grant, now: float, *, replaced: Grant | None = None) -> None:
        """Use a grant from now on. `replaced` is the one that was refreshed to get it, if any."""
        self.grant = grant
        self.used_at = now
        self.replaced = replaced
        self.was_warned = False
        self.is_key = grant.kind is CredentialKind.API_KEY
        self.is_late = grant.expires_at is not None and now >= grant.expires_at

    def next_deadline(self, *, leeway_s: float, expiry_grace_s: float) -> float | None:
        """Return when the client is to be warned, or after that, when its connection ends; None if never."""
        grant = self.grant
        if grant.expires_at is None:
            return None
        if not self.was_warned:
            life_s = grant.expires_at - grant.issued_at if grant.issued_at is not None else WARN_BEFORE_EXPIRY_S
            return grant.expires_at - min(WARN_BEFORE_EXPIRY_S, max(0.0, life_s) * WARN_BEFORE_EXPIRY_PART)
        if self.is_key:
            return grant.expires_at
        return grant.expires_at + (leeway_s if self.is_late else expiry_grace_s)

    def lost_parent(self, now: float) -> Grant | None:
        """Return the replaced grant if the answer with this one may not have reached the client, else None."""
        return self.replaced if abs(now - self.used_at) < ANSWER_LOST_S else None
