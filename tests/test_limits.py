from hypothesis import given
from hypothesis import strategies as st

from whaled.gateway.limits import TRACKED_OFFENDERS, FailureLimit, TokenBucket


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


def test_an_offender_that_fails_too_often_waits_and_its_neighbour_does_not() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    assert [failures.failed("a", "x", 0.0) for _ in range(3)] == [0.0, 0.0, 2.0]
    assert failures.failed("a", "y", 0.0) == 0.0
    assert failures.failed("b", "x", 0.0) == 0.0
    assert failures.failed("a", "x", 100.0) == 0.0


def test_many_names_at_one_address_are_limited_together() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    waits = [failures.failed("a", str(name), 0.0) for name in range(21)]
    assert (max(waits[:20]), waits[20]) == (0.0, 0.2)


def test_one_network_of_ipv6_fails_as_one_address() -> None:
    failures = FailureLimit(rate=1.0, burst=1.0)
    failures.failed("2001:db8::1", "x", 0.0)
    assert failures.failed("2001:db8::2", "x", 0.0) > 0


def test_a_client_that_is_in_is_known_by_its_name_and_recognised_when_it_goes_on() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    answers = [failures.failed_as("c 1", 0.0) for _ in range(4)]
    assert answers == [(0.0, False), (0.0, False), (2.0, False), (4.0, True)]


def test_failures_survive_a_reload_and_take_its_limits() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    for _ in range(3):
        failures.failed("a", "x", 0.0)
    failures.reconfigure(0.5, 2)
    assert failures.failed("a", "x", 0.0) == 4.0
    failures.reconfigure(10.0, 20)
    assert failures.failed("a", "x", 0.0) == 0.0


def test_failures_are_remembered_of_so_many_and_no_more() -> None:
    failures = FailureLimit(rate=0.5, burst=2)
    for number in range(2 * TRACKED_OFFENDERS):
        failures.failed(f"10.0.{number >> 8}.{number & 255}", str(number), 0.0)
    assert failures.offenders == TRACKED_OFFENDERS


def test_a_clock_that_steps_back_makes_no_wait_longer() -> None:
    failures = FailureLimit(rate=1.0, burst=5.0)
    for _ in range(10):
        failures.failed("a", "x", 100_000.0)
    assert failures.failed("a", "x", 1_000.0) <= 5.0
    assert failures.failed("a", "x", 1_020.0) == 0.0
