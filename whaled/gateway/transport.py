"""A client's socket in the loop's shares: bytes are read, decrypted and passed on in jobs, not in callbacks.

asyncio's own transports read up to 256 KiB at once, and hold a buffer of that size for each TLS connection before the
connection can be counted. This one reads a slice per job, leaves the rest in the kernel, and needs only OpenSSL's own
memory for a TLS connection, about 20 KiB.
"""

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Hashable
from typing import Protocol

from whaled.gateway.proxies import Preamble
from whaled.gateway.proxy_protocol import ProxyHeaderError
from whaled.gateway.share import Lane, LoopShare
from whaled.gateway.tls import CONNECTION_LOST, EXPECTED, HANDSHAKE_RECORD, READ_BYTES, TOO_MANY_BYTES, Tls, TlsError

# The jobs after the first part of a TLS handshake: its last part, and the request, which may arrive in two parts.
JOBS_TO_REQUEST = 3
# The most unsent answers to TLS key updates. A client that requests more without reading them is cut off.
REPLIES_BYTES = 16 * 1024


class SocketOwner(Protocol):
    """The connection that owns a socket."""

    def proxy_named(self, address: str | None) -> None:
        """Handle the end of the PROXY header; None if it names no client."""

    def proxy_failed(self, problem: str) -> None:
        """Handle a bad PROXY header. `connection_lost` follows."""

    def connection_made(self) -> None:
        """Handle the end of the TLS handshake, if any: bytes may be read and written."""
        ...

    def tls_failed(self, reason: str) -> None:
        """Handle a failure of TLS. `connection_lost` follows."""
        ...

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client, at most READ_BYTES."""
        ...

    def eof_received(self) -> None:
        """Handle the end of the client's stream."""
        ...

    def connection_lost(self) -> None:
        """Handle the end of the socket. It is called once, whatever the cause, and never within a call by the owner."""
        ...

    def pause_writing(self) -> None:
        """Handle the first unsent bytes."""
        ...

    def resume_writing(self) -> None:
        """Handle the end of unsent bytes."""
        ...


