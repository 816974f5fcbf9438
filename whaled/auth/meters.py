"""The metrics of credentials. docs/metrics.md explains each one."""

import math

from whaled.auth.tokens import KeyRing
from whaled.registry import Registry


class CredentialMeter:
    """The metrics of authentication, the signing keys and the TLS certificate, as last loaded."""

    def __init__(self, registry: Registry) -> None:
        self._disabled = registry.gauge("authentication_disabled", "1 while clients need no credential.")
        self._created = registry.gauge(
            "signing_key_created_timestamp_seconds", "Creation time of the signing key; 0 if unknown or none."
        )
        self._keys = registry.gauge("signing_keys", "Keys whose tokens are accepted.")
        self._expiry = registry.gauge(
            "certificate_expiry_timestamp_seconds", "Expiry time of the TLS certificate; +Inf without TLS."
        )
        self._expiry.set(math.inf)

    def ring(self, ring: KeyRing | None) -> None:
        """Set the number of keys and the creation time of the signing key. None: authentication is disabled."""
        self._disabled.set(ring is None)
        if ring is not None:
            self._keys.set(len(ring.verifying))
            self._created.set(ring.signing.created_at)

    def certificate(self, expires_at: float) -> None:
        """Set the expiry time of the certificate."""
        self._expiry.set(expires_at)


class AccessMeter:
    """The metrics of the access database: revocations, the register of issued tokens, the audit log."""

    def __init__(self, registry: Registry) -> None:
        self._revocations = registry.gauge("token_revocations", "Revocations in force.")
        self._records = registry.gauge("audit_records", "Records in the audit log.")
        self._failures = registry.counter("access_failures", "Failed accesses to the access database.")
        self._lost = registry.counter(
            "token_register_lost", "Issued tokens that are not, or no longer, in the register before their expiry."
        )

    def held(self, revocations: int) -> None:
        """Set the number of revocations."""
        self._revocations.set(revocations)

    def recorded(self, records: int) -> None:
        """Set the number of records in the audit log."""
        self._records.set(records)

    def failed(self) -> None:
        """Count a failed access."""
        self._failures.inc()

    def lost(self, number: int = 1) -> None:
        """Count tokens that the register lacks."""
        self._lost.inc(number)


class ApiKeyMeter:
    """The metrics of API keys."""

    def __init__(self, registry: Registry) -> None:
        self._keys = registry.gauge("api_keys", "API keys that are neither expired nor revoked.")

    def loaded(self, keys: int) -> None:
        """Set the number of keys that are accepted."""
        self._keys.set(keys)
