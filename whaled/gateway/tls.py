"""TLS of one client connection, fed a few bytes at a time.

OpenSSL reads from a socket until it has application data: a client that sends only key updates would keep one call busy
for as long as it sends, and a handshake message of 64 KiB would keep OpenSSL comparing lists for 100 ms. OpenSSL
therefore gets no socket, only the bytes that one job has read, and a client that sends too many bytes without
application data is cut off.
"""

import contextlib
import ssl
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# One call returns at most this many bytes: in a flood of empty frames that is a hundred, which take 2 ms to parse.
READ_BYTES = 512
# The most bytes of a client's handshake. With post-quantum keys, a ticket and a second hello it sends about 4 KiB.
HANDSHAKE_BYTES = 8 * 1024
# The most bytes without application data: the largest record has 16 KiB, and a key update 27 bytes.
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
    """TLS with this client has failed. `reason` is one of TLS_REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Tls:
    """The server's end of TLS. After every call, `output` returns the bytes to send."""

    __slots__ = ("_incoming", "_object", "_output", "_quiet_bytes", "is_agreed")

    # One buffer for all connections, emptied by `_run`: a buffer keeps the size of its largest message.
    _outgoing = ssl.MemoryBIO()

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._output = b""
        self._quiet_bytes = 0
        self.is_agreed = False

    def feed(self, data: bytes) -> None:
        """Take received bytes. Raises TlsError if there are too many without application data."""
        self._quiet_bytes += len(data)
        if self._quiet_bytes > (IDLE_BYTES if self.is_agreed else HANDSHAKE_BYTES):
            raise TlsError(TOO_MANY_BYTES)
        self._incoming.write(data)

    @property
    def has_more(self) -> bool:
        """True if bytes that were fed have not been read yet."""
        return bool(self._incoming.pending or self._object.pending())

    def agree(self) -> bool:
        """Continue the handshake. Return True once it is complete. Raises TlsError."""
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
        """Return at most READ_BYTES of application data.

        Return b"" at the end of the stream, and None if more bytes must be fed first. Raises TlsError.
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
        """Return application data encrypted, ready to send. Raises TlsError."""
        try:
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    sent += self._run(self._object.write, view[sent:])
        except ssl.SSLError:
            raise TlsError(OTHER) from None
        return self.output()

    def end(self) -> bytes:
        """Return the last bytes to send, which close TLS."""
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._run(self._object.unwrap)  # does not wait for the client's close_notify
        return self.output()

    def output(self) -> bytes:
        """Return the bytes to send: parts of the handshake, alerts, answers to key updates."""
        output, self._output = self._output, b""
        return output

    def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        finally:
            if self._outgoing.pending:
                self._output += self._outgoing.read()
