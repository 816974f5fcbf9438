"""What is counted of the HTTP server. docs/metrics.md explains each metric."""

from whaled.ops.registry import Registry
from whaled.web.listener import Cut

STATUSES = ("200", "400", "404", "405", "421", "503", "other")


class HttpMeter:
    """The server of /metrics and /healthz: requests, connections that were ended, renderings."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter(
            "http_requests", "Requests answered by the HTTP server, by status.", "status", STATUSES
        )
        self._delayed = registry.counter("http_requests_delayed", "Requests that waited for their turn.")
        self._cut = registry.counter(
            "http_connections_cut", "Connections of the HTTP server refused or ended early, by reason.", "reason", Cut
        )
        self._accept_failures = registry.counter(
            "http_accept_failures", "Times the kernel had no descriptor or memory for a connection of the HTTP server."
        )
        self._renderings = registry.counter("http_renderings", "Times the metrics were rendered.")

    def rendered(self) -> None:
        """The registry was rendered."""
        self._renderings.inc()

    def answered(self, status: int) -> None:
        """A request was answered."""
        text = str(status)
        self._requests.labels(text if text in STATUSES else "other").inc()

    def delayed(self) -> None:
        """A request waited for its turn."""
        self._delayed.inc()

    def cut(self, reason: Cut) -> None:
        """A connection was refused or ended early."""
        self._cut.labels(reason).inc()

    def accept_failed(self) -> None:
        """The kernel had no descriptor or memory for a connection."""
        self._accept_failures.inc()
