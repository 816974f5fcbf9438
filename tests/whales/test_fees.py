"""Urgency and predicted block: positions in a live market, never invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.transactions import relaxed
from whaled.model import FeeMarket, ProjectedBlock
from whaled.whales.fees import predicted_block, urgency

MARKET = FeeMarket(fastest=40, half_hour=30, hour=20, economy=10, minimum=4)
RATES = st.floats(0, 10_000)
MARKETS = st.builds(FeeMarket, RATES, RATES, RATES, RATES, RATES)
FULL = 999_000.0


@pytest.mark.parametrize(
    ("rate", "score"),
    [
        (0, 0),
        (2, 0.025),
        (4, 0.05),
        (7, 0.15),
        (10, 0.25),
        (20, 0.5),
        (25, 0.625),
        (30, 0.75),
        (39.9999999, 0.95),
        (40, 0.95),
        (80, 0.975),
        (4_000_000, 1),
    ],
)
def test_urgency_is_the_position_among_the_recommended_rates(rate: float, score: float) -> None:
    assert urgency(rate, MARKET) == score


def test_urgency_is_unknown_without_a_rate_or_a_market() -> None:
    assert urgency(None, MARKET) is None
    assert urgency(5, None) is None


def test_an_empty_mempool_has_one_rate_and_paying_it_is_as_fast_as_it_gets() -> None:
    flat = FeeMarket(1, 1, 1, 1, 1)
    assert urgency(1, flat) == 0.95
    assert urgency(0.5, flat) == 0.025
    assert urgency(0, FeeMarket(0, 0, 0, 0, 0)) == 0.95


def test_a_slower_target_that_is_recommended_more_is_not_believed() -> None:
    assert urgency(32, FeeMarket(fastest=40, half_hour=30, hour=35, economy=10, minimum=4)) == 0.79


@relaxed
@given(RATES, RATES, MARKETS)
def test_urgency_is_within_bounds_and_never_falls_with_the_rate(low: float, high: float, market: FeeMarket) -> None:
    low, high = sorted((low, high))
    first, second = urgency(low, market), urgency(high, market)
    assert first is not None
    assert second is not None
    assert 0 <= first <= second <= 1


@relaxed
@given(MARKETS)
def test_the_fastest_rate_always_scores_the_same(market: FeeMarket) -> None:
    assert urgency(market.fastest, market) == 0.95


@pytest.mark.parametrize(
    ("rate", "height"), [(50, 101), (30, 101), (29.9, 102), (15, 102), (8, 103), (5, 103), (4.9, 104), (0, 104)]
)
def test_the_block_is_the_first_whose_cheapest_transaction_pays_no_more(rate: float, height: int) -> None:
    projected = [ProjectedBlock(FULL, 30, 300), ProjectedBlock(FULL, 15, 30), ProjectedBlock(FULL, 5, 15)]
    assert predicted_block(rate, projected, 100) == height


def test_a_last_block_with_room_takes_what_pays_less_than_all_in_it() -> None:
    assert predicted_block(1, [ProjectedBlock(FULL, 30, 300), ProjectedBlock(5000, 15, 30)], 100) == 102


def test_an_empty_mempool_means_the_next_block() -> None:
    assert predicted_block(1, [], 100) == 101


def test_nothing_is_predicted_beyond_what_is_projected() -> None:
    rest = [ProjectedBlock(FULL, 30, 300), ProjectedBlock(60_000_000, 1, 30)]
    assert predicted_block(30, rest, 100) == 101
    assert predicted_block(5, rest, 100) is None
    assert predicted_block(0.5, rest, 100) is None
    assert predicted_block(0.5, [ProjectedBlock(FULL, 9.0 - n, 10.0 - n) for n in range(8)], 100) is None


@pytest.mark.parametrize(("rate", "projected", "tip"), [(None, [], 100), (1.0, None, 100), (1.0, [], None)])
def test_nothing_is_predicted_from_what_is_not_known(
    rate: float | None, projected: list[ProjectedBlock] | None, tip: int | None
) -> None:
    assert predicted_block(rate, projected, tip) is None


@relaxed
@given(RATES, RATES, st.lists(st.builds(ProjectedBlock, st.just(FULL), RATES, RATES), max_size=8))
def test_paying_more_is_never_predicted_later(low: float, high: float, projected: list[ProjectedBlock]) -> None:
    low, high = sorted((low, high))
    cheap, dear = predicted_block(low, projected, 100), predicted_block(high, projected, 100)
    if cheap is not None:
        assert dear is not None
        assert 100 < dear <= cheap <= 100 + len(projected) + 1


# One transaction of 4 MWU fills the first block; the backend's feeRange for it is all 0.
FILLED = (ProjectedBlock(998_500.0, None, 0), ProjectedBlock(FULL, 8, 50), ProjectedBlock(400_000, 3, 8))


@pytest.mark.parametrize("first", [FILLED[0], ProjectedBlock(998_500.0, 0, 0)])
@pytest.mark.parametrize(("rate", "height"), [(0.5, 103), (4, 103), (9, 102), (50, 102), (50.1, None)])
def test_a_full_block_of_unknown_rates_does_not_take_everything(
    first: ProjectedBlock, rate: float, height: int | None
) -> None:
    assert predicted_block(rate, (first, *FILLED[1:]), 100) == height


def test_a_last_full_block_of_unknown_rates_gives_no_prediction() -> None:
    last = [ProjectedBlock(FULL, 30, 300), ProjectedBlock(998_500.0, None, 0)]
    assert predicted_block(31, last, 100) == 101
    assert predicted_block(29, last, 100) is None


def test_the_highest_rate_of_a_full_block_is_in_it_whatever_its_lowest() -> None:
    blocks = [ProjectedBlock(FULL, 0, 300), ProjectedBlock(FULL, 5, 15)]
    assert predicted_block(300, blocks, 100) == 101
    assert predicted_block(100, blocks, 100) is None
    assert predicted_block(15, blocks, 100) == 102


def test_a_block_with_room_takes_everything_though_its_rates_are_unknown() -> None:
    assert predicted_block(1, [ProjectedBlock(50_000, None, 0)], 100) == 101


def test_a_recommended_rate_that_is_unknown_is_no_step_of_the_scale() -> None:
    holes = FeeMarket(fastest=40, half_hour=None, hour=20, economy=None, minimum=None)
    assert [urgency(rate, holes) for rate in (0, 10, 20, 30, 40)] == [0.0, 0.25, 0.5, 0.725, 0.95]
    assert urgency(10, FeeMarket(None, 30, 20, 10, 4)) is None
