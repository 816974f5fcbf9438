"""A second look at a port that is no WebSocket server: what does it speak? Nothing secret is sent.

Only for a stream that never worked: a mistake in the URL should be named, an outage only be waited for.
"""

import asyncio
import contextlib
import ssl

from msgspec import Struct

# How long a service may take to greet, then to answer a plain HTTP request, then a TLS handshake.
GREETING_S = 0.5
ANSWER_S = 2.0
# How much of what a port says is read.
READ_BYTES = 256
QUOTED_CHARACTERS = 40
# How services greet that speak first, or what they answer to a plain HTTP request.
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
    """What a port said to a client that speaks no TLS: nothing (`is_open`), or these bytes."""

    is_open: bool
    received: bytes = b""

    @property
    def is_http(self) -> bool:
        """Whether it is a web server, WebSocket or not."""
        return self.received.startswith(b"HTTP/")

    @property
    def service(self) -> str | None:
        """The name of what it speaks, None where it said nothing or plain HTTP/1.1."""
        for start, name in _SERVICES:
            if self.received.startswith(start):
                return name
        if not self.received or self.is_http:
            return None
        line = self.received.split(b"\n", maxsplit=1)[0].decode("latin-1").strip()[:QUOTED_CHARACTERS]
        return f"something else ({line!a})"


async def listen(host: str, port: int) -> Greeting:
    """What the port says by itself, else to a plain HTTP request."""
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
    """Whether the port answers a TLS handshake, with whatever certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent over it
    try:
        async with asyncio.timeout(ANSWER_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        return "_ALERT_" in (error.reason or "")  # it does, and wants something else
    except (OSError, UnicodeError):
        return False
    writer.transport.abort()
    return True


async def _read(reader: asyncio.StreamReader, timeout_s: float) -> bytes:
    with contextlib.suppress(OSError):  # TimeoutError too
        async with asyncio.timeout(timeout_s):
            return await reader.read(READ_BYTES)
    return b""
