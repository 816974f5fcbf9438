"""A client's socket under the event loop's share: bytes are read, decrypted and handed on in jobs, not in callbacks.

asyncio's own transports read up to 256 KiB at once and hold a buffer of that size for each TLS connection, before
anybody can count it. This one reads a slice per job, leaves the rest in the kernel, and keeps for a TLS connection what
OpenSSL keeps, 20 KiB or so.
"""

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Hashable
from typing import Protocol

from whaled.gateway.share import Lane, LoopShare

# One job reads so much: a hundred empty frames of a flood, which take 2 ms to parse.
READ_BYTES = 512
# SSL_write makes records of at most this size.
RECORD_BYTES = 16 * 1024
# After the first part of a TLS handshake: its last part, and the request, which may be in two parts.
JOBS_TO_REQUEST = 3
TLS_HANDSHAKE = b"\x16"  # the type of a record (RFC 8446, 5.1)
# OpenSSL's reasons (SSLError.reason) that are counted under their own name; everything else is `other`.
TLS_REASONS = frozenset({
    "HTTPS_PROXY_REQUEST", "HTTP_REQUEST", "NO_SHARED_CIPHER", "NO_SUITABLE_SIGNATURE_ALGORITHM",
    "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_PROTOCOL_VERSION", "TLSV1_ALERT_UNKNOWN_CA",
    "UNEXPECTED_EOF_WHILE_READING", "UNEXPECTED_MESSAGE", "UNSUPPORTED_PROTOCOL", "WRONG_VERSION_NUMBER",
})  # fmt: skip
TLS_EXPECTED = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"
    b"this port speaks TLS: connect with wss://\n"
)


class SocketOwner(Protocol):
    """The connection that a socket belongs to."""

    def connection_made(self) -> None:
        """Bytes may come and go: TLS, if any, is agreed."""
        ...

    def tls_failed(self, reason: str) -> None:
        """The TLS handshake failed; `connection_lost` follows."""
        ...

    def data_received(self, data: bytes) -> None:
        """Some bytes from the client, READ_BYTES at most."""
        ...

    def eof_received(self) -> None:
        """The client sends nothing more."""
        ...

    def connection_lost(self) -> None:
        """The socket is closed. Called once, whatever ended it, and never from within a call of the owner's."""
        ...

    def pause_writing(self) -> None:
        """Bytes are unsent."""
        ...

    def resume_writing(self) -> None:
        """Everything is sent."""
        ...


