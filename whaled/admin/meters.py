"""The metrics of the admin API. docs/metrics.md explains each one."""

from whaled.admin.calls import STATUS, Outcome
from whaled.registry import Registry
from whaled.web.meters import ConnectionMeter

STATUSES = ("200", *sorted({str(status) for status in STATUS.values()}), "other")


class AdminMeter(ConnectionMeter):
    """The metrics of requests, connections and acts."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry, "admin", "the admin API", "admin.max_connections.", STATUSES)
        self._acts = registry.counter("admin_acts", "Acts of the admin API that ended, by outcome.", "outcome", Outcome)

    def acted(self, outcome: Outcome) -> None:
        """Count an act."""
        self._acts.labels(outcome).inc()
