from hypothesis import given
from hypothesis import strategies as st

from whaled.gateway.limits import FailureLimit, TokenBucket


def test_a_burst_passes_at_once_and_then_the_rate_holds() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0, now=0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take(0.0) == 0.5
    assert bucket.take(2.0) == 0.0


def test_debt_ends_at_one_burst_and_is_recognised() -> None:
    bucket = TokenBucket(rate=1.0, burst=2.0, now=0.0)
    for _ in range(100):
        bucket.take(0.0)
    assert bucket.is_exhausted
    assert bucket.take(0.0) == 2.0  # however long it hammered, the debt is bounded


def test_a_clock_that_steps_back_takes_nothing_away() -> None:
    bucket = TokenBucket(rate=1.0, burst=5.0, now=1000.0)
    assert bucket.take(10.0) == 0.0
    assert bucket.take(10.0) == 0.0


@given(st.lists(st.floats(0.0, 10.0), max_size=60))
def test_no_more_passes_than_burst_plus_rate_times_time(gaps: list[float]) -> None:
    bucket = TokenBucket(rate=2.0, burst=5.0, now=0.0)
    now = passed = 0.0
    for gap in gaps:
        now += gap
        passed += bucket.take(now) == 0.0
    assert passed <= 5.0 + 2.0 * now + 1e-6


def test_an_address_that_fails_too_often_waits() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    failures.failed("a", 0.0)
    failures.failed("a", 0.0)
    assert failures.wait_s("a", 0.0) == 0.0
    failures.failed("a", 0.0)
    assert failures.wait_s("a", 0.0) == 2.0
    assert failures.wait_s("b", 0.0) == 0.0
    assert failures.wait_s("a", 2.0) == 0.0