class ClientSocket:
    """One accepted socket. `lane` and `source` say whose time its jobs take; they may be changed at any time."""

    __slots__ = (
        "_ends", "_favoured", "_has_ended", "_is_agreed", "_is_closed", "_is_paused", "_is_queued", "_is_reading",
        "_is_writing", "_loop", "_owner", "_share", "_sock", "_unsent", "fd", "lane", "source",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, owner: SocketOwner, share: LoopShare, source: Hashable, tls: ssl.SSLContext | None
    ) -> None:
        """Raises OSError if the client is gone already."""
        sock.setblocking(False)
        self._sock = sock if tls is None else tls.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._share = share
        self.lane = Lane.STRANGER
        self.source = source
        self.fd = self._sock.fileno()
        self._unsent = bytearray()
        self._is_agreed = tls is None
        self._is_closed = self._is_paused = self._is_queued = self._is_reading = self._is_writing = False
        self._ends = self._has_ended = False
        self._favoured = 0

    def start(self) -> None:
        """Begin to read."""
        if self._is_agreed:
            self._owner.connection_made()
        self._read_on()

    @property
    def is_plain(self) -> bool:
        """Whether frames may be written to `fd` as they are."""
        return not isinstance(self._sock, ssl.SSLSocket)

    @property
    def is_agreed(self) -> bool:
        """Whether the TLS handshake, if there is one, is over."""
        return self._is_agreed

    @property
    def is_waiting(self) -> bool:
        """Whether bytes of the client wait for their slice."""
        return self._is_queued

    # --- reading ---

    def _read_on(self) -> None:
        if not (self._is_closed or self._is_paused or self._is_reading):
            self._is_reading = True
            self._loop.add_reader(self.fd, self._readable)

    def _rest(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self.fd)

    def _readable(self) -> None:
        """There is something to read: wait for a slice, without being called again meanwhile."""
        self._rest()
        self._queue()

    def _queue(self) -> None:
        if not self._is_queued:
            self._is_queued = True
            self._share.add(self.lane, self._job, self.source, is_next=self._favoured > 0)
            self._favoured = max(0, self._favoured - 1)

    def favour(self, jobs: int) -> None:
        """Let the next jobs come before those of others from its source: what has begun is finished first. Else all of
        2,000 clients that come at once would be in the middle of their handshake when its time is over.
        """
        self._favoured = jobs

    def _job(self) -> bool:
        self._is_queued = False
        if self._is_closed or self._is_paused:
            return False
        if self._is_agreed:
            self._read()
        else:
            self._agree()
        return False

    def _agree(self) -> None:
        assert isinstance(self._sock, ssl.SSLSocket)
        if self._has_left():  # while it waited: what it sent is not worth half a millisecond of computing
            self._owner.tls_failed("connection_lost")
            self.abort()
            return
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self.favour(JOBS_TO_REQUEST)
            self._read_on()
        except ssl.SSLWantWriteError:
            self._write_on()
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                # What the client sent is no TLS, so the answer is none either.
                with contextlib.suppress(OSError):
                    socket.socket.send(self._sock, TLS_EXPECTED)
            self._owner.tls_failed(error.reason if error.reason in TLS_REASONS else "other")
            self.abort()
        except OSError:
            self._owner.tls_failed("connection_lost")
            self.abort()
        else:
            self._is_agreed = True
            self._owner.connection_made()
            self._queue()  # what came with the last part of the handshake is in OpenSSL, not in the kernel

    def _has_left(self) -> bool:
        """Whether the client is gone that began a TLS handshake. What speaks no TLS has its answer."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        if not poll.poll(0):
            return False
        with contextlib.suppress(OSError):
            return socket.socket.recv(self._sock, 1, socket.MSG_PEEK) == TLS_HANDSHAKE
        return True

    def _read(self) -> None:
        try:
            data = self._sock.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            self._read_on()
            return
        except ssl.SSLWantWriteError:
            self._write_on()  # OpenSSL answers a key update first
            return
        except OSError:
            self.abort()
            return
        if not data:
            self._has_ended = self._is_paused = True  # the end of the stream stays readable
            self._owner.eof_received()
            self.end()
            return
        self._owner.data_received(data)
        if len(data) == READ_BYTES or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            self._queue()
        else:
            self._read_on()

    def pause_reading(self) -> None:
        """Leave what the client sends in the kernel, for good."""
        self._is_paused = True
        self._rest()

    # --- writing ---

    @property
    def unsent(self) -> int:
        """Bytes the kernel has not taken yet."""
        return len(self._unsent)

    @property
    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self._is_closed or self._ends

    def write(self, data: bytes) -> None:
        """Send, or queue what the kernel does not take now."""
        if self._is_closed or self._ends or not data:
            return
        if self._unsent:
            self._unsent += data
            return
        sent = self._send(data)
        if sent < len(data) and not self._is_closed:
            self._unsent += memoryview(data)[sent:]
            self._write_on()
            self._owner.pause_writing()

    def _send(self, data: bytes | bytearray) -> int:
        """How much was sent. Closes the socket if it is broken."""
        sent = 0
        view = memoryview(data)
        try:
            if self.is_plain:
                return self._sock.send(view)
            while sent < len(view):
                sent += self._sock.send(view[sent : sent + RECORD_BYTES])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self.abort()
        finally:
            view.release()
        return sent

    def _write_on(self) -> None:
        if not (self._is_writing or self._is_closed):
            self._is_writing = True
            self._loop.add_writer(self.fd, self._writable)

    def _writable(self) -> None:
        if not self._is_agreed:
            self._stop_writing()
            self._queue()
            return
        if self._unsent:
            sent = self._send(self._unsent)
            del self._unsent[:sent]
        if self._is_closed or self._unsent:
            return
        self._stop_writing()
        self._unsent = bytearray()  # the old one keeps its size
        if self._ends:
            self._end()
        else:
            self._owner.resume_writing()
        if not self.is_plain:
            self._read_on()

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self.fd)

    # --- the end ---

    def end(self) -> None:
        """Send what is unsent, then the end of the stream. The client's own end is still read."""
        if not self.is_closing:
            self._ends = True
        if not (self._is_closed or self._unsent):
            self._end()

    def _end(self) -> None:
        if self._has_ended or not self._is_agreed:
            self.abort()
            return
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self._sock, ssl.SSLSocket):
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._sock.unwrap()  # sends close_notify; the client's is not waited for
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def abort(self) -> None:
        """Close now. What is unsent is lost."""
        if self._is_closed:
            return
        self._is_closed = True
        self._rest()
        self._stop_writing()
        self._unsent = bytearray()
        self._loop.call_soon(self._lost)

    def _lost(self) -> None:
        self._sock.close()
        self.fd = -1
        self._owner.connection_lost()


class NoSocket:
    """Before a socket is there and after it is closed: whatever is written goes nowhere."""

    fd = -1
    unsent = 0
    is_closing = True
    is_plain = False
    is_agreed = False
    is_waiting = False
    lane = Lane.STRANGER
    source: Hashable = None

    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def favour(self, jobs: int) -> None: ...
    def pause_reading(self) -> None: ...


NO_SOCKET = NoSocket()
