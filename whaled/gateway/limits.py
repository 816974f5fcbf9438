"""Rate limits of messages and failed authentications.

Pure: `now` is in seconds.
"""

import math
from collections import OrderedDict
from enum import StrEnum

from msgspec import Struct

from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.listening import source_of


class Limit(StrEnum):
    """The budget that a refused message exceeded (a metric label)."""

    CONNECTION = "connection"
    CLIENT = "client"


# The cost of a message in tokens: 1, plus 1 for each of these amounts of bytes, of values in filters, and of events
# that a replay reads, whether or not they match. Each amount takes the loop about as long as a small message.
BYTES_PER_TOKEN = 1024
TERMS_PER_TOKEN = 50
EVENTS_PER_TOKEN = 20_000
# The fixed cost of a replay: an answer, a task, and at least one page of events.
REPLAY_COST = 4.0


def terms(filters: object) -> int:
    """Return the number of values in a filter that has not been validated yet."""
    if not isinstance(filters, dict):
        return 0
    return len(filters) + sum(len(value) for value in filters.values() if isinstance(value, list | dict))


class SessionLimits(Struct, frozen=True, kw_only=True):
    """The configuration of sessions, shared by all of them."""

    messages_per_second: float
    message_burst: float
    max_addresses: int
    expiry_grace_s: float
    leeway_s: float = 0.0

    @classmethod
    def of(cls, gateway: GatewaySettings, auth: AuthSettings) -> "SessionLimits":
        """Take the session limits from the configuration."""
        return cls(
            messages_per_second=gateway.messages_per_second,
            message_burst=float(gateway.message_burst),
            max_addresses=gateway.max_addresses,
            expiry_grace_s=auth.expiry_grace,
            leeway_s=auth.leeway,
        )


# The maximum time of a stall that is credited, and for how long after the stall. By then all messages that arrived
# during the stall have been read.
FORGIVEN_S = 60.0


class LostTime:
    """Time in which this process was stalled and read nothing.

    Messages that arrived meanwhile are read all at once. They are charged as if they had been read on arrival.
    """

    __slots__ = ("ends_at", "total_s")

    def __init__(self) -> None:
        self.total_s = 0.0
        self.ends_at = -math.inf  # nothing is credited after this time

    def add(self, seconds: float, now: float) -> None:
        """Add a stall of this length that has just ended."""
        self.total_s += min(seconds, FORGIVEN_S)
        self.ends_at = now + FORGIVEN_S


class TokenBucket:
    """A rate limit with a burst, for messages of different cost.

    A message passes if at least one token is left, and then its whole cost is taken: an expensive message is paid for
    afterwards, by waiting. The debt is limited to one burst. The cost of refused messages is added up
    (`is_exhausted`), to recognise a client that continues after it was asked to slow down. Tokens for lost time are
    kept in addition to the burst until `LostTime.ends_at`.
    """

    __slots__ = ("_burst", "_extra", "_level", "_lost", "_lost_s", "_overrun", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float, lost: LostTime | None = None) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._overrun = 0.0
        self._updated = now
        self._lost = lost
        self._lost_s = 0.0 if lost is None else lost.total_s
        self._extra = 0.0

    def reconfigure(self, rate: float, burst: float) -> None:
        """Apply a new rate and burst. Tokens taken so far remain taken."""
        self._level += burst - self._burst
        self._rate = rate
        self._burst = burst

    def take(self, now: float, cost: float = 1.0) -> float:
        """Take `cost` tokens. Return 0 if the message passes, else the seconds until the debt is paid."""
        passes = self.may_pass(now)
        self.charge(cost)
        if passes:
            return 0.0
        self._overrun += cost
        return max(-self._level, 1e-6) / self._rate

    def may_pass(self, now: float) -> bool:
        """Return whether a message would pass."""
        self._refill(now)
        return self._level + self._extra >= 1.0 - 1e-9

    @property
    def retry_after_s(self) -> float:
        """The seconds from the last `take` until a message passes."""
        return max(0.0, 1.0 - self._level) / self._rate

    def charge(self, cost: float) -> None:
        """Take tokens unconditionally, for work that is done or cannot be refused."""
        extra = min(self._extra, cost)
        self._extra -= extra
        self._level = max(self._level - (cost - extra), -self._burst)

    def fine(self, now: float, cost: float) -> None:
        """Take tokens for an invalid message, and count it like a refused one."""
        self._refill(now)
        self.charge(cost)
        self._overrun += cost

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._updated)  # a clock that steps back must not take tokens away
        self._overrun = max(0.0, self._overrun - elapsed * self._rate)
        self._updated = now
        lost_s = 0.0 if self._lost is None else self._newly_lost_s(self._lost, now)
        self._level = min(self._burst, self._level + max(0.0, elapsed - lost_s) * self._rate)
        if lost_s:
            tokens = self._level + lost_s * self._rate
            self._level = min(self._burst, tokens)
            self._extra = min(self._extra + tokens - self._level, FORGIVEN_S * self._rate)

    def _newly_lost_s(self, lost: LostTime, now: float) -> float:
        """Return the time lost since the previous call, or 0 once it is no longer credited."""
        lost_s, self._lost_s = lost.total_s - self._lost_s, lost.total_s
        if now <= lost.ends_at:
            return lost_s
        self._extra = 0.0
        return 0.0

    def is_full(self, now: float) -> bool:
        """Return whether the bucket is full and no refused messages are counted."""
        self._refill(now)
        return self._level >= self._burst and not self._overrun

    def left(self, now: float) -> float:
        """Return the tokens that are left; negative while a debt is paid."""
        self._refill(now)
        return self._level + self._extra

    @property
    def is_exhausted(self) -> bool:
        """True if refused messages add up to a burst: the client ignores the limit."""
        return self._overrun >= self._burst


