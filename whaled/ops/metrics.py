"""All metrics that whaled exports, in one registry. docs/metrics.md explains each one."""

import platform
import re
import time
from collections.abc import Callable

from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector

from whaled import __version__
from whaled.eventlog.meters import EventLogMeter
from whaled.ops.client_meters import GatewayMeter
from whaled.ops.daemon_meters import (
    CanaryMeter,
    ConfigMeter,
    KeyMeter,
    LoopMeter,
    MemoryMeter,
    StartMeter,
)
from whaled.ops.http_meters import HttpMeter
from whaled.ops.upstream_meters import BackfillMeter, DetectionMeter, UpstreamMeter
from whaled.registry import Registry
from whaled.web.exposition import Format


class _ProcessCollector(ProcessCollector):
    """The library's process collector, with the boot time from the clock.

    The original reads it from /proc/stat, and exports nothing if ProcSubset=pid hides that file.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Metrics:
    """The registry and the meters that feed it."""

    def __init__(self) -> None:
        registry = Registry()
        self._registry = registry
        self.registry = registry.collectors
        _ProcessCollector(registry=self.registry)
        info = registry.gauge(
            "build_info", "Always 1; the labels are the versions of whaled and Python.", ("version", "python")
        )
        info.labels(version=__version__, python=platform.python_version()).set(1)
        self.upstream = UpstreamMeter(registry)
        self.detection = DetectionMeter(registry)
        self.eventlog = EventLogMeter(registry)
        self.gateway = GatewayMeter(registry)
        self.config = ConfigMeter(registry)
        self.starts = StartMeter(registry)
        self.canary = CanaryMeter(registry)
        self.loop = LoopMeter(registry)
        self.memory = MemoryMeter(registry)
        self.keys = KeyMeter(registry)
        self.backfill = BackfillMeter(registry)
        self.http = HttpMeter(registry)

    def gauge_of(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Register a gauge whose value is read at each rendering."""
        self._registry.gauge_of(name, text, value)

    def counter_of(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Register a counter whose value is read at each rendering."""
        self._registry.counter_of(name, text, value)

    def render(self, chosen: Format = Format.PROMETHEUS) -> bytes:
        """Return all metrics in one of Prometheus' text formats."""
        if chosen is Format.OPENMETRICS:
            rendered: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]  # the library's own function has no annotations
            # A histogram with negative buckets has no sum, and OpenMetrics allows a count only together with a sum.
            for name in self._registry.signed_histograms:
                rendered = re.sub(rb"^%s_count .*\n" % name.encode(), b"", rendered, flags=re.MULTILINE)
            return rendered
        return generate_latest(self.registry)
