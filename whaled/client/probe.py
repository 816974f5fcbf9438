"""Probe a port that did not respond as a WebSocket server, to find out which protocol it speaks. Sends nothing secret.

Used only for a stream that has never connected: a wrong URL should be reported, whereas an outage only needs patience.
"""

import asyncio
import contextlib
import ssl

from msgspec import Struct

# Timeouts for a service's greeting, and for its response to a plain HTTP request or a TLS handshake.
GREETING_S = 0.5
ANSWER_S = 2.0
# At most this much of a response is read, and quoted.
READ_BYTES = 256
QUOTED_CHARACTERS = 40
# First bytes of services that greet, or of their responses to a plain HTTP request.
_SERVICES = (
    (b"SSH-", "SSH"),
    (b"220", "SMTP or FTP"),
    (b"* OK", "IMAP"),
    (b"+OK", "POP3"),
    (b"RFB ", "VNC"),
    (b"-ERR", "the protocol of Redis"),
    (b"HTTP/1.0", "HTTP/1.0, which has no WebSocket (a proxy must use HTTP/1.1)"),
)


class Greeting(Struct, frozen=True):
    """The bytes that a port sent to a plain TCP client. Empty with `is_open`: it accepted the connection silently."""

    is_open: bool
    received: bytes = b""

    @property
    def is_http(self) -> bool:
        """Return whether the port speaks HTTP, with or without WebSocket."""
        return self.received.startswith(b"HTTP/")

    @property
    def service(self) -> str | None:
        """Return the name of the protocol, None if the port sent nothing or speaks HTTP/1.1."""
        for start, name in _SERVICES:
            if self.received.startswith(start):
                return name
        if not self.received or self.is_http:
            return None
        line = self.received.split(b"\n", maxsplit=1)[0].decode("latin-1").strip()[:QUOTED_CHARACTERS]
        return f"something else ({line!a})"


async def listen(host: str, port: int) -> Greeting:
    """Read the port's greeting or, if it sends none, its response to a plain HTTP request."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, UnicodeError):
        return Greeting(is_open=False)
    try:
        received = await _read(reader, GREETING_S)
        if not received and not reader.at_eof():
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            received = await _read(reader, ANSWER_S)
        return Greeting(is_open=True, received=received)
    finally:
        writer.transport.abort()


async def speaks_tls(host: str, port: int) -> bool:
    """Return whether the port responds to a TLS handshake, with any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # safe: nothing is sent over this connection
    try:
        async with asyncio.timeout(ANSWER_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        return "_ALERT_" in (error.reason or "")  # an alert is TLS: the server rejects this handshake's parameters
    except (OSError, UnicodeError):
        return False
    writer.transport.abort()
    return True


async def _read(reader: asyncio.StreamReader, timeout_s: float) -> bytes:
    with contextlib.suppress(OSError):  # includes TimeoutError
        async with asyncio.timeout(timeout_s):
            return await reader.read(READ_BYTES)
    return b""