class ClientSocket:
    """One accepted socket. Its jobs run in `lane`, attributed to `source`; both may be changed at any time."""

    __slots__ = (
        "_ends", "_favoured", "_has_ended", "_is_closed", "_is_paused", "_is_queued", "_is_reading", "_is_writing",
        "_loop", "_owner", "_preamble", "_read_ahead", "_replies_bytes", "_share", "_sock", "_tls", "_unsent", "fd",
        "lane", "source",
    )  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        owner: SocketOwner,
        share: LoopShare,
        source: Hashable,
        tls: ssl.SSLContext | None,
        preamble: Preamble | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._tls = None if tls is None else Tls(tls)
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._share = share
        self.lane = Lane.STRANGER
        self.source = source
        self.fd = self._sock.fileno()
        self._unsent = bytearray()
        self._preamble = preamble  # None once the PROXY header is read, if there is one
        self._read_ahead = b""  # bytes that were read together with the PROXY header
        self._is_closed = self._is_paused = self._is_queued = self._is_reading = self._is_writing = False
        self._ends = self._has_ended = False
        self._favoured = self._replies_bytes = 0

    def start(self) -> None:
        """Start reading."""
        if self._tls is None and self._preamble is None:
            self._owner.connection_made()
        self._start_reading()

    @property
    def is_plain(self) -> bool:
        """True if frames may be written to `fd` without encryption."""
        return self._tls is None

    @property
    def is_agreed(self) -> bool:
        """True if the TLS handshake is complete, or there is none."""
        return self._preamble is None and (self._tls is None or self._tls.is_agreed)

    @property
    def is_waiting(self) -> bool:
        """True if bytes of the client wait for a slice."""
        return self._is_queued

    # --- reading ---

    def _start_reading(self) -> None:
        if not (self._is_closed or self._is_paused or self._is_reading):
            self._is_reading = True
            self._loop.add_reader(self.fd, self._readable)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self.fd)

    def _readable(self) -> None:
        """Queue a job to read, and stop watching the socket until it has run."""
        self._stop_reading()
        self._queue()

    def _queue(self) -> None:
        if not self._is_queued:
            self._is_queued = True
            self._share.add(self.lane, self._job, self.source, is_next=self._favoured > 0)
            self._favoured = max(0, self._favoured - 1)

    def favour(self, jobs: int) -> None:
        """Run the next `jobs` jobs before those of other connections of the same source.

        A handshake that has begun is thus finished first. Otherwise, if 2,000 clients connected at once, all of them
        would be in mid-handshake when the timeout ends.
        """
        self._favoured = jobs

    def _job(self) -> bool:
        self._is_queued = False
        if self._is_closed or self._is_paused:
            return False
        try:
            if self._preamble is not None:
                self._read_preamble(self._preamble)
            elif self._tls is None:
                self._read()
            else:
                self._read_tls(self._tls)
        except (BlockingIOError, InterruptedError):
            self._start_reading()
        except OSError:
            if self.is_agreed or self._preamble is not None:
                self.abort()
            else:
                self._fail(CONNECTION_LOST)
        except TlsError as failure:
            self._fail(failure.reason)
        return False

    def _read_preamble(self, preamble: Preamble) -> None:
        data = self._sock.recv(READ_BYTES)
        try:
            found = preamble.feed(data)
        except ProxyHeaderError as error:
            self._owner.proxy_failed(str(error))
            data, found = b"", None
        if not data:
            self.abort()
        elif found is not None:
            self._preamble = None
            address, self._read_ahead = found
            self._owner.proxy_named(address)
            if self._tls is None and not self._is_closed:
                self._owner.connection_made()
        if self._read_ahead and not self._is_closed:
            self._queue()
        else:
            self._start_reading()

    def _receive(self) -> bytes:
        data, self._read_ahead = self._read_ahead, b""
        return data or self._sock.recv(READ_BYTES)

    def _read(self) -> None:
        data = self._receive()
        if not data:
            self._end_of_stream()
            return
        self._owner.data_received(data)
        if len(data) == READ_BYTES:
            self._queue()
        else:
            self._start_reading()

    def _read_tls(self, tls: Tls) -> None:
        if not tls.has_more:
            received = self._receive()
            if not received:
                self._end_of_stream()
                return
            tls.feed(received)
            if not tls.is_agreed and not self._agree(tls, received):
                self._start_reading()
                return
        data = tls.read()
        self._reply(tls)
        if data is None:
            self._start_reading()
            return
        if not data:
            self._end_of_stream()
            return
        self._owner.data_received(data)
        if tls.has_more:
            self._queue()
        else:
            self._start_reading()

    def _agree(self, tls: Tls, received: bytes) -> bool:
        """Continue the handshake. Return True once it is complete. Raises TlsError."""
        if received[0] == HANDSHAKE_RECORD and self._has_left():
            raise TlsError(CONNECTION_LOST)  # the client left while it waited: save half a millisecond of computing
        try:
            is_agreed = tls.agree()
        except TlsError as failure:
            answer = tls.output()  # an alert
            # The client sent plain HTTP, so the answer is plain HTTP too.
            self._put(EXPECTED if failure.reason == "HTTP_REQUEST" else answer)
            raise
        self._reply(tls)
        if is_agreed:
            self._owner.connection_made()
        else:
            self.favour(JOBS_TO_REQUEST)
        return is_agreed

    def _has_left(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _reply(self, tls: Tls) -> None:
        """Send the bytes of TLS itself, such as answers to key updates."""
        reply = tls.output()
        if reply and self._unsent:
            self._replies_bytes += len(reply)
            if self._replies_bytes > REPLIES_BYTES:
                raise TlsError(TOO_MANY_BYTES)
        self._put(reply)

    def _end_of_stream(self) -> None:
        if self._tls is not None and not self._tls.is_agreed:
            raise TlsError(CONNECTION_LOST)
        self._has_ended = self._is_paused = True  # a socket at the end of its stream is always readable
        self._owner.eof_received()
        self.end()

    def _fail(self, reason: str) -> None:
        """Close the socket after a failure of TLS."""
        self._owner.tls_failed(reason)
        self.abort()

    def pause_reading(self) -> None:
        """Stop reading for good. Further bytes of the client stay in the kernel."""
        self._is_paused = True
        self._stop_reading()

    # --- writing ---

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        return len(self._unsent)

    @property
    def is_closing(self) -> bool:
        """True if nothing more can be written."""
        return self._is_closed or self._ends

    def write(self, data: bytes) -> None:
        """Send data, queueing the bytes that the kernel does not take now."""
        if self._is_closed or self._ends or not data:
            return
        if self._tls is not None:
            if not self._tls.is_agreed:
                return
            try:
                data = self._tls.encrypt(data)
            except TlsError as failure:
                self._fail(failure.reason)
                return
        self._put(data)

    def _put(self, data: bytes) -> None:
        if self._is_closed or not data:
            return
        if self._unsent:
            self._unsent += data
            return
        sent = self._send(data)
        if sent < len(data) and not self._is_closed:
            self._unsent += memoryview(data)[sent:]
            self._start_writing()
            self._owner.pause_writing()

    def _send(self, data: bytes | bytearray) -> int:
        """Return how many bytes the kernel took. Close the socket if it is broken."""
        with memoryview(data) as view:
            try:
                return self._sock.send(view)
            except (BlockingIOError, InterruptedError):
                return 0
            except OSError:
                self.abort()
                return 0

    def _start_writing(self) -> None:
        if not (self._is_writing or self._is_closed):
            self._is_writing = True
            self._loop.add_writer(self.fd, self._writable)

    def _writable(self) -> None:
        if self._unsent:
            sent = self._send(self._unsent)
            del self._unsent[:sent]
        if self._is_closed or self._unsent:
            return
        self._stop_writing()
        self._unsent = bytearray()  # an emptied bytearray would keep its memory
        self._replies_bytes = 0
        if self._ends:
            self._end()
        else:
            self._owner.resume_writing()

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self.fd)

    # --- the end ---

    def end(self) -> None:
        """Send the unsent bytes, then the end of the stream. Reading continues until the client's end."""
        if not self.is_closing:
            self._ends = True
        if not (self._is_closed or self._unsent):
            self._end()

    def _end(self) -> None:
        if self._has_ended or not self.is_agreed:
            self.abort()
            return
        if self._tls is not None:
            self._send(self._tls.end())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Close the socket now. Unsent bytes are lost."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_reading()
        self._stop_writing()
        self._unsent = bytearray()
        self._loop.call_soon(self._lost)

    def _lost(self) -> None:
        self._sock.close()
        self.fd = -1
        self._owner.connection_lost()
