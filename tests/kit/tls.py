"""The certificate of the `certificate` fixture, from the server's side."""

import ssl
from pathlib import Path

Certificate = tuple[Path, Path, ssl.SSLContext]


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """Return the server's context of a certificate of the fixture."""
    return context_of(*certificate[:2])


def context_of(chain: Path, key: Path) -> ssl.SSLContext:
    """Return a server's context for a chain and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return context
