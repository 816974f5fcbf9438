"""The link to the mempool backend, across all reconnects."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from whaled.config.sections import UpstreamSettings
from whaled.model import UpstreamState
from whaled.source import Connected, Lost, StreamMessage
from whaled.sources.mempool_space.link import Link
from whaled.sources.mempool_space.link_errors import LinkLostError
from whaled.sources.mempool_space.link_state import FeedMeter, Surveyor
from whaled.urls import without_secrets

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


# Upper limit of a delay as a fraction of the outage so far: the link is re-established soon after a short outage, and a
# backend with a long outage receives few attempts.
DELAY_PART = 0.25


class Outage:
    """The time that the link has been down, minus the time for which it was up in between.

    A short outage soon after another one thus counts as short, and a backend that accepts each link and drops it at
    once receives ever fewer attempts.
    """

    def __init__(self, now: float) -> None:
        self._down_s = 0.0
        self._since = now

    def lost(self, now: float, connected_at: float | None) -> float:
        """Record the loss of a link made at `connected_at`, or (None) a failed attempt. Return the outage in s."""
        up_since = now if connected_at is None else connected_at
        self._down_s = max(0.0, self._down_s + (up_since - self._since) - (now - up_since))
        self._since = now
        return self._down_s


def delay_range_s(settings: UpstreamSettings, down_s: float) -> tuple[float, float]:
    """Return the shortest and the longest delay before the next attempt, in an outage of `down_s` seconds."""
    longest = min(settings.reconnect_max, max(settings.reconnect_initial, DELAY_PART * down_s))
    return longest / 2, longest


class Feed:
    """The link to the backend in `settings.url`, with its reconnects."""

    def __init__(
        self,
        settings: UpstreamSettings,
        meter: FeedMeter,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        surveyor: Surveyor | None = None,
    ) -> None:
        self._settings = settings
        self._surveyor = surveyor
        self._meter = meter
        self._clock = clock
        self._monotonic = monotonic

    async def messages(self) -> AsyncGenerator[StreamMessage, None]:
        """Yield everything the backend sends, across all reconnects, without end.

        Iterate within `contextlib.aclosing`, so that the connection closes with the iteration, in bounded time. Raises
        ConfigError if `url` or `proxy` can never work.
        """
        settings = self._settings
        link = Link(settings, self._meter, self._clock, self._monotonic, surveyor=self._surveyor)
        outage = Outage(self._monotonic())
        attempt = 0
        while True:
            attempt += 1
            connected_at: float | None = None
            try:
                async with aclosing(link.messages(attempt)) as messages:
                    async for message in messages:
                        if isinstance(message, Connected):
                            connected_at = self._monotonic()
                        yield message
                        del message  # see Link
            except LinkLostError as error:
                # Not the error itself: its traceback keeps the last frames of the old connection alive.
                reason, detail, wait_s = error.reason, error.detail, error.wait_s
            else:
                raise AssertionError("a link ends by an error only")
            now = self._monotonic()
            if connected_at is not None and now - connected_at >= settings.stable_after:
                attempt = 1
                outage = Outage(now)
            shortest_s, longest_s = delay_range_s(settings, outage.lost(now, connected_at))
            delay_s = wait_s + random.uniform(shortest_s, longest_s)  # noqa: S311 - jitter, not a secret
            self._meter.lost(reason)
            logger.warning(
                "upstream_link_lost",
                url=without_secrets(settings.url),
                reason=reason.value,
                detail=detail,
                attempt=attempt,
                next_attempt_s=round(delay_s, 3),
            )
            if (change := link.state.become(UpstreamState.DISCONNECTED, detail)) is not None:
                yield change
            yield Lost(reason, delay_s)
            await asyncio.sleep(delay_s)
