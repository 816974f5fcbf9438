import math

from whaled.auth.meters import CredentialMeter
from whaled.auth.ring import KeyRing, SigningKey
from whaled.registry import Registry


def test_what_is_shown_of_credentials_follows_what_was_loaded() -> None:
    registry = Registry()
    value = registry.collectors.get_sample_value
    meter = CredentialMeter(registry)
    assert value("whaled_certificate_expiry_timestamp_seconds") == math.inf
    meter.ring(None)
    assert (value("whaled_authentication_disabled"), value("whaled_signing_keys")) == (1, 0)
    newest, older = (SigningKey(kid=kid, secret=b"s" * 32, created_at=at) for kid, at in (("b", 20.0), ("a", 10.0)))
    meter.ring(KeyRing(newest, (newest, older)))
    meter.certificate(30.0)
    assert value("whaled_authentication_disabled") == 0
    assert value("whaled_signing_keys") == 2
    assert value("whaled_signing_key_created_timestamp_seconds") == 20
    assert value("whaled_certificate_expiry_timestamp_seconds") == 30
