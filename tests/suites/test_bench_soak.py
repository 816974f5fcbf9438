"""The soak's own arithmetic: its bounds can be missed."""

from collections.abc import Callable

import pytest

from bench.soak_aims import LIVE, Course, Received, Sample, aims, grown, mean_ms
from faults.verdict import Verdict

HOUR_S = 3600.0
LEFT = Sample(HOUR_S, 70.0, 25)
SOON: Received = ([0.05, 0.06], [0.05, 0.07])


def look(seconds: float, lag_s: float) -> dict[str, float]:
    return {f"{LIVE[1]}_count": seconds * 4, f"{LIVE[1]}_sum": seconds * 4 * lag_s}


def course(
    rss_mib: Callable[[float], float] = lambda hours: 70.0,
    *,
    lag_s: float = 0.001,
    mempool: Callable[[float], float] = lambda hours: 9_000,
    blocks: Callable[[float], float] = lambda hours: 300_000,
) -> Course:
    """An hour in which all is well, but for what is said."""
    samples = [
        Sample(at, rss_mib(at / HOUR_S), 25, round(mempool(at / HOUR_S)), round(blocks(at / HOUR_S)))
        for at in range(0, int(HOUR_S), 2)
    ]
    thirds = [look(0, 0.001), look(1200, 0.001), look(2400, 0.001), look(2400, 0.001)]
    thirds[3] = {key: value + look(1200, lag_s)[key] for key, value in thirds[2].items()}
    return Course(samples=samples, thirds=thirds)


def missed(found: Course, verdict: Verdict | None = None, received: Received = SOON, left: Sample = LEFT) -> list[str]:
    return [aim.what for aim in aims(found, verdict or Verdict(whales=100), received, left) if not aim.is_met]


def test_an_hour_without_faults_misses_nothing() -> None:
    assert missed(course()) == []


def test_growth_only_during_the_warm_up_is_ignored() -> None:
    assert missed(course(lambda hours: 60 + min(hours * 3, 1) * 30)) == []


def test_changes_within_seconds_are_no_growth() -> None:
    # A backend that brings its mempool again: 40 MiB for 6 s, more often towards the end.
    assert missed(course(lambda hours: 70 + (40 if hours * HOUR_S % (200 - 120 * hours) < 6 else 0))) == []


def test_more_than_a_mebibyte_in_40_minutes_is_growth() -> None:
    assert missed(course(lambda hours: 70 + 1.4 * hours)) == []
    assert missed(course(lambda hours: 70 + 1.7 * hours)) == ["memory grown in the last 40 minutes"]


def test_memory_is_not_judged_while_the_mempool_changes() -> None:
    found = missed(course(mempool=lambda hours: 9_000 + 9_000 * hours))
    assert found == ["mempool, last third against the second"]


def test_a_short_soak_may_still_be_warming_up_but_not_for_ever() -> None:
    def short(grown_mib: float) -> list[str]:
        whole = course(lambda hours: 70 + grown_mib * hours * 10)
        return missed(Course(samples=[each for each in whole.samples if each.at <= 360], thirds=whole.thirds))

    assert short(10) == []
    assert short(30) == ["memory grown after the first third"]


def test_blocks_that_grow_are_a_leak_even_while_memory_is_flat() -> None:
    # A leak first fills the room in pages that are there already.
    assert missed(course(blocks=lambda hours: 300_000 + 7_500 * hours)) == []
    assert missed(course(blocks=lambda hours: 300_000 + 10_500 * hours)) == [
        "Python's blocks grown in the last 40 minutes"
    ]
    whole = course(blocks=lambda hours: 300_000 + 600_000 * hours)
    short = Course(samples=[each for each in whole.samples if each.at <= 360], thirds=whole.thirds)
    assert missed(short) == ["Python's blocks grown after the first third"]


def test_the_median_of_a_short_soak_may_drift_more_but_not_by_any_amount() -> None:
    whole = course()
    short = Course(samples=[each for each in whole.samples if each.at <= 360], thirds=whole.thirds)
    assert missed(short, received=([0.05], [0.4])) == []
    assert missed(short, received=([0.05], [0.6])) == ["shown to received, drift of the median"]


def test_a_slope_is_found_through_noise() -> None:
    samples = course(lambda hours: 70 + 12 * hours + (hours * HOUR_S // 10) % 5).samples
    assert grown(samples) == pytest.approx(12, abs=0.2)


def test_a_mean_covers_the_time_between_two_readings() -> None:
    before, after = {"x_sum": 1.0, "x_count": 10.0}, {"x_sum": 1.5, "x_count": 60.0}
    assert mean_ms("x", before, after) == pytest.approx(10)
    assert mean_ms("x", after, after) == 0


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("memory grown in the last 40 minutes", missed(course(lambda hours: 70 + 15 * hours))),
        ("memory at most", missed(course(lambda hours: 201))),
        ("loop lag, mean of the last third", missed(course(lag_s=0.05))),
        ("descriptors left, beyond the first", missed(course(), left=Sample(HOUR_S, 70, 35))),
        ("shown to received, drift of the median", missed(course(), received=([0.05], [0.3]))),
        ("differences from the truth", missed(course(), Verdict(whales=100, problems=["missing: a whale"]))),
        ("whales nobody could know", missed(course(), Verdict(whales=100, unknowable=9))),
        ("whales compared", missed(course(), Verdict(whales=3))),
    ],
)
def test_each_bound_can_be_missed_by_itself(what: str, found: list[str]) -> None:
    assert found == [what]
