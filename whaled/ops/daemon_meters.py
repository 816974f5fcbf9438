"""The metrics of the daemon itself: configuration, canaries, memory, keys. docs/metrics.md explains them."""

import math

from whaled.errors import BookFailure, CanaryFailure
from whaled.model import Ending
from whaled.registry import Component, Registry


class ConfigMeter:
    """The metrics of reloads and the address book."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.CONFIG)
        self._successful = registry.gauge("config_last_reload_successful", "1 if the last reload was applied.")
        self._successful.set(1)
        self._at = registry.gauge(
            "config_last_reload_success_timestamp_seconds", "Time at which the current configuration was applied."
        )
        self._at.set_to_current_time()
        self._books_refused = registry.counter(
            "address_books_refused", "Reloads refused because of the address book, by reason.", "reason", BookFailure
        )
        self._book_at = registry.gauge(
            "address_book_read_timestamp_seconds",
            "Time at which the current address book was read; 0 without one.",
        )

    def reloaded(self, now: float, *, success: bool) -> None:
        """Record a reload that was applied or refused."""
        self._successful.set(success)
        if success:
            self._at.set(now)
        else:
            self._errors.inc()

    def book_refused(self, reason: BookFailure) -> None:
        """Count a reload that was refused because of its address book."""
        self._books_refused.labels(reason).inc()

    def book_read(self, now: float) -> None:
        """Set the time at which the current address book was read."""
        self._book_at.set(now)


class StartMeter:
    """The metric of starts of the daemon, including those of earlier runs."""

    def __init__(self, registry: Registry) -> None:
        self._starts = registry.counter(
            "starts", "Starts since the event log was created, by how the previous run ended.", "after", Ending
        )

    def started(self, ending: Ending, count: int = 1) -> None:
        """Count starts after a run that ended this way. `count` is above 1 for those of earlier runs."""
        self._starts.labels(ending).inc(count)


class CanaryMeter:
    """The metrics of canaries, whaled's own transactions, which are the service-level indicator."""

    def __init__(self, registry: Registry) -> None:
        self._sent = registry.counter("canaries_sent", "Canaries started.")
        self._failed = registry.counter(
            "canaries_failed",
            "Canaries that did not arrive in time or met an error, by reason.",
            "reason",
            CanaryFailure,
        )
        self._connect_seconds = registry.histogram(
            "canary_connect_seconds", "Time from the connect of a canary's connection to its welcome."
        )
        self._unreachable = registry.counter(
            "canary_connects_failed", "Failed attempts to open a connection for canaries in time."
        )
        self._seconds = registry.histogram(
            "canary_seconds", "Time from a canary's frame to its arrival at its client, for those in time."
        )
        self._last = registry.gauge("last_canary_timestamp_seconds", "Arrival time of the last canary.")

    def connected(self, seconds: float) -> None:
        """Record a new connection for canaries."""
        self._connect_seconds.observe(seconds)

    def sent(self) -> None:
        """Count a started canary."""
        self._sent.inc()

    def unreachable(self) -> None:
        """Count a failed attempt to open a connection for canaries in time."""
        self._unreachable.inc()

    def arrived(self, seconds: float, at: float) -> None:
        """Record a canary that arrived in time."""
        self._seconds.observe(seconds)
        self._last.set(at)

    def arrived_late(self, at: float) -> None:
        """Record the arrival of a canary that has already been counted as late."""
        self._last.set(at)

    def failed(self, reason: CanaryFailure) -> None:
        """Count a canary that did not arrive in time or met an error."""
        self._failed.labels(reason).inc()


class LoopMeter:
    """The metric of the event loop."""

    def __init__(self, registry: Registry) -> None:
        self._lag = registry.histogram("event_loop_lag_seconds", "Delay of a timer of the event loop.")

    def lagged(self, seconds: float) -> None:
        """Record the delay of a timer."""
        self._lag.observe(seconds)


class MemoryMeter:
    """The metrics of memory."""

    def __init__(self, registry: Registry) -> None:
        self._used = registry.gauge(
            "memory_used_bytes", "Working set of the cgroup if that has a limit, else resident memory."
        )
        self._limit = registry.gauge(
            "memory_limit_bytes", "memory.limit or the limit of the cgroup, the lower one; +Inf without either."
        )
        self._shedding = registry.gauge("memory_shedding", "1 while load is shed to save memory.")

    def observed(self, used_bytes: int, limit_bytes: float, *, is_shedding: bool) -> None:
        """Set the used memory, its limit, and whether load is shed."""
        self._used.set(used_bytes)
        self._limit.set(limit_bytes)
        self._shedding.set(is_shedding)


class KeyMeter:
    """The metrics of the signing keys and the TLS certificate, as last loaded."""

    def __init__(self, registry: Registry) -> None:
        self._created = registry.gauge(
            "signing_key_created_timestamp_seconds", "Creation time of the signing key; 0 if unknown or none."
        )
        self._keys = registry.gauge("signing_keys", "Keys whose tokens are accepted.")
        self._expiry = registry.gauge(
            "certificate_expiry_timestamp_seconds", "Expiry time of the TLS certificate; +Inf without TLS."
        )
        self._expiry.set(math.inf)

    def ring(self, keys: int, created_at: float) -> None:
        """Set the number of keys and the creation time of the signing key."""
        self._keys.set(keys)
        self._created.set(created_at)

    def certificate(self, expires_at: float) -> None:
        """Set the expiry time of the certificate."""
        self._expiry.set(expires_at)
