"""The metrics of credentials. docs/metrics.md explains each one."""

import math
import time

from whaled.auth.ring import KeyRing
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
            # Read at each rendering: a rotated key leaves the ring by itself.
            self._keys.set_function(lambda: len(ring.at(time.time()).verifying))
            self._created.set(ring.signing.created_at)

    def certificate(self, expires_at: float) -> None:
        """Set the expiry time of the certificate."""
        self._expiry.set(expires_at)
