"""The metrics of the process and of log output. docs/metrics.md explains each one."""

import platform
import time

from prometheus_client.process_collector import ProcessCollector

from whaled import __version__
from whaled.ops.logs import lost_entries
from whaled.registry import Registry


class _ProcessCollector(ProcessCollector):
    """The library's process collector, with the boot time from the clock.

    The original reads it from /proc/stat, and exports nothing if ProcSubset=pid hides that file.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def register(registry: Registry) -> None:
    """Register the metrics of the process, the versions of whaled and Python, and the number of lost log entries."""
    _ProcessCollector(registry=registry.collectors)
    info = registry.gauge(
        "build_info", "Always 1; the labels are the versions of whaled and Python.", ("version", "python")
    )
    info.labels(version=__version__, python=platform.python_version()).set(1)
    registry.counter_of("log_entries_lost", "Log entries that nobody took.", lost_entries)
