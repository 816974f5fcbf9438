"""Starting points of a stream, as users write them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from whaled.client import (
    Last,
    Position,
    WhaleStream,
    parse_since,
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last:",
        "last:-1",
        "yesterday",
        "2026-13-01",
        "epoch:",
        ":5",
        "a b:5",
        "12",
        "10:00",
        "1767225600",
        "1/2/2026",
    ],
)
def test_a_starting_point_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a starting point|is not an ISO 8601 time"):
        parse_since(text)


def test_starting_points_are_read_as_they_are_written() -> None:
    assert parse_since("last:20") == Last(20)
    assert parse_since(" -_k3:4711 ") == Position("-_k3", 4711)
    assert parse_since("c045c3b92ba929dac234b51e:7") == Position("c045c3b92ba929dac234b51e", 7)
    assert parse_since("123456789012345678901234:7") == Position("123456789012345678901234", 7)
    assert parse_since("2026-01-31T11:00Z") == datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert parse_since("2026-01-31T12:00:00+01:00") == datetime(2026, 1, 31, 12, tzinfo=timezone(timedelta(hours=1)))


def test_a_datetime_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="has no time zone"):
        WhaleStream("ws://127.0.0.1:1", since=datetime(2026, 1, 1))  # noqa: DTZ001 - that is the mistake
