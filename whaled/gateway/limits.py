"""What one client, one address and all together may take. Pure: `now` is monotonic seconds."""

from collections import OrderedDict
from enum import StrEnum

from whaled.listening import source_of


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

    def reconfigure(self, rate: float, burst: float) -> None:
        """Take another rate and burst from now on; what was taken stays taken."""
        self._level += burst - self._burst
        self._rate = rate
        self._burst = burst

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
    CONNECT_RATE = "connect_rate"
    NO_UPGRADE = "no_upgrade"
    TLS = "tls"


# Offenders remembered, some 300 bytes each. Beyond it the one that failed longest ago is forgotten. That lets nobody
# in: a credential that verifies is accepted and one that does not is refused, whatever is remembered here.
TRACKED_OFFENDERS = 10_000
# What all failures of one address together may be, in failures of one claimant.
SOURCE_SHARE = 10.0


class FailureLimit:
    """Failed authentications: `burst` at once, then `rate` a second, for each offender.

    An offender is who a refused credential claims to be, at one address: the failures of one client behind a proxy are
    not those of its neighbours. All claimants of one address together have ten times as much.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def reconfigure(self, rate: float, burst: float) -> None:
        """Take another limit from now on. What was counted stays."""
        if (rate, burst) == (self._rate, self._burst):
            return
        self._rate = rate
        self._burst = burst
        for offender, bucket in self._buckets.items():
            bucket.reconfigure(*self._limit_of(offender))

    def failed(self, address: str, claimant: str, now: float) -> float:
        """Count a refused credential. Returns seconds to stay away, 0 while the limit holds."""
        source = source_of(address)
        return max(self._take(f"{source} {claimant}", now), self._take(source, now))

    def failed_as(self, client_id: str, now: float) -> tuple[float, bool]:
        """Count a refused credential of a client that is authenticated, over all its connections.

        Returns seconds to wait, and whether the client goes on although it was asked to wait.
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
        """How many are remembered."""
        return len(self._buckets)
