"""The link to the mempool backend, across all reconnects."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exception, wait_random

from whaled.config.sections import UpstreamSettings
from whaled.model import UpstreamState
from whaled.source import Connected, Lost, StreamMessage
from whaled.sources.mempool_space.address import shown
from whaled.sources.mempool_space.link import Link
from whaled.sources.mempool_space.link_errors import LinkLostError
from whaled.sources.mempool_space.link_state import FeedMeter, Surveyor

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
        # The delay is drawn before tenacity asks for it, because Lost reports it to the consumer before the wait.
        retrying = AsyncRetrying(retry=retry_if_exception_type(LinkLostError), wait=wait_exception(_next_delay_s))
        async for attempt in retrying:
            tries = attempt.retry_state
            connected_at: float | None = None
            try:
                async with aclosing(link.messages(tries.attempt_number)) as messages:
                    async for message in messages:
                        if isinstance(message, Connected):
                            connected_at = self._monotonic()
                        yield message
            except LinkLostError as error:
                lost = error
            else:
                raise AssertionError("a link ends by an error only")
            now = self._monotonic()
            if connected_at is not None and now - connected_at >= settings.stable_after:
                tries.attempt_number = 1
                outage = Outage(now)
            lost.next_delay_s = lost.wait_s + wait_random(*delay_range_s(settings, outage.lost(now, connected_at)))(
                tries
            )
            self._report(lost, tries)
            if (change := link.state.become(UpstreamState.DISCONNECTED, lost.detail)) is not None:
                yield change
            yield Lost(lost.reason, lost.next_delay_s)
            tries.set_exception((type(lost), lost, lost.__traceback__))
            del lost  # its traceback keeps the last frames of the old connection alive

    def _report(self, lost: LinkLostError, tries: RetryCallState) -> None:
        self._meter.lost(lost.reason)
        logger.warning(
            "upstream_link_lost",
            url=shown(self._settings.url),
            reason=lost.reason.value,
            detail=lost.detail,
            attempt=tries.attempt_number,
            next_attempt_s=round(lost.next_delay_s, 3),
        )


def _next_delay_s(error: BaseException) -> float:
    assert isinstance(error, LinkLostError)
    return error.next_delay_s
