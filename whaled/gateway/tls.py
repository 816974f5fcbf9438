"""TLS of one client connection, given a few bytes at a time.

OpenSSL reads a socket until it has application data: a client that sends only key updates keeps one call busy for as
long as it sends, and a handshake message of 64 KiB keeps it comparing lists for a tenth of a second. So it does not get
the socket. It gets what one job read, and a client that sends much without saying anything is given up.
"""

import contextlib
import ssl
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# One call returns so much: a hundred empty frames of a flood, which take 2 ms to parse.
READ_BYTES = 512
# The bytes of a client's handshake. With post-quantum keys, ticket and a second hello it sends some 4 KiB.
HANDSHAKE_BYTES = 8 * 1024
# Received without application data: the largest record has 16 KiB, and a key update 27 bytes.
IDLE_BYTES = 32 * 1024
# OpenSSL's reasons (SSLError.reason) that are counted under their own name; everything else is `other`.
NAMED_REASONS = frozenset({
    "HTTPS_PROXY_REQUEST", "HTTP_REQUEST", "NO_SHARED_CIPHER", "NO_SUITABLE_SIGNATURE_ALGORITHM",
    "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_PROTOCOL_VERSION", "TLSV1_ALERT_UNKNOWN_CA",
    "UNEXPECTED_EOF_WHILE_READING", "UNEXPECTED_MESSAGE", "UNSUPPORTED_PROTOCOL", "WRONG_VERSION_NUMBER",
})  # fmt: skip
TOO_MANY_BYTES, CONNECTION_LOST, OTHER = "too_many_bytes", "connection_lost", "other"
TLS_REASONS = (*NAMED_REASONS, TOO_MANY_BYTES, CONNECTION_LOST, OTHER)
HANDSHAKE_RECORD: Final = 0x16  # the type of a record (RFC 8446, 5.1)
EXPECTED = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"
    b"this port speaks TLS: connect with wss://\n"
)


class TlsError(Exception):
    """TLS is not to be had with this client. `reason` is one of TLS_REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Tls:
    """The server's end. Whatever it does, `output` has the bytes that are to be sent after it."""

    __slots__ = ("_incoming", "_object", "_output", "_quiet_bytes", "is_agreed")

    # One for all, emptied by `_run`: each would keep the size of the largest message that it ever had.
    _outgoing = ssl.MemoryBIO()

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._output = b""
        self._quiet_bytes = 0
        self.is_agreed = False

    def feed(self, data: bytes) -> None:
        """Take what was received. Raises TlsError where it is too much without application data."""
        self._quiet_bytes += len(data)
        if self._quiet_bytes > (IDLE_BYTES if self.is_agreed else HANDSHAKE_BYTES):
            raise TlsError(TOO_MANY_BYTES)
        self._incoming.write(data)

    @property
    def has_more(self) -> bool:
        """Whether something that was fed has not been read yet."""
        return bool(self._incoming.pending or self._object.pending())

    def agree(self) -> bool:
        """Go on with the handshake; True once it is over. Raises TlsError."""
        try:
            self._run(self._object.do_handshake)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise TlsError(error.reason if error.reason in NAMED_REASONS else OTHER) from None
        self.is_agreed = True
        self._quiet_bytes = 0
        return True

    def read(self) -> bytes | None:
        """READ_BYTES of application data at most; empty at the end of the stream, None where more has to be fed first.
        Raises TlsError.
        """
        try:
            data = self._run(self._object.read, READ_BYTES)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError:
            raise TlsError(OTHER) from None
        self._quiet_bytes = 0
        return data

    def encrypt(self, data: bytes) -> bytes:
        """Application data as it is to be sent. Raises TlsError."""
        try:
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    sent += self._run(self._object.write, view[sent:])
        except ssl.SSLError:
            raise TlsError(OTHER) from None
        return self.output()

    def end(self) -> bytes:
        """The last that is to be sent."""
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._run(self._object.unwrap)  # the client's own end is not waited for
        return self.output()

    def output(self) -> bytes:
        """The bytes that are to be sent: parts of the handshake, alerts, answers to key updates."""
        output, self._output = self._output, b""
        return output

    def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        finally:
            if self._outgoing.pending:
                self._output += self._outgoing.read()
