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


class ConnectionMeter:
    """The metrics of requests and connections of a server. Their names begin with `name`; `server` is the server.

    `connections` and `connections_limit` are gauges that the server connects to its state.
    """

    def __init__(
        self,
        registry: Registry,
        name: str = "http",
        server: str = "the HTTP server",
        limit: str = "http.max_connections.",
        statuses: tuple[str, ...] = STATUSES,
    ) -> None:
        self._statuses = statuses
        self._requests = registry.counter(
            f"{name}_requests", f"Requests answered by {server}, by status.", "status", statuses
        )
        self._delayed = registry.counter(
            f"{name}_requests_delayed", f"Requests of {server} that waited for the rate limit."
        )
        self._cut = registry.counter(
            f"{name}_connections_cut", f"Connections of {server} refused or cut, by reason.", "reason", Cut
        )
        self._accept_failures = registry.counter(
            f"{name}_accept_failures", f"Failed accepts of {server} because descriptors or memory were short."
        )
        self.connections = registry.gauge(f"{name}_connections", f"Open connections of {server}.")
        self.connections_limit = registry.gauge(f"{name}_connections_limit", limit)

    def answered(self, status: int) -> None:
        """Count a response by its status."""
        text = str(status)
        self._requests.labels(text if text in self._statuses else "other").inc()

    def delayed(self) -> None:
        """Count a request that waited for the rate limit."""
        self._delayed.inc()

    def cut(self, reason: Cut) -> None:
        """Count a connection that was refused or cut."""
        self._cut.labels(reason).inc()

    def accept_failed(self) -> None:
        """Count a failed accept because descriptors or memory were short."""
        self._accept_failures.inc()


class HttpMeter(ConnectionMeter):
    """The metrics of the HTTP server."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self._renderings = registry.counter("http_renderings", "Renderings of the metrics.")

    def rendered(self) -> None:
        """Count a rendering of the registry."""
        self._renderings.inc()
