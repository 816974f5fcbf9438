"""The operator's upstream URLs: the bases of REST paths derived from them, and their part of error texts."""

from urllib.parse import SplitResult, urlsplit, urlunsplit

from whaled.config.sections import UpstreamSettings
from whaled.errors import ConfigError, Fault
from whaled.urls import usable, without_secrets

REST_PREFIX = "/api/v1/"
SOCKET_PATH = "/api/v1/ws"


def rest_base(settings: UpstreamSettings) -> str:
    """Return the base URL to which REST paths are appended, with a trailing slash. Raises ConfigError.

    It is `rest_url` if that is set (with `/api/v1/` added if it has no path), otherwise the host of `url` with the
    prefix of its path: `wss://host/testnet4/api/v1/ws` gives `https://host/testnet4/api/v1/`. Any other path of `url`
    is ignored, as the backend itself ignores it.
    """
    if settings.rest_url is not None:
        parts = _split("upstream.rest_url", settings.rest_url, ("http", "https"), "http://127.0.0.1:8999/api/v1/")
        return _joined(parts, parts.scheme, parts.path.rstrip("/") + "/" if parts.path.strip("/") else REST_PREFIX)
    parts = _split("upstream.url", settings.url, ("ws", "wss"), "ws://127.0.0.1:8999/api/v1/ws")
    path = parts.path.rstrip("/")
    prefix = path.removesuffix(SOCKET_PATH) if path.endswith(SOCKET_PATH) else ""
    return _joined(parts, "https" if parts.scheme == "wss" else "http", prefix + REST_PREFIX)


def esplora_base(settings: UpstreamSettings) -> str | None:
    """Return the base URL to which electrs paths are appended, with a trailing slash; None if not configured.

    Raises ConfigError.
    """
    if settings.esplora_url is None:
        return None
    parts = _split("upstream.esplora_url", settings.esplora_url, ("http", "https"), "http://127.0.0.1:3000/")
    return _joined(parts, parts.scheme, parts.path.rstrip("/") + "/")


def through(settings: UpstreamSettings) -> str:
    """Return the part of an error text that names the proxy or the Unix socket in use; "" without either."""
    if settings.unix_socket is not None:
        return (
            f" through {settings.unix_socket} (upstream.unix_socket); "
            "is the backend running, and does what serves the socket reach it?"
        )
    if settings.proxy is None:
        return ""
    scheme = urlsplit(settings.proxy).scheme
    return f" through the proxy {without_secrets(settings.proxy)} (upstream.proxy); is it one that speaks {scheme}?"


def unusable(key: str, url: str, example: str) -> ConfigError:
    """Return the ConfigError for a URL that can never work."""
    return ConfigError((Fault(key, f"found {without_secrets(url)!r}, which cannot be used; write it like {example}"),))


def _split(key: str, url: str, schemes: tuple[str, str], example: str) -> SplitResult:
    parts = usable(url, schemes)
    if parts is None:
        raise unusable(key, url, example)
    return parts


def _joined(parts: SplitResult, scheme: str, path: str) -> str:
    return urlunsplit((scheme, parts.netloc, path, "", ""))
