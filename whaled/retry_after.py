"""The Retry-After header of HTTP, in seconds (RFC 9110, 10.2.3). Pure."""

import re
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

# The RFC does not allow decimals, but their meaning is clear.
_SECONDS = re.compile(r"\d+(\.\d*)?", re.ASCII)


def retry_after_s(values: Iterable[str], now: float) -> float | None:
    """Return the longest delay that one of the header's values requests, in seconds from `now`.

    The header may occur twice, for instance if a proxy adds its own. None if no value is a number or an HTTP date.
    """
    return max((asked for value in values if (asked := _asked_s(value, now)) is not None), default=None)


def http_date(header: str | None) -> float | None:
    """Return an HTTP date in Unix seconds, None if it is not a valid one."""
    try:
        at = parsedate_to_datetime(header) if header else None
        if at is not None and at.tzinfo is None:
            at = at.replace(tzinfo=UTC)  # RFC 9110, 5.6.7: it is GMT even without a zone
        return None if at is None else at.timestamp()
    except (ValueError, OverflowError):  # the year or the zone does not exist
        return None


def _asked_s(value: str, now: float) -> float | None:
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    at = http_date(value)
    return None if at is None else max(0.0, at - now)
