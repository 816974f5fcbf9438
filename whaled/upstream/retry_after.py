"""The Retry-After header of HTTP, in seconds (RFC 9110, 10.2.3)."""

from email.utils import parsedate_to_datetime


def retry_after_s(header: str | None, now: float) -> float | None:
    """Seconds from `now` on; None if the header is absent, or neither a number nor an HTTP date."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    at = http_date(header)
    return None if at is None else max(0.0, at - now)


def http_date(header: str | None) -> float | None:
    """Unix seconds of an HTTP date, None if it is none."""
    try:
        return parsedate_to_datetime(header).timestamp() if header else None
    except (ValueError, OverflowError):  # a year, or a zone, that there is not
        return None
