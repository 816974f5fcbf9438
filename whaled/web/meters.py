"""The metrics of the HTTP server. docs/metrics.md explains each one."""

from enum import StrEnum

from whaled.registry import Registry

STATUSES = ("200", "400", "404", "405", "421", "503", "other")


class Cut(StrEnum):
    """The reason why a connection of the HTTP server was refused or cut (a metric label)."""

    FULL = "full"
    ADDRESS_FULL = "address_full"
    DISPLACED = "displaced"
    HEADER_TIMEOUT = "header_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    WRITE_TIMEOUT = "write_timeout"
    REQUEST_TOO_LARGE = "request_too_large"


class HttpMeter:
    """The metrics of requests, connections and renderings.

    `connections` and `connections_limit` are gauges that the server connects to its state.
    """

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter(
            "http_requests", "Requests answered by the HTTP server, by status.", "status", STATUSES
        )
        self._delayed = registry.counter("http_requests_delayed", "HTTP requests that waited for the rate limit.")
        self._cut = registry.counter(
            "http_connections_cut", "Connections of the HTTP server refused or cut, by reason.", "reason", Cut
        )
        self._accept_failures = registry.counter(
            "http_accept_failures", "Failed accepts of the HTTP server because descriptors or memory were short."
        )
        self.connections = registry.gauge("http_connections", "Open connections of the HTTP server.")
        self.connections_limit = registry.gauge("http_connections_limit", "http.max_connections.")
        self._renderings = registry.counter("http_renderings", "Renderings of the metrics.")

    def rendered(self) -> None:
        """Count a rendering of the registry."""
        self._renderings.inc()

    def answered(self, status: int) -> None:
        """Count a response by its status."""
        text = str(status)
        self._requests.labels(text if text in STATUSES else "other").inc()

    def delayed(self) -> None:
        """Count a request that waited for the rate limit."""
        self._delayed.inc()

    def cut(self, reason: Cut) -> None:
        """Count a connection that was refused or cut."""
        self._cut.labels(reason).inc()

    def accept_failed(self) -> None:
        """Count a failed accept because descriptors or memory were short."""
        self._accept_failures.inc()
