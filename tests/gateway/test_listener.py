"""For how long more connections have arrived than can be accepted."""

import pytest

from whaled.gateway.listener import BEHIND_AGAIN_S, BEHIND_S, FLOOD_RATE, FORGOTTEN_S, REMEMBERED_S, Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def flood(backlog: Backlog, clock: Clock, seconds: float, rate: float = 2 * FLOOD_RATE) -> None:
    backlog.filled()
    for _ in range(int(seconds * rate)):
        backlog.accepted()
    clock.now += seconds


def test_a_queue_that_is_empty_or_was_lately_is_not_behind(clock: Clock) -> None:
    backlog = Backlog(clock)
    assert backlog.behind_s == 0
    flood(backlog, clock, BEHIND_S)
    assert backlog.behind_s == 0


def test_few_connections_that_wait_for_long_are_no_flood(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 5.0, rate=FLOOD_RATE)
    assert backlog.behind_s == 0


def test_a_flood_that_comes_again_soon_is_met_as_the_last_one_was_left(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 1.0)
    assert backlog.behind_s == pytest.approx(1.0)
    for _ in range(3):
        backlog.emptied()
        assert backlog.behind_s == 0
        flood(backlog, clock, 2 * BEHIND_AGAIN_S)
        assert backlog.behind_s > 1.0


def test_the_memory_of_a_flood_is_bounded_and_expires(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 60.0)
    backlog.emptied()
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(REMEMBERED_S + 0.5)
    backlog.emptied()
    clock.now += 1.0
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(REMEMBERED_S - FORGOTTEN_S + 0.5)
    backlog.emptied()
    clock.now += REMEMBERED_S / FORGOTTEN_S
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(0.5)
