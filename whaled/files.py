"""Files that the configuration names, read and understood. Every fault is the operator's and names the key."""

import ssl
from pathlib import Path

from whaled.config.sections import Detection, Tls
from whaled.errors import ConfigError, Fault
from whaled.whales import watch
from whaled.whales.labels import AddressBook


def read_address_book(settings: Detection) -> AddressBook:
    """The operator's address book, empty where none is configured.

    Raises ConfigError, also for a watch rule with a label that is not in the book.
    """
    if settings.address_book is None:
        return AddressBook()
    path = Path(settings.address_book)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError((Fault("detection.address_book", f"cannot read {path}: {error}"),)) from error
    book = AddressBook.parse(text, str(path))
    unknown = tuple(watch.faults(settings.watch, book, str(path)))
    if unknown:
        raise ConfigError(unknown)
    return book


def tls_context(settings: Tls) -> ssl.SSLContext | None:
    """The server's TLS, None where it is off. Raises ConfigError."""
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: Tls) -> None:
    """Use this certificate from the next handshake on. Raises ConfigError; the old one stays then."""
    if settings.certificate is None or settings.private_key is None:
        raise ConfigError((Fault("gateway.tls", "needs both `certificate` and `private_key`"),))
    try:
        # Into a context of its own first: loading a key that does not fit leaves a context half changed.
        for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            target.load_cert_chain(settings.certificate, settings.private_key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        problem = f"cannot use {settings.certificate} with {settings.private_key}: {error}"
        raise ConfigError((Fault("gateway.tls", problem),)) from error


def certificate_expiry(path: str) -> float:
    """When the first certificate of a PEM file ends (Unix seconds). Raises ConfigError."""
    try:
        # The only reader of certificates in the standard library. It is private and as old as ssl itself; its public
        # way needs a handshake. Without it the operator would hear of an expiry from his clients.
        decoded = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]  # noqa: SLF001
        return float(ssl.cert_time_to_seconds(decoded["notAfter"]))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError((Fault("gateway.tls.certificate", f"cannot read {path}: {error}"),)) from error


def _no_passphrase() -> str:
    """Called for an encrypted key, instead of OpenSSL's prompt: a daemon has nobody to ask."""
    raise ValueError("the private key has a passphrase; whaled needs one without, readable by its user only")
