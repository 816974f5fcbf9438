"""The pings and the end of a link that receives nothing, without a link."""

import pytest

from whaled.config.sections import UpstreamSettings
from whaled.sources.mempool_space.silence import Silence


def silence(**settings: float) -> Silence:
    return Silence(UpstreamSettings(url="ws://127.0.0.1:8999/api/v1/ws", **settings))  # type: ignore[arg-type]


def waits(observed: Silence, count: int) -> list[float]:
    """The times between `count` unanswered pings, and then until the link is stale."""
    found = []
    for _ in range(count):
        found.append(observed.remaining_s())
        assert not observed.elapsed()
        observed.pings += 1
    found.append(observed.remaining_s())
    assert observed.elapsed()
    return found


@pytest.mark.parametrize(
    ("ping_interval", "stale_after", "expected"),
    [
        (20.0, 60.0, [20.0, 20.0, 20.0]),
        (25.0, 60.0, [25.0, 25.0, 10.0]),
        (60.0, 60.0, [30.0, 30.0]),  # at least one ping has time to be answered
        (600.0, 60.0, [30.0, 30.0]),
    ],
)
def test_pings_are_sent_at_intervals_until_the_link_is_stale(
    ping_interval: float, stale_after: float, expected: list[float]
) -> None:
    observed = silence(ping_interval=ping_interval, stale_after=stale_after)
    assert waits(observed, len(expected) - 1) == expected


def test_a_message_begins_the_silence_anew() -> None:
    observed = silence(ping_interval=20.0, stale_after=60.0)
    assert not observed.elapsed()
    observed.pings += 1
    observed.add(5.0)
    observed.reset()
    assert (observed.pings, observed.remaining_s()) == (0, 20.0)


def test_a_wait_that_ends_early_counts_towards_the_next_ping() -> None:
    observed = silence(ping_interval=20.0, stale_after=60.0)
    observed.add(12.0)
    assert observed.remaining_s() == 8.0
