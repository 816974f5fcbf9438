"""What one client, one address and all together may take. Pure: `now` is monotonic seconds."""

import ipaddress
from collections import OrderedDict
from enum import StrEnum


class TokenBucket:
    """A rate with a burst. It may run into debt down to minus one burst, so that a client that goes on after it was
    told to slow down is recognised.
    """

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated = now

    def take(self, now: float, cost: float = 1.0) -> float:
        """Take `cost` tokens. Returns 0 if they were there, else the seconds until the debt is paid."""
        elapsed = max(0.0, now - self._updated)  # a clock that steps back must not take tokens away
        self._level = min(self._burst, self._level + elapsed * self._rate) - cost
        self._updated = now
        if self._level >= 0:
            return 0.0
        self._level = max(self._level, -self._burst)
        return -self._level / self._rate

    @property
    def is_exhausted(self) -> bool:
        """The debt is as large as the burst: the client does not listen."""
        return self._level <= -self._burst


def source_of(address: str) -> str:
    """What counts as one address: an IPv6 host has its /64 to itself, and could come from 2^64 addresses."""
    if ":" not in address:
        return address
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(found.packed[:8] + bytes(8)))


class Refusal(StrEnum):
    """Why a connection was turned away before the upgrade (a metric label)."""

    GLOBAL_CAP = "global_cap"
    ADDRESS_CAP = "address_cap"
    MEMORY = "memory"
    DRAINING = "draining"
    ORIGIN = "origin"
    TOKEN_IN_URL = "token_in_url"  # noqa: S105 - a label, not a secret
    BAD_HANDSHAKE = "bad_handshake"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
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
