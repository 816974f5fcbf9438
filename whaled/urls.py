"""URLs from operators: whether one can be used, and its form for log lines and errors, without secrets. Pure."""

import re
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit, urlunsplit


def usable(url: str, schemes: Collection[str]) -> SplitResult | None:
    """Return the parts of a URL with one of these schemes and a host; None if it has not, or cannot be parsed."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        return None
    return parts if parts.scheme in schemes and has_host and not re.search(r"\s", url) and "#" not in url else None


def redacted(url: str) -> str:
    """Return a text that should be a URL with `***` in place of its possible secrets: user, password and query."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)
    start = scheme[0] if scheme else ""
    before, question, query = url[len(start) :].partition("?")
    if "@" in query:
        return f"{start}***"  # either a password with a question mark or a query with an @: show neither
    _, at, place = before.rpartition("@")
    return start + ("***@" if at else "") + place + ("?***" if question else "")


def without_secrets(url: str) -> str:
    """Return a URL without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
