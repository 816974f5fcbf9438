"""Times as programs print them and people write them: read exactly, or refused with the reason."""

import contextlib
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled import times

TEN = datetime(2026, 11, 28, 10, tzinfo=UTC)


def read(text: str) -> datetime:
    at = times.parse(text)
    assert at.utcoffset() is not None
    return at


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-28T10:00:00Z",  # RFC 3339, JavaScript, Java Instant
        "2026-11-28T10:00:00.000Z",
        "2026-11-28t10:00:00z",
        "2026-11-28T10:00Z",  # Java OffsetDateTime leaves out seconds that are 0
        "2026-11-28T11:00+01:00[Europe/Paris]",  # Java ZonedDateTime, RFC 9557
        "2026-11-28T10:00Z[UTC]",
        "2026-11-28T10:00:00.000000000Z",
        "2026-11-28T15:30:00+05:30",
        "2026-11-28 10:00:00 +0000 UTC",  # Go Time.String
        "2026-11-28 10:00:00.000000001 +0000 UTC m=+0.000012345",
        "2026-11-28 11:00:00 +0100 CET",
        "2026-11-28 13:00:00 +0300 +03",
        "2026-11-28T10:00:00+0000",  # Java and strftime with %z
        "2026-11-28T10:00:00-00:00",
        "2026-11-28T04:30:00\u221205:30",  # a real minus sign
        "2026-11-28 10:00:00+00:00",  # Python, date --rfc-3339
        "2026-11-28T10+00:00",  # date -Ihours
        "2026-11-28 05:00:00-05",  # PostgreSQL
        "2026-11-28 10:00:00,000Z",
        "20261128T100000Z",
        "20261128T1100+0100",
        "2026-11-28 10:00:00 UTC",
        "2026-11-28 10:00 GMT",
    ],
)
def test_a_time_with_its_zone_is_read_exactly(text: str) -> None:
    assert read(f" {text}\n") == TEN
    assert times.names_zone(text)


@pytest.mark.parametrize("text", ["2026-11-28T10:00:00", "2026-11-28 10:00", "2026-11-28T10", "2026-11-28_10:00"])
def test_a_time_without_a_zone_is_utc(text: str) -> None:
    assert read(text) == TEN
    assert not times.names_zone(text)


def test_a_date_alone_is_its_first_moment_in_utc() -> None:
    assert read("2026-11-28") == TEN.replace(hour=0)


def test_digits_beyond_microseconds_are_cut_off() -> None:
    assert read("2026-11-28T10:00:00.123456789Z").microsecond == 123456
    assert read("2026-11-28T10:00:00.5Z").microsecond == 500_000


def test_a_leap_second_is_the_start_of_the_next_minute() -> None:
    assert read("2016-12-31T23:59:60Z") == datetime(2017, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1764324000", "a number names no unit; as seconds it would be 2025-11-28T10:00:00+00:00"),
        ("1764324000000", "as milliseconds it would be 2025-11-28T10:00:00+00:00"),
        ("1764324000000000000", "as nanoseconds it would be 2025-11-28T10:00:00+00:00"),
        ("20261128", "a date alone has dashes"),
        ("2026-11-28T10:00:00[Europe/Paris]", "a zone's name without an offset"),
        ("2026-11-28 10:00:00 CET", "a zone's name is not an offset"),
        ("2026-11-28T10:00:00 Europe/Paris", "a zone's name is not an offset"),
        ("2026-11-28 10:00:00 +0100 UTC", "its offset is not that of UTC"),
        ("2026-11-28T10:00:00 01:00", "the sign of the offset is missing"),
        ("28.11.2026 10:00", "the order of day and month is not known"),
        ("11/28/2026", "the order of day and month is not known"),
        ("28-11-2026", "the order of day and month is not known"),
        ("2026/11/28", "write 2026-11-28"),
        ("2026-W48-6", "week dates"),
        ("2026-332", "ordinal dates"),
        ("10:00", "the date is missing"),
        ("2026-02-30", "day is out of range for month"),
        ("2026-11-28T24:00:00Z", "hour 24 is 00:00 of the next day"),
        ("2026-11-28T10:30:60Z", "second must be in 0..59"),
        ("2026-11-28T10:00:00+25:00", "the offset must be between"),
        ("9999-12-31T23:59:59-14:00", "out of range"),
        ("0001-01-01T00:00:00+14:00", "out of range"),
        ("2026-11-28T10:00:00+1:00", "write it like 2026-11-28T10:00:00Z"),
        ("2026-11-28T1000Z", "write it like"),
        ("20261128T10:00Z", "write it like"),
        ("20261128 1000Z", "write it like"),
        ("2026-11-28T10:0000Z", "write it like"),
        ("\u0662\u0660\u0662\u0666-11-28", "write it like"),
        ("yesterday", "write it like"),
        ("", "write it like"),
        ("2026-11-28" + " " * 100 + "10:00", "it has 115 characters"),
    ],
)
def test_an_invalid_time_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="is not an ISO 8601 time: ") as caught:
        times.parse(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [1764324000, 1764324000.5, -1, 10**400, 1e300])
def test_a_number_is_refused_as_a_time(value: float) -> None:
    assert "is not an ISO 8601 time: a number names no unit" in times.problem_of_number(value)


@given(
    st.datetimes().filter(lambda at: 1 < at.year < 9999),
    st.integers(-14 * 60, 14 * 60),
)
def test_every_time_python_writes_is_read_back(at: datetime, minutes: int) -> None:
    zoned = at.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert read(zoned.isoformat()) == zoned
    assert read(str(zoned)) == zoned
    assert read(at.isoformat()) == at.replace(tzinfo=UTC)


@given(st.text(max_size=40) | st.from_regex(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.{0,12}", fullmatch=True))
def test_a_parsed_time_never_differs_from_pythons(text: str) -> None:
    with contextlib.suppress(ValueError):
        ours = times.parse(text)
        with contextlib.suppress(ValueError):
            theirs = datetime.fromisoformat(text.strip())
            assert ours == (theirs if theirs.tzinfo is not None else theirs.replace(tzinfo=UTC))
