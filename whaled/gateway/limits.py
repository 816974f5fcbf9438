"""What one client, one address and all together may take. Pure: `now` is monotonic seconds."""

import ipaddress
from collections import OrderedDict
from enum import StrEnum


class Limit(StrEnum):
    """Whose budget a message was over (a metric label)."""

    CONNECTION = "connection"
    CLIENT = "client"


# What a message costs, in tokens: 1, and 1 more for so many bytes, values in filters, and events that a replay reads,
# whether the client gets them or not. They are what takes the loop about as long as a small message.
BYTES_PER_TOKEN = 1024
TERMS_PER_TOKEN = 50
EVENTS_PER_TOKEN = 20_000
# A replay is an answer, a task and a page of events at least.
REPLAY_COST = 4.0


class TokenBucket:
    """A rate with a burst, for work of different cost.

    A message passes while there is one token, and then its whole cost is taken: what turns out to be expensive is paid
    afterwards, by waiting. The debt ends at minus one burst. What is tried without a token is added up
    (`is_exhausted`), so that a client that goes on after it was asked to slow down is recognised.
    """

    __slots__ = ("_burst", "_level", "_overrun", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._overrun = 0.0
        self._updated = now

    def reconfigure(self, rate: float, burst: float) -> None:
        """Take another rate and burst from now on; what was taken stays taken."""
        self._level += burst - self._burst
        self._rate = rate
        self._burst = burst

    def take(self, now: float, cost: float = 1.0) -> float:
        """Take `cost` tokens. Returns 0 if the message may pass, else the seconds until the debt is paid."""
        self._refill(now)
        passes = self._level >= 1.0 - 1e-9
        self.charge(cost)
        if passes:
            return 0.0
        self._overrun += cost
        return max(-self._level, 1e-6) / self._rate

    @property
    def retry_after_s(self) -> float:
        """Seconds from the last `take` until a message passes."""
        return max(0.0, 1.0 - self._level) / self._rate

    def charge(self, cost: float) -> None:
        """Take tokens for work that is done already, or is certain."""
        self._level = max(self._level - cost, -self._burst)

    def fine(self, now: float, cost: float) -> None:
        """Charge for work that should not have been asked for."""
        self._refill(now)
        self.charge(cost)
        self._overrun += cost

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._updated)  # a clock that steps back must not take tokens away
        self._level = min(self._burst, self._level + elapsed * self._rate)
        self._overrun = max(0.0, self._overrun - elapsed * self._rate)
        self._updated = now

    @property
    def is_full(self) -> bool:
        """Nothing is owed as of the last `take`."""
        return self._level >= self._burst

    @property
    def is_exhausted(self) -> bool:
        """As much as a burst was tried beyond the limit: the client does not listen."""
        return self._overrun >= self._burst


def source_of(address: str) -> str:
    """What counts as one address: an IPv6 host has its /64 to itself, and could come from 2^64 addresses."""
    if ":" not in address:
        return address
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(found.packed[:8] + bytes(8)))


class Refusal(StrEnum):
    """Why a connection was turned away (a metric label)."""

    GLOBAL_CAP = "global_cap"
    ADDRESS_CAP = "address_cap"
    MEMORY = "memory"
    DRAINING = "draining"
    ORIGIN = "origin"
    TOKEN_IN_URL = "token_in_url"  # noqa: S105 - a label, not a secret
    BAD_HANDSHAKE = "bad_handshake"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    CLIENT_CAP = "client_cap"  # after the upgrade: only then the client is known
    DISPLACED = "displaced"
    NO_UPGRADE = "no_upgrade"
    TLS = "tls"


# Addresses remembered for failed authentications. Beyond it the longest idle is forgotten: an attacker with more
# addresses than this is not stopped by a rate per address anyway.
TRACKED_ADDRESSES = 10_000


class FailureLimit:
    """Failed authentications per address: `burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._blocked_until: dict[str, float] = {}

    def failed(self, address: str, now: float) -> None:
        """Count a failure."""
        source = source_of(address)
        bucket = self._buckets.pop(source, None) or TokenBucket(self._rate, self._burst, now)
        self._buckets[source] = bucket
        wait_s = bucket.take(now)
        if wait_s > 0:
            self._blocked_until[source] = now + wait_s
        while len(self._buckets) > TRACKED_ADDRESSES:
            forgotten, _ = self._buckets.popitem(last=False)
            self._blocked_until.pop(forgotten, None)

    def wait_s(self, address: str, now: float) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        source = source_of(address)
        wait_s = self._blocked_until.get(source, now) - now
        if 0 < wait_s <= self._burst / self._rate + 1e-3:
            return wait_s
        # The wait is over, or longer than any can be: the clock was set back.
        self._blocked_until.pop(source, None)
        return 0.0
