"""Parsing of times: ISO 8601 in the forms that Java, Go, JavaScript, Python and date(1) print. Pure.

A time without a zone is in UTC. An ambiguous text (a number, `CET`, `28.11.2026`) is refused with the reason.
"""

import re
from datetime import UTC, datetime, timedelta, timezone

# The longest form is Go's, with nanoseconds and its monotonic clock: about 65 characters.
MAX_CHARACTERS = 100
# Maximum length that an error message quotes of a text.
QUOTED_CHARACTERS = 60
EXAMPLES = "2026-11-28T10:00:00Z, 2026-11-28 10:00+01:00 or 2026-11-28 10:00 (UTC)"

_CLOCK = r"(?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,20}))?)?)?"
_ZONE = (
    r"(?:\ *(?:(?P<utc>[Zz]|UTC|GMT|UT)"
    r"|(?P<sign>[+\-\u2212])(?P<zone_hours>\d\d)(?::?(?P<zone_minutes>\d\d)(?::?(?P<zone_seconds>\d\d))?)?"
    r"(?:\ (?P<zone_name>[A-Z][A-Za-z]{1,5}|[+-]\d{2,4}))?))?"
)
# Java appends the zone's name in brackets (RFC 9557), Go the reading of its monotonic clock.
_EXTRA = r"(?P<brackets>(?:\[!?[^\[\]]{1,64}\])*)(?:\ m=[+-]\d{1,20}\.\d{1,20})?"
_TIME = re.compile(
    r"(?P<year>\d{4})(?P<dash>-?)(?P<month>\d\d)(?P=dash)(?P<day>\d\d)"
    rf"(?:(?P<mark>[Tt_]|\ +){_CLOCK}{_ZONE})?{_EXTRA}",
    re.ASCII | re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?\d{9,20}(?:\.\d{0,20})?", re.ASCII)
# Seconds, milliseconds, microseconds and nanoseconds of this century differ by their number of digits.
_NUMBER_UNITS = ((1e11, 1.0, "seconds"), (1e14, 1e3, "milliseconds"), (1e17, 1e6, "microseconds"))
_CAUSES = tuple(
    (re.compile(pattern, re.ASCII), cause)
    for pattern, cause in (
        (r"\d{1,2}:\d{2}(?!\d)", "the date is missing"),
        (r"\d{4}-?W\d\d", "week dates are not read; write year, month and day"),
        (r"\d{4}-?\d{3}(?!\d)", "ordinal dates are not read; write year, month and day"),
        (r"\d{8}$", "a date alone has dashes, 2026-11-28: eight digits may be a number"),
        (r"\d{1,4}[./]\d{1,2}[./]\d{1,4}", "the order of day and month is not known; write 2026-11-28"),
        (r"\d{1,2}-\d{1,2}-\d{4}", "the order of day and month is not known; write 2026-11-28"),
        (r".*\d\ \d\d:?\d\d$", "the sign of the offset is missing (in a URL, + is written %2B)"),
        (r".*\d(?:\.\d+)?\[[^\]]*\]$", "a zone's name without an offset: the offset of a name changes over the years"),
        (r".*\d\ ?[A-Za-z][A-Za-z_/]+$", "a zone's name is not an offset: write +01:00, or Z for UTC"),
    )
)


def parse(text: str) -> datetime:
    """Parse a time. Return it with its zone, UTC if it names none. Raises ValueError with the reason.

    Digits beyond microseconds are cut off. If a zone's name follows an offset, the offset counts.
    """
    text = text.strip()
    found = _TIME.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if found is None or not _is_consistent(found):
        raise ValueError(f"{_quoted(text)} is not an ISO 8601 time: {_cause(text)}")
    try:
        return _moment(found)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{_quoted(text)} is not an ISO 8601 time: {error}") from None


def text_of(at: float) -> str:
    """Return Unix seconds as an ISO 8601 text in UTC, without the fraction of a second."""
    return datetime.fromtimestamp(int(at), UTC).isoformat()


def names_zone(text: str) -> bool:
    """Return whether a text that `parse` accepts names its zone."""
    found = _TIME.fullmatch(text.strip())
    return found is not None and (found["utc"] is not None or found["sign"] is not None)


def problem_of_number(value: float) -> str:
    """Return the reason why a number is not a time, with the time that was probably intended."""
    return f"{str(value)[:QUOTED_CHARACTERS]} is not an ISO 8601 time: {_of_number(value)}"


def _is_consistent(found: re.Match[str]) -> bool:
    """Return whether the parts are consistent: separators everywhere or nowhere, and an unambiguous zone."""
    parts = [name for name in ("hour", "minute", "second") if found[name] is not None]
    if not found["dash"] and (not parts or found["mark"] not in {"T", "t"}):
        return False
    if parts:
        clock = found[0][found.start("hour") : found.end(parts[-1])]
        if clock.count(":") != (len(parts) - 1 if found["dash"] else 0):
            return False
    return not found["brackets"] or found["utc"] is not None or found["sign"] is not None


def _offset(found: re.Match[str]) -> timedelta:
    if found["sign"] is None:
        return timedelta()
    hours, minutes, seconds = (int(found[f"zone_{name}"] or 0) for name in ("hours", "minutes", "seconds"))
    if hours > 23 or minutes > 59 or seconds > 59:
        raise ValueError("the offset must be between -23:59 and +23:59")
    size = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if size and found["zone_name"] in {"UTC", "GMT", "UT"}:
        raise ValueError(f"its offset is not that of {found['zone_name']}")
    return size if found["sign"] == "+" else -size


def _moment(found: re.Match[str]) -> datetime:
    fields = {name: int(found[name] or 0) for name in ("year", "month", "day", "hour", "minute", "second")}
    if fields["hour"] == 24:
        raise ValueError("hour 24 is 00:00 of the next day")
    # RFC 3339, 5.7: a leap second is the 61st second of an hour's last minute.
    leap = timedelta(seconds=1) if (fields["minute"], fields["second"]) == (59, 60) else timedelta()
    if leap:
        fields["second"] = 59
    micros = int((found["fraction"] or "")[:6].ljust(6, "0"))
    offset = _offset(found)
    zone = timezone(offset) if offset else UTC
    at = datetime(**fields, microsecond=micros, tzinfo=zone) + leap
    at.astimezone(UTC)  # raises OverflowError at the ends of the calendar
    return at


def _cause(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        return f"it has {len(text)} characters"
    if _NUMBER.fullmatch(text):
        return _of_number(float(text))
    return next((cause for pattern, cause in _CAUSES if pattern.match(text)), f"write it like {EXAMPLES}")


def _of_number(value: float) -> str:
    try:
        number = float(value)
        by, unit = next(((by, name) for limit, by, name in _NUMBER_UNITS if abs(number) < limit), (1e9, "nanoseconds"))
        meant = f"; as {unit} it would be {datetime.fromtimestamp(number / by, UTC).isoformat()}"
    except (ValueError, OverflowError, OSError):
        meant = ""
    return f"a number names no unit{meant}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "…")
