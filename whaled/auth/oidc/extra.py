"""The extra `whaled[oidc]`: the package for signatures with public keys. Pure."""

from collections.abc import Mapping

from jwt.algorithms import has_crypto

from whaled.config.issuers import ISSUERS
from whaled.config.sections import AuthSettings
from whaled.errors import ConfigError, Fault


def check_package(auth: AuthSettings, origins: Mapping[str, str]) -> None:
    """Raise ConfigError if an issuer is configured and the package for public keys is not installed."""
    if auth.issuers and not has_crypto:
        problem = "needs the package cryptography: install `whaled[oidc]`, or remove the issuers"
        raise ConfigError((Fault(ISSUERS, problem, origins.get(ISSUERS, "")),))
