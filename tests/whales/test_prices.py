"""The price: its time is the backend's, never later than its receipt, and it counts for a while."""

import pytest

from kit.whales import NOW
from whaled.model import Market, Price
from whaled.whales.prices import AHEAD_LIMIT_S, received, usable, usd_of


def test_the_time_of_a_price_is_the_backends_or_else_its_receipt() -> None:
    assert received(None, 64_000.0, NOW - 900, NOW) == Price(64_000.0, NOW - 900, NOW - 900)
    assert received(None, 64_000.0, None, NOW) == Price(64_000.0, NOW)
    assert received(Price(1.0, NOW), None, None, NOW) is None


def test_a_clock_that_is_a_bit_ahead_makes_no_price_newer_than_its_receipt() -> None:
    ahead = received(None, 64_000.0, NOW + 90, NOW)
    assert ahead == Price(64_000.0, NOW, NOW + 90)
    again = received(ahead, 64_000.0, NOW + 90, NOW + 7200)  # the same one, after a reconnect
    assert again == ahead
    assert usable(Market(price=again), NOW + 7201, 7200) is None
    assert received(ahead, 64_000.0, NOW + 3690, NOW + 3600) == Price(64_000.0, NOW + 3600, NOW + 3690)


def test_a_time_far_ahead_is_not_believed() -> None:
    assert received(None, 64_000.0, NOW + AHEAD_LIMIT_S + 1, NOW) is None


@pytest.mark.parametrize(("now", "moment", "is_usable"), [
    (NOW, None, True), (NOW + 7200, None, True), (NOW + 7201, None, False), (NOW - 7201, None, False),
    (NOW, NOW - 7200, True), (NOW, NOW - 7201, False), (NOW, NOW + 7201, True), (NOW + 7201, NOW, False),
])  # fmt: skip
def test_a_price_counts_near_its_time_now_and_at_the_requested_moment(
    now: float, moment: float | None, is_usable: bool
) -> None:
    price = Price(64_000.0, NOW)
    assert usable(Market(price=price, moment=moment), now, 7200) == (price if is_usable else None)


def test_dollars_are_to_the_cent() -> None:
    assert usd_of(12_345, Price(64_123.45, NOW)) == 7.92
