"""The metrics of reloads and of the address book. docs/metrics.md explains each one."""

from whaled.errors import BookFailure
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
