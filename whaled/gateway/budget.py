"""The budget for the messages of one connection: its own token bucket, and the one that its client's connections share.

Pure.
"""

from whaled.gateway.clients import Client, Clients
from whaled.gateway.limits import Limit, SessionLimits, TokenBucket


class Budget:
    """The token buckets that a connection pays from. `client` is None before authentication and without it."""

    __slots__ = ("_bucket", "_limits", "client")

    def __init__(self, limits: SessionLimits, clients: Clients, now: float) -> None:
        self._limits = limits
        self._bucket = TokenBucket(limits.messages_per_second, limits.message_burst, now, clients.lost)
        self.client: Client | None = None

    def may_pass(self, now: float) -> bool:
        """Return whether a message would pass."""
        return self._bucket.may_pass(now) and (self.client is None or self.client.bucket.may_pass(now))

    def take(self, now: float, cost: float) -> Limit | None:
        """Take tokens for a message. Return the limit that it exceeds, None if it passes."""
        if self._bucket.take(now, cost) > 0:
            return Limit.CONNECTION
        if self.client is not None and self.client.bucket.take(now, cost) > 0:
            return Limit.CLIENT
        return None

    def take_control(self, now: float) -> bool:
        """Take a token of the connection for a control frame. Return whether it passes."""
        return self._bucket.take(now) <= 0

    def charge(self, cost: float) -> None:
        """Take tokens unconditionally."""
        self._bucket.charge(cost)
        if self.client is not None:
            self.client.bucket.charge(cost)

    def fine(self, now: float, cost: float) -> None:
        """Take tokens for an invalid message, and count it like a refused one."""
        self._bucket.fine(now, cost)
        if self.client is not None:
            self.client.bucket.charge(cost)

    def retry_after_s(self, limit: Limit) -> float:
        """Return the seconds until a message passes this limit."""
        if limit is Limit.CLIENT and self.client is not None:
            return self.client.bucket.retry_after_s
        return self._bucket.retry_after_s

    @property
    def is_exhausted(self) -> bool:
        """True if the connection ignores its limit."""
        return self._bucket.is_exhausted

    def factor(self, rate: float | None) -> float:
        """Return the multiple of the configured limits that a credential with its own rate has."""
        return 1.0 if rate is None else rate / self._limits.messages_per_second

    def scale(self, rate: float | None) -> None:
        """Use the rate of a credential, None for the configured one. The burst is never less than the configured."""
        factor, limits = self.factor(rate), self._limits
        self._bucket.reconfigure(limits.messages_per_second * factor, limits.message_burst * max(1.0, factor))
