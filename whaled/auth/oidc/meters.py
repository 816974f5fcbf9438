"""The metrics of issuers. docs/metrics.md explains each one."""

from whaled.registry import Registry


class IssuerMeter:
    """The metrics of the key sets, by the name of the issuer in the configuration."""

    def __init__(self, registry: Registry) -> None:
        self._fetches = registry.counter("issuer_key_fetches", "Key sets fetched from an issuer.", "issuer")
        self._failures = registry.counter(
            "issuer_key_fetch_failures", "Failed attempts to fetch the key set of an issuer.", "issuer"
        )
        self._keys = registry.gauge("issuer_keys", "Usable keys of an issuer.", ("issuer",))
        self._fetched = registry.gauge(
            "issuer_keys_fetched_timestamp_seconds",
            "Time of the last successful fetch; 0 if there was none.",
            ("issuer",),
        )
        self._series = (self._fetches, self._failures, self._keys, self._fetched)
        # A fetch may end just after its issuer was removed, and must not create the series again.
        self._configured: set[str] = set()

    def begins(self, issuer: str) -> None:
        """Create the series of an issuer, at 0."""
        self._configured.add(issuer)
        for metric in self._series:
            metric.labels(issuer)

    def ends(self, issuer: str) -> None:
        """Remove the series of an issuer that is no longer configured: an alert about it would never end."""
        self._configured.discard(issuer)
        for metric in self._series:
            metric.remove(issuer)

    def fetched(self, issuer: str, keys: int, now: float) -> None:
        """Count a successful fetch."""
        if issuer in self._configured:
            self._fetches.labels(issuer).inc()
            self._keys.labels(issuer).set(keys)
            self._fetched.labels(issuer).set(now)

    def failed(self, issuer: str) -> None:
        """Count a failed fetch."""
        if issuer in self._configured:
            self._failures.labels(issuer).inc()
