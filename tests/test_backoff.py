"""Backoff: for how long what failed is left alone."""

from kit.clocks import SetClock
from whaled.backoff import INITIAL_S, MAX_RETRY_AFTER_S, MAX_S, Backoff


def test_a_failing_key_waits_longer_each_time_up_to_a_maximum() -> None:
    time = SetClock()
    backoff = Backoff(time)
    waits = [backoff.failed("x") for _ in range(10)]
    assert waits[:3] == [INITIAL_S, 2 * INITIAL_S, 4 * INITIAL_S]
    assert waits[-1] == MAX_S
    assert not backoff.is_due("x")
    assert backoff.is_due("y")
    assert backoff.next_due() == time.now + MAX_S
    time.now += MAX_S
    assert backoff.is_due("x")


def test_a_retry_after_is_honoured_up_to_a_maximum() -> None:
    backoff = Backoff(SetClock())
    assert backoff.failed("x", 30.0) == 30.0
    assert backoff.failed("x", 1e9) == MAX_RETRY_AFTER_S
    assert backoff.failed("y", 0.0) == INITIAL_S


def test_keys_that_succeeded_or_are_no_longer_wanted_are_forgotten() -> None:
    backoff = Backoff(SetClock())
    for key in "xyz":
        backoff.failed(key)
    assert backoff.forget("x")
    assert not backoff.forget("x")
    backoff.retain(["z", "w"])
    assert backoff.is_due("y")
    assert not backoff.is_due("z")
    backoff.retain([])
    assert backoff.next_due() is None
    assert backoff.failed("z") == INITIAL_S
