"""The TLS certificate of the server: loading it, replacing it at a reload, and its expiry."""

import ssl

from whaled.config.sections import TlsSettings
from whaled.errors import ConfigError, Fault


def tls_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """Return the TLS context of the server, None if TLS is off. Raises ConfigError."""
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: TlsSettings) -> None:
    """Load a certificate into a context, for use from the next handshake on.

    Raises ConfigError; the old certificate then stays in use.
    """
    if settings.certificate is None or settings.private_key is None:
        raise ConfigError((Fault("gateway.tls", "needs both `certificate` and `private_key`"),))
    try:
        # A scratch context comes first: loading a key that does not match leaves a context half changed.
        for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            target.load_cert_chain(settings.certificate, settings.private_key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        problem = f"cannot use {settings.certificate} with {settings.private_key}: {error}"
        raise ConfigError((Fault("gateway.tls", problem),)) from error


def certificate_expiry(path: str) -> float:
    """Return the expiry of the first certificate in a PEM file (Unix seconds). Raises ConfigError."""
    try:
        # The only certificate parser in the standard library. It is private, but as old as ssl itself; the public way
        # needs a handshake. Without it, operators would learn of an expiry only from their clients.
        decoded = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]  # noqa: SLF001
        return float(ssl.cert_time_to_seconds(decoded["notAfter"]))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError((Fault("gateway.tls.certificate", f"cannot read {path}: {error}"),)) from error


def _no_passphrase() -> str:
    """Raise ValueError for an encrypted key. It replaces OpenSSL's prompt, because a daemon has no terminal."""
    raise ValueError("the private key has a passphrase; whaled needs one without, readable by its user only")
