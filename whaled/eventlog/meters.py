"""The metrics of the event log. docs/metrics.md explains each one."""

import shutil
from pathlib import Path

from whaled.errors import LogFailure
from whaled.registry import Component, Registry


class EventLogMeter:
    """The metrics of commits, failures, retention and the database file. Used on the event loop only.

    `head` and `oldest` are gauges that the open log connects to its offsets.
    """

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.EVENTLOG)
        self._events = registry.counter("eventlog_events", "Events committed.")
        self._commit = registry.histogram(
            "eventlog_commit_seconds", "Time of a commit with new events, including fsync."
        )
        self._failures = registry.counter(
            "eventlog_failures", "Failed operations of the event log, by reason.", "reason", LogFailure
        )
        self._pruned = registry.counter("eventlog_pruned_events", "Events removed by retention.")
        self._damaged = registry.gauge("eventlog_damaged_rows", "Known damaged rows, which are skipped.")
        self._size = registry.gauge("eventlog_size_bytes", "Size of the database and its write-ahead log on disk.")
        self.head = registry.gauge("eventlog_head_offset", "Newest offset committed.")
        self.oldest = registry.gauge("eventlog_oldest_offset", "Oldest offset held.")
        self._disk_free = registry.gauge("eventlog_disk_free_bytes", "Free on the event log's file system.")
        self._disk_size = registry.gauge("eventlog_disk_size_bytes", "Size of that file system.")

    def committed(self, events: int, seconds: float) -> None:
        """Count a commit with new events; `seconds` includes the fsync."""
        self._events.inc(events)
        self._commit.observe(seconds)

    def failed(self, reason: LogFailure) -> None:
        """Count a failed operation."""
        self._failures.labels(reason).inc()
        self._errors.inc()

    def pruned(self, events: int) -> None:
        """Count events that retention removed."""
        self._pruned.inc(events)

    def damaged(self, rows: int) -> None:
        """Set the number of known damaged rows, which readers skip."""
        self._damaged.set(rows)

    def size(self, size_bytes: int) -> None:
        """Set the size of the database and its write-ahead log on disk."""
        self._size.set(size_bytes)

    def directory(self, path: Path) -> None:
        """Measure the file system of this directory at each rendering."""
        self._disk_free.set_function(lambda: shutil.disk_usage(path).free)
        self._disk_size.set_function(lambda: shutil.disk_usage(path).total)
