"""What is counted of the daemon itself: log, configuration, health. docs/metrics.md explains each metric."""

import math

from whaled.errors import BookFailure, CanaryFailure, LogFailure
from whaled.model import Ending
from whaled.ops.registry import Component, Registry


class EventLogMeter:
    """The event log: commits, failures, size."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.EVENTLOG)
        self._events = registry.counter("eventlog_events", "Events committed.")
        self._commit = registry.histogram(
            "eventlog_commit_seconds", "Time of a commit with new events, fsync included."
        )
        self._failures = registry.counter("eventlog_failures", "Failed operations by reason.", "reason", LogFailure)
        self._pruned = registry.counter("eventlog_pruned_events", "Events removed by retention.")
        self._damaged = registry.gauge("eventlog_damaged_rows", "Damaged rows that are known, and skipped.")
        self._size = registry.gauge("eventlog_size_bytes", "Database and write-ahead log on disk.")

    def committed(self, events: int, seconds: float) -> None:
        """A transaction with new events was stored."""
        self._events.inc(events)
        self._commit.observe(seconds)

    def failed(self, reason: LogFailure) -> None:
        """An operation failed."""
        self._failures.labels(reason).inc()
        self._errors.inc()

    def pruned(self, events: int) -> None:
        """Retention removed events."""
        self._pruned.inc(events)

    def damaged(self, rows: int) -> None:
        """How many damaged rows are known."""
        self._damaged.set(rows)

    def size(self, size_bytes: int) -> None:
        """What database and write-ahead log take on disk."""
        self._size.set(size_bytes)


class ConfigMeter:
    """Reloads."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.CONFIG)
        self._successful = registry.gauge("config_last_reload_successful", "1 if the last reload was applied.")
        self._successful.set(1)
        self._at = registry.gauge("config_last_reload_success_timestamp_seconds", "When a configuration was applied.")
        self._at.set_to_current_time()
        self._books_refused = registry.counter(
            "address_books_refused", "Reloads that the address book was the reason to refuse.", "reason", BookFailure
        )
        self._book_at = registry.gauge(
            "address_book_read_timestamp_seconds", "When the address book in force was read; 0 without one."
        )

    def reloaded(self, now: float, *, success: bool) -> None:
        """A reload was applied or refused."""
        self._successful.set(success)
        if success:
            self._at.set(now)
        else:
            self._errors.inc()

    def book_refused(self, reason: BookFailure) -> None:
        """A reload was refused for its address book."""
        self._books_refused.labels(reason).inc()

    def book_read(self, now: float) -> None:
        """An address book came into force."""
        self._book_at.set(now)


class StartMeter:
    """Starts of the daemon, those of earlier runs included."""

    def __init__(self, registry: Registry) -> None:
        self._starts = registry.counter(
            "starts", "Starts since the event log was made, by how the run before ended.", "after", Ending
        )

    def started(self, ending: Ending, count: int = 1) -> None:
        """A start after a run that ended so; more than one are those of earlier runs."""
        self._starts.labels(ending).inc(count)


class CanaryMeter:
    """whaled's own transactions: the service-level indicator."""

    def __init__(self, registry: Registry) -> None:
        self._sent = registry.counter("canaries_sent", "Canaries started.")
        self._failed = registry.counter(
            "canaries_failed",
            "Canaries that did not arrive in time, or broke on the way.",
            "reason",
            CanaryFailure,
        )
        self._connect_seconds = registry.histogram(
            "canary_connect_seconds", "From the connect of a canary's connection to its welcome."
        )
        self._unreachable = registry.counter(
            "canary_connects_failed", "Times that no connection for canaries could be made in time."
        )
        self._seconds = registry.histogram(
            "canary_seconds", "From a canary's frame to its arrival at its client, in time."
        )
        self._last = registry.gauge("last_canary_timestamp_seconds", "When the last canary arrived.")

    def connected(self, seconds: float) -> None:
        """A connection for canaries was made."""
        self._connect_seconds.observe(seconds)

    def sent(self) -> None:
        """A canary was started."""
        self._sent.inc()

    def unreachable(self) -> None:
        """No connection for canaries could be made in time."""
        self._unreachable.inc()

    def arrived(self, seconds: float, at: float) -> None:
        """A canary arrived in time."""
        self._seconds.observe(seconds)
        self._last.set(at)

    def arrived_late(self, at: float) -> None:
        """A canary arrived that has been counted as late."""
        self._last.set(at)

    def failed(self, reason: CanaryFailure) -> None:
        """A canary did not arrive in time, or broke on the way."""
        self._failed.labels(reason).inc()


class LoopMeter:
    """The event loop."""

    def __init__(self, registry: Registry) -> None:
        self._lag = registry.histogram("event_loop_lag_seconds", "How late a timer of the event loop fires.")

    def lagged(self, seconds: float) -> None:
        """A timer fired so late."""
        self._lag.observe(seconds)


class MemoryMeter:
    """Memory, and whether load is shed for it."""

    def __init__(self, registry: Registry) -> None:
        self._used = registry.gauge("memory_used_bytes", "Working set of the limited cgroup, else resident memory.")
        self._limit = registry.gauge("memory_limit_bytes", "memory.limit, or the cgroup's; +Inf without one.")
        self._shedding = registry.gauge("memory_shedding", "1 while load is shed.")

    def observed(self, used_bytes: int, limit_bytes: float, *, is_shedding: bool) -> None:
        """How much is used of how much."""
        self._used.set(used_bytes)
        self._limit.set(limit_bytes)
        self._shedding.set(is_shedding)


class KeyMeter:
    """Signing keys and the certificate, as loaded last."""

    def __init__(self, registry: Registry) -> None:
        self._created = registry.gauge(
            "signing_key_created_timestamp_seconds", "When the key that signs was made; 0 if unknown or none."
        )
        self._keys = registry.gauge("signing_keys", "Keys whose tokens are accepted.")
        self._expiry = registry.gauge(
            "certificate_expiry_timestamp_seconds", "When the TLS certificate ends; +Inf without TLS."
        )
        self._expiry.set(math.inf)

    def ring(self, keys: int, created_at: float) -> None:
        """The ring in force."""
        self._keys.set(keys)
        self._created.set(created_at)

    def certificate(self, expires_at: float) -> None:
        """The certificate in force."""
        self._expiry.set(expires_at)
