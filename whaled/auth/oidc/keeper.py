"""Keeps the key set of one issuer current, in the background.

The last good set stays in use for as long as the issuer cannot be reached or answers nonsense.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from whaled.auth.oidc.fetch import FetchError
from whaled.auth.oidc.keyset import KeySet
from whaled.auth.oidc.meters import IssuerMeter
from whaled.config.sections import IssuerSettings
from whaled.sampling import Sampler

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The delay after a first failure; it doubles with each further one, up to the interval.
RETRY_FIRST_S = 5.0
# Every delay varies by this part, so that several daemons do not ask at the same moment.
JITTER_PART = 0.2
# An issuer that stays away is logged at most this often for each reason.
LOG_INTERVAL_S = 600.0
# Ids of keys in one log line.
MOST_KIDS = 8

Fetch = Callable[[IssuerSettings], Awaitable[KeySet]]


class Keeper:
    """The key set of one issuer. `keys` is None before the first fetch that succeeds."""

    def __init__(
        self,
        settings: IssuerSettings,
        meter: IssuerMeter,
        *,
        keys: KeySet | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.keys = keys
        # Set after the first attempt, whether it succeeded or not.
        self.was_asked = asyncio.Event()
        self._meter = meter
        self._monotonic = monotonic
        self._is_wanted = asyncio.Event()
        self._failures = 0
        self._lines = Sampler(LOG_INTERVAL_S, monotonic)

    def want(self) -> None:
        """Have the set fetched soon, at most once in `unknown_key_interval`: a token names a key that it lacks."""
        self._is_wanted.set()

    async def run(self, fetch: Fetch) -> None:
        """Fetch the set again and again, until cancelled."""
        while True:
            began = self._monotonic()
            await self._fetch(fetch)
            self.was_asked.set()
            # Tokens that came before this fetch asked for what it has brought.
            self._is_wanted.clear()
            due = self._monotonic() + self._delay_s()
            with suppress(TimeoutError):
                async with asyncio.timeout(due - self._monotonic()):
                    await self._is_wanted.wait()
                due = min(due, began + self.settings.unknown_key_interval)
            await asyncio.sleep(max(0.0, due - self._monotonic()))

    def _delay_s(self) -> float:
        interval_s = self.settings.refresh_interval
        # The exponent is bounded, because an issuer may be away for years.
        delay_s = min(interval_s, RETRY_FIRST_S * 2 ** min(self._failures - 1, 16)) if self._failures else interval_s
        return delay_s * random.uniform(1 - JITTER_PART, 1 + JITTER_PART)  # noqa: S311 - no secret: it spreads requests

    def _failed(self) -> None:
        self._failures += 1
        self._meter.failed(self.settings.name)

    async def _fetch(self, fetch: Fetch) -> None:
        try:
            found = await fetch(self.settings)
        except FetchError as error:
            self._failed()
            if (suppressed := self._lines.admit(error.reason)) is not None:
                logger.warning(
                    "issuer_keys_unavailable",
                    issuer=self.settings.name,
                    reason=error.reason.value,
                    problem=str(error),
                    keys=len(self.keys.keys) if self.keys is not None else 0,
                    suppressed=suppressed,
                )
            return
        except Exception:
            # A bug: the keys stay, and so does everybody who was admitted with them.
            self._failed()
            logger.exception("issuer_fetch_failed", issuer=self.settings.name)
            return
        self._meter.fetched(self.settings.name, len(found.keys), time.time())
        known = self.keys.kids if self.keys is not None else frozenset()
        if self.keys is None or self._failures or known != found.kids:
            logger.info(
                "issuer_keys_fetched",
                issuer=self.settings.name,
                keys=len(found.keys),
                left_out=found.left_out,
                new=sorted(found.kids - known)[:MOST_KIDS],
                gone=sorted(known - found.kids)[:MOST_KIDS],
                failures=self._failures,
            )
        self._failures = 0
        self.keys = found
