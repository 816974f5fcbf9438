"""What follows from the operator's upstream URLs: the REST base, and a form fit for log lines."""

from urllib.parse import SplitResult, urlsplit, urlunsplit

from whaled.config.sections import Upstream

REST_PREFIX = "/api/v1/"
SOCKET_PATH = "/api/v1/ws"


def shown(url: str) -> str:
    """The URL without user, password and query: these may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def rest_base(settings: Upstream) -> str:
    """Where REST paths are appended, with a slash at the end.

    `rest_url` as it stands where it is set (`/api/v1/` is added if it names no path); else the host of `url`, and its
    prefix where it has one: `wss://host/testnet4/api/v1/ws` gives `https://host/testnet4/api/v1/`. Any other path is
    ignored, as the backend itself ignores it.
    """
    if settings.rest_url is not None:
        parts = urlsplit(settings.rest_url)
        return _joined(parts, parts.scheme, parts.path.rstrip("/") + "/" if parts.path.strip("/") else REST_PREFIX)
    parts = urlsplit(settings.url)
    path = parts.path.rstrip("/")
    prefix = path.removesuffix(SOCKET_PATH) if path.endswith(SOCKET_PATH) else ""
    return _joined(parts, "https" if parts.scheme == "wss" else "http", prefix + REST_PREFIX)


def _joined(parts: SplitResult, scheme: str, path: str) -> str:
    return urlunsplit((scheme, parts.netloc, path, "", ""))
