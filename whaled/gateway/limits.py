"""What one client, one address and all together may take. Pure: `now` is monotonic seconds."""

import math
from collections import OrderedDict
from enum import StrEnum

from whaled.listening import source_of


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


# The most that is forgiven of the time in which whaled stood still, and for how long: by then everything that came
# meanwhile has been read.
FORGIVEN_S = 60.0


class LostTime:
    """Time in which nothing was read, because this process stood still. Messages that came in it are read all at once,
    and are charged as if they had been read when they came.
    """

    __slots__ = ("ends_at", "total_s")

    def __init__(self) -> None:
        self.total_s = 0.0
        self.ends_at = -math.inf  # from then on nothing is forgiven

    def add(self, seconds: float, now: float) -> None:
        """Nothing was read for so long, until now."""
        self.total_s += min(seconds, FORGIVEN_S)
        self.ends_at = now + FORGIVEN_S


class TokenBucket:
    """A rate with a burst, for work of different cost.

    A message passes while there is one token, and then its whole cost is taken: what turns out to be expensive is paid
    afterwards, by waiting. The debt ends at minus one burst. What is tried without a token is added up
    (`is_exhausted`), so that a client that goes on after it was asked to slow down is recognised. Tokens of lost time
    are kept beyond the burst for a while.
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
        """Take another rate and burst from now on; what was taken stays taken."""
        self._level += burst - self._burst
        self._rate = rate
        self._burst = burst

    def take(self, now: float, cost: float = 1.0) -> float:
        """Take `cost` tokens. Returns 0 if the message may pass, else the seconds until the debt is paid."""
        passes = self.may_pass(now)
        self.charge(cost)
        if passes:
            return 0.0
        self._overrun += cost
        return max(-self._level, 1e-6) / self._rate

    def may_pass(self, now: float) -> bool:
        """Whether a message would pass."""
        self._refill(now)
        return self._level + self._extra >= 1.0 - 1e-9

    @property
    def retry_after_s(self) -> float:
        """Seconds from the last `take` until a message passes."""
        return max(0.0, 1.0 - self._level) / self._rate

    def charge(self, cost: float) -> None:
        """Take tokens for work that is done already, or is certain."""
        extra = min(self._extra, cost)
        self._extra -= extra
        self._level = max(self._level - (cost - extra), -self._burst)

    def fine(self, now: float, cost: float) -> None:
        """Charge for work that should not have been asked for."""
        self._refill(now)
        self.charge(cost)
        self._overrun += cost

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._updated)  # a clock that steps back must not take tokens away
        self._overrun = max(0.0, self._overrun - elapsed * self._rate)
        self._updated = now
        lost_s = 0.0 if self._lost is None else self._lost_before(self._lost, now)
        self._level = min(self._burst, self._level + max(0.0, elapsed - lost_s) * self._rate)
        if lost_s:
            tokens = self._level + lost_s * self._rate
            self._level = min(self._burst, tokens)
            self._extra = min(self._extra + tokens - self._level, FORGIVEN_S * self._rate)

    def _lost_before(self, lost: LostTime, now: float) -> float:
        """The time that was lost since this was asked last, unless it is forgiven no more."""
        lost_s, self._lost_s = lost.total_s - self._lost_s, lost.total_s
        if now <= lost.ends_at:
            return lost_s
        self._extra = 0.0
        return 0.0

    def is_full(self, now: float) -> bool:
        """Whether nothing is owed."""
        self._refill(now)
        return self._level >= self._burst and not self._overrun

    @property
    def is_exhausted(self) -> bool:
        """As much as a burst was tried beyond the limit: the client does not listen."""
        return self._overrun >= self._burst


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
