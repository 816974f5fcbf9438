"""The accuracy of predictions: what counts in which band."""

from whaled.whales.accuracy import Outcome, band, bands


def test_a_whale_counts_in_the_band_that_contains_its_urgency() -> None:
    urgencies = (1.0, 0.95, 0.9499, 0.75, 0.5, 0.25, 0.05, 0.0499, 0.0, None)
    found = bands(Outcome(each, 0, 1.0) for each in urgencies)
    assert [(each.urgency, each.whales) for each in found] == [
        (0.95, 2), (0.75, 2), (0.5, 1), (0.25, 1), (0.05, 1), (0.0, 2), (None, 1),
    ]  # fmt: skip


def test_early_on_time_late_and_unpredicted_whales_are_counted_separately() -> None:
    off = (-2, 0, 0, 0, 1, 5, None)
    found = band(0.5, [Outcome(0.6, each, None) for each in off])
    assert (found.whales, found.predicted, found.early, found.on_time, found.late) == (7, 6, 1, 3, 2)
    assert (found.wait_median_s, found.wait_high_s) == (None, None)


def test_a_tenth_at_each_end_is_left_out() -> None:
    found = band(None, [Outcome(None, each, float(each)) for each in range(20)])
    assert (found.off_low, found.off_high, found.wait_median_s, found.wait_high_s) == (2, 17, 9.0, 17.0)
    alone = band(None, [Outcome(None, -3, 60.0)])
    assert (alone.off_low, alone.off_high, alone.wait_median_s, alone.wait_high_s) == (-3, -3, 60.0, 60.0)
