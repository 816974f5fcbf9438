"""The certificate of the `certificate` fixture, from the server's side."""

import ssl
from pathlib import Path

Certificate = tuple[Path, Path, ssl.SSLContext]


def server_context(certificate: Certificate) -> ssl.SSLContext:
    chain, key, _ = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return context