class Refusal(StrEnum):
    """The reason why a connection was refused (a metric label)."""

    GLOBAL_CAP = "global_cap"
    ADDRESS_CAP = "address_cap"
    MEMORY = "memory"
    DRAINING = "draining"
    ORIGIN = "origin"
    TOKEN_IN_URL = "token_in_url"  # noqa: S105 - a label, not a secret
    BAD_HANDSHAKE = "bad_handshake"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    CLIENT_CAP = "client_cap"  # sent after the upgrade, since the client is not known earlier
    DISPLACED = "displaced"
    CONNECT_RATE = "connect_rate"
    LEFT = "left"  # the client had left before its connection was accepted from a deep queue
    NO_UPGRADE = "no_upgrade"
    TLS = "tls"
    PROXY_PROTOCOL = "proxy_protocol"  # a trusted proxy sent a malformed header, or none that is required
    FORWARDED = "forwarded"  # a trusted proxy sent a header that cannot be read


# Refusals that are not the client's fault.
NO_FAULTS = {
    Refusal.GLOBAL_CAP, Refusal.ADDRESS_CAP, Refusal.CLIENT_CAP, Refusal.MEMORY, Refusal.DRAINING, Refusal.NO_UPGRADE,
    Refusal.PROXY_PROTOCOL, Refusal.FORWARDED,
}  # fmt: skip


# The most offenders remembered, at about 300 bytes each. Beyond it the one that failed longest ago is forgotten. This
# is safe: whether a credential is accepted depends only on the credential, never on what is remembered here.
TRACKED_OFFENDERS = 10_000
# The limit of all failures of one address, as a multiple of the limit of one claimant.
SOURCE_SHARE = 10.0


class FailureLimit:
    """The limit of failed authentications: a burst of `burst`, then `rate` per second, for each offender.

    An offender is the claimant named in a refused credential, at one address, so that the failures of one client behind
    a proxy do not count for the others there. All claimants of one address together have SOURCE_SHARE times the limit.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def reconfigure(self, rate: float, burst: float) -> None:
        """Apply a new limit. Failures counted so far remain."""
        if (rate, burst) == (self._rate, self._burst):
            return
        self._rate = rate
        self._burst = burst
        for offender, bucket in self._buckets.items():
            bucket.reconfigure(*self._limit_of(offender))

    def failed(self, address: str, claimant: str, now: float) -> float:
        """Count a refused credential. Return the seconds to wait before the next attempt, 0 within the limit."""
        source = source_of(address)
        return max(self._take(f"{source} {claimant}", now), self._take(source, now))

    def failed_as(self, client_id: str, now: float) -> tuple[float, bool]:
        """Count a refused credential of an authenticated client, over all its connections.

        Return the seconds to wait, 0 within the limit, and whether the client keeps ignoring that wait.
        """
        offender = f"client {client_id}"
        wait_s = self._take(offender, now)
        return wait_s, self._buckets[offender].is_exhausted

    def _take(self, offender: str, now: float) -> float:
        bucket = self._buckets.pop(offender, None)
        if bucket is None:
            rate, burst = self._limit_of(offender)
            bucket = TokenBucket(rate, burst, now)
        self._buckets[offender] = bucket
        if len(self._buckets) > TRACKED_OFFENDERS:
            self._buckets.popitem(last=False)
        return bucket.take(now)

    def _limit_of(self, offender: str) -> tuple[float, float]:
        times = 1.0 if " " in offender else SOURCE_SHARE
        return self._rate * times, self._burst * times

    @property
    def offenders(self) -> int:
        """The number of offenders remembered."""
        return len(self._buckets)
