from hypothesis import given
from hypothesis import strategies as st

from whaled.gateway.limits import FORGIVEN_S, TRACKED_OFFENDERS, FailureLimit, LostTime, TokenBucket


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


def test_the_number_of_remembered_failures_is_bounded() -> None:
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


def test_messages_received_during_a_blocked_loop_are_charged_at_their_time() -> None:
    lost = LostTime()
    bucket = TokenBucket(rate=10.0, burst=40.0, now=0.0, lost=lost)
    assert bucket.take(1.0) == 0.0
    lost.add(12.0, now=13.0)
    # Those of the time, and those of the burst that were left.
    assert [bucket.take(13.0) for _ in range(120 + 39)] == [0.0] * 159
    assert bucket.take(13.0) > 0.0
    assert bucket.take(13.3) == 0.0  # it fills as ever


def test_a_bucket_that_is_new_or_is_used_long_after_is_forgiven_nothing() -> None:
    lost = LostTime()
    idle = TokenBucket(rate=10.0, burst=5.0, now=0.0, lost=lost)
    spent = TokenBucket(rate=10.0, burst=5.0, now=0.0, lost=lost)
    lost.add(12.0, now=12.0)
    for bucket in (TokenBucket(rate=10.0, burst=5.0, now=12.0, lost=lost), idle):
        now = 12.0 if bucket is not idle else 12.1 + FORGIVEN_S
        assert [bucket.take(now) == 0.0 for _ in range(6)] == [True] * 5 + [False]
    assert spent.take(12.0) == 0.0
    assert [spent.take(12.1 + FORGIVEN_S) == 0.0 for _ in range(6)] == [True] * 5 + [False]


def test_a_minute_is_forgiven_and_no_more() -> None:
    lost = LostTime()
    bucket = TokenBucket(rate=10.0, burst=5.0, now=0.0, lost=lost)
    lost.add(3600.0, now=3600.0)
    lost.add(3600.0, now=7200.0)
    assert [bucket.take(7200.0) == 0.0 for _ in range(606)] == [True] * 605 + [False]


def test_tokens_of_lost_time_pay_a_debt_first() -> None:
    lost = LostTime()
    bucket = TokenBucket(rate=1.0, burst=5.0, now=0.0, lost=lost)
    for _ in range(10):
        bucket.take(0.0)
    assert bucket.is_exhausted
    lost.add(7.0, now=7.0)
    assert [bucket.take(7.0) == 0.0 for _ in range(3)] == [True, True, False]
    assert not bucket.is_exhausted
