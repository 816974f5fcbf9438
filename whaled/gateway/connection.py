"""One client's connection: the sans-I/O WebSocket protocol of `websockets` over a ClientSocket.

There is no task, queue or future per client, so a connection costs a few KiB, and a delivery costs little more than
the kernel's send (docs/performance.md compares this with one task per connection).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN

from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway import wire
from whaled.gateway.admission import TIME_TO_BEGIN_S, Source
from whaled.gateway.deflate import DeflatedFrame, DeflateError, InflatedTooBigError, Inflater
from whaled.gateway.handshake import (
    MAX_REQUEST_BYTES,
    Server,
    credential,
    fault,
    has_bare_line_feed,
    judge,
    refuse,
    too_large,
)
from whaled.gateway.limits import Refusal
from whaled.gateway.origins import Origins, shown
from whaled.gateway.session import (
    Action,
    Admit,
    Attach,
    Crowded,
    Detach,
    FamilyEnded,
    Limited,
    Refused,
    Rejected,
    Send,
    Session,
    State,
    Stop,
)
from whaled.gateway.share import Lane
from whaled.gateway.transport import NO_SOCKET, ClientSocket, NoSocket

END_OF_REQUEST = b"\r\n\r\n"
# Once the connection is closing, the first CLOSING_BYTES are searched for the client's close frame. Later bytes are
# read and dropped: if they stayed unread, closing the socket would reset it, and the client would not see the close
# code. After DROPPED_BYTES reading stops, so that a flood costs nothing more.
CLOSING_BYTES = 1024
DROPPED_BYTES = 64 * 1024
# Refusals that are not the client's fault.
NO_FAULTS = {
    Refusal.GLOBAL_CAP, Refusal.ADDRESS_CAP, Refusal.CLIENT_CAP, Refusal.MEMORY, Refusal.DRAINING, Refusal.NO_UPGRADE,
}  # fmt: skip
# If a deadline ends while bytes of the client wait to be read, it is extended by LATER_S at a time, up to PATIENCE
# times the time allowed for handshake and authentication.
LATER_S, PATIENCE = 0.5, 3
# The first bytes of a TLS connection: its first record is a handshake, and the major version has always been 3.
TLS_BEGINS = b"\x16\x03"


class ConnectionOwner(Protocol):
    """The gateway as a connection sees it."""

    settings: GatewaySettings
    origins: Origins
    retry_after_s: int
    is_draining: bool

    def refused(self, connection: "Connection", reason: Refusal) -> None:
        """Count a handshake that did not lead to a session."""
        ...

    def tls_failed(self, reason: str) -> None:
        """Count a failed TLS handshake."""
        ...

    def origin_refused(self, connection: "Connection", origin: str) -> None:
        """Log a connection attempt by a page whose origin is not allowed."""
        ...

    def new_session(self, connection: "Connection") -> Session:
        """Create the session of a connection whose handshake is complete."""
        ...

    def perform(
        self,
        connection: "Connection",
        action: Admit | Attach | Detach | Refused | FamilyEnded | Limited | Crowded | Rejected,
    ) -> None:
        """Perform an action that concerns more than the socket."""
        ...

    def received(self, kind: wire.MessageType, size_bytes: int) -> None:
        """Count a received message."""
        ...

    def answered(self, size_bytes: int) -> None:
        """Count a frame that was sent to one client alone."""
        ...

    def ask_to_reconnect(self, connection: "Connection") -> None:
        """Ask a client to reconnect later, and close the connection."""
        ...

    def failed(self, connection: "Connection") -> None:
        """Log and count the exception being handled, a bug met while serving a client."""
        ...

    def fell_behind(self, connection: "Connection", cursor: int) -> None:
        """Replay the event log to the connection after `cursor`, once it has drained."""
        ...

    def disconnected(self, connection: "Connection") -> None:
        """Forget a connection whose socket is closed."""
        ...

    def now(self) -> float:
        """Return the wall clock, in Unix seconds."""
        ...


class Connection:
    """A client's connection from accept to close."""

    __slots__ = (
        "_closing_bytes", "_deadline", "_direct_fd", "_drained", "_fragments", "_gateway", "_inflater", "_is_counted",
        "_is_deflated", "_is_limited", "_is_text", "_paused", "_refusal", "_request", "_socket", "_timer", "_ws",
        "address", "arrived_at", "close_code", "closing", "connected_at", "delivery", "fd", "is_admitted", "is_ready",
        "pinged_at", "session", "slot", "source", "takes_deflate",
    )  # fmt: skip

    def __init__(self, gateway: ConnectionOwner, address: str, source: Source, slot: int) -> None:
        self._gateway = gateway
        self.address = address
        self.source = source
        self.slot = slot
        self._ws: Server | None = None  # created for a complete request, so that connections that send none are cheap
        self._socket: ClientSocket | NoSocket = NO_SOCKET
        self._direct_fd = -1
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._fragments: bytearray | None = None
        self._is_text = True
        self._is_deflated = False
        self._is_limited = False  # a compressed message was over the rate limit
        self._inflater: Inflater | None = None  # created for a client that compresses
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._refusal: Refusal | None = None
        self._is_counted = False
        self._request = bytearray()
        self._closing_bytes = 0
        self.fd = -1
        self.takes_deflate = False
        self.session: Session | None = None
        self.is_admitted = True
        self.is_ready = False
        self.closing: Close | None = None
        self.close_code = 1006
        self.arrived_at = time.monotonic()
        self.connected_at = 0.0
        self.pinged_at = 0.0
        self.delivery: asyncio.Task[None] | None = None

    # --- the socket (SocketOwner) ---

    def start(self, client: ClientSocket, refusal: Refusal | None) -> None:
        """Start reading, with a timeout for the handshake. `refusal`, if any, will be the answer to the request."""
        self._socket = client
        self._refusal = refusal
        self._call_later(self._gateway.settings.handshake_timeout, self._handshake_timed_out)
        client.start()

    def connection_made(self) -> None:
        """Handle the end of the TLS handshake, if any: bytes may be read and written."""
        if self._socket.is_plain:
            self._direct_fd = self._socket.fd

    def tls_failed(self, reason: str) -> None:
        """Handle a failure of TLS: other bytes, no common version or cipher, or too much without application data."""
        self._gateway.tls_failed(reason)
        if self.session is None:
            self._refuse(Refusal.TLS)

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        self.pinged_at = 0.0
        try:
            if self.session is None and self.closing is None:
                data = self._read_request(data)
            if data:
                self._read(data)
        except Exception:  # noqa: BLE001 - `failed` logs it with its traceback
            self._gateway.failed(self)
            if self.session is None:
                self.abort()
            self.close(Close.BUG)

    def _read_request(self, data: bytes) -> bytes:
        """Collect the handshake request. Once it has been answered, return the bytes that follow it."""
        seen = len(self._request)
        self._request += data
        end = self._request.find(END_OF_REQUEST, max(0, seen - len(END_OF_REQUEST) + 1))
        size = end + len(END_OF_REQUEST) if end >= 0 else len(self._request)
        if size > MAX_REQUEST_BYTES:
            self._answer_plainly(*too_large(self._request))
        elif self._request.startswith(TLS_BEGINS):
            self._answer_plainly(400, "this port speaks no TLS: connect with ws://\n")
        elif has_bare_line_feed(self._request, seen, size):
            self._answer_plainly(400, "a line of the request ends with LF alone: HTTP/1.1 has CR LF\n")
        elif end >= 0:
            request, rest = bytes(self._request[:size]), bytes(self._request[size:])
            self._request = bytearray()
            settings = self._gateway.settings
            self._ws = Server(max_size=settings.max_frame, compresses=settings.compression)
            self._read(request)
            return rest
        return b""

    def _answer_plainly(self, status: int, text: str) -> None:
        """Answer a request that the library has not parsed, or could not parse."""
        self._request = bytearray()
        self._refuse(Refusal.BAD_HANDSHAKE)
        if self._ws is not None:
            self._ws.end()
        self._ws = Server()
        response = self._ws.reject(status, text)
        if status == 405:
            response.headers["Allow"] = "GET"
        self._ws.send_response(response)
        self._flush()

    def _read(self, data: bytes) -> None:
        """Pass bytes to the WebSocket protocol, and handle the resulting events."""
        if self.closing is not None:
            self._closing_bytes += len(data)
            if self._closing_bytes > CLOSING_BYTES:
                if self._closing_bytes > DROPPED_BYTES:
                    self._socket.pause_reading()
                return
        assert self._ws is not None
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Request):
                self._handshake(event)
            elif isinstance(event, Frame):
                self._frame(event)
        if self._ws.handshake_exc is not None and self._refusal is None:
            self._answer_plainly(*fault(data, self._ws.handshake_exc))
        self._flush()

    def eof_received(self) -> None:
        """Handle the end of the client's stream by closing the connection."""
        if self._ws is not None:
            self._ws.receive_eof()
            self._flush()

    def connection_lost(self) -> None:
        """Handle the end of the socket. Its descriptor may be reused from now on."""
        self.fd = self._direct_fd = -1
        self._cancel_timer()
        if self._ws is not None:
            self._ws.end()
            sent = self._ws.close_sent
            if sent is not None:  # if the client closed first, this repeats its code
                self.close_code = int(sent.code)
        if self.session is None:
            self._refuse(Refusal.BAD_HANDSHAKE)
        self._wake()
        # Break the cycle socket <-> connection now: the memory of 10,000 clients must not wait for the collector.
        self._socket = NO_SOCKET
        self._gateway.disconnected(self)

    def pause_writing(self) -> None:
        """Handle the first unsent bytes: frames are queued behind them from now on."""
        self._paused = True
        self.fd = -1

    def resume_writing(self) -> None:
        """Handle the end of unsent bytes: frames may be written directly again."""
        self._paused = False
        self.pinged_at = 0.0
        if self.session is not None and self.closing is None:
            self.fd = self._direct_fd
        self._wake()

    # --- handshake ---

    def _handshake(self, request: Request) -> None:
        assert self._ws is not None
        response = self._check(request)
        if response is None:
            response = self._ws.accept(request)
        self._ws.send_response(response)
        if self._ws.state is not OPEN:
            self._refuse(Refusal.BAD_HANDSHAKE)
            return
        self._cancel_timer()
        self._flush()
        self.takes_deflate = bool(self._ws.extensions)
        self.session = self._gateway.new_session(self)
        self.connected_at = self._gateway.now()
        self.fd = -1 if self._paused else self._direct_fd
        self.perform(self.session.opened(credential(request.headers), self.connected_at))
        request.headers.clear()  # the parser keeps the request for as long as the connection lasts
        if self._gateway.is_draining:
            self._gateway.ask_to_reconnect(self)
        if self.session.state is State.AUTHENTICATING:
            self._socket.favour(1)
            self._call_later(self._gateway.settings.auth_timeout, self._auth_timed_out)

    def _check(self, request: Request) -> Response | None:
        """Return the response that refuses a request, or None if the request may open a WebSocket."""
        assert self._ws is not None
        gateway = self._gateway
        refusal, response = judge(
            self._ws, request, gateway.origins, is_draining=gateway.is_draining, is_tls=not self._socket.is_plain
        )
        # A health check is answered even at the connection limits.
        if self._refusal is not None and refusal is not Refusal.NO_UPGRADE:
            # Count the refusal when it is sent, not at the accept, since a client may leave before it sends a request.
            self._count_refusal()
            return refuse(self._ws, self._refusal, gateway.retry_after_s)
        if refusal is not None:
            self._refusal = None
            self._refuse(refusal)
        if refusal is Refusal.ORIGIN:
            gateway.origin_refused(self, shown(", ".join(request.headers.get_all("Origin"))))
        return response

    def _refuse(self, refusal: Refusal) -> None:
        """Record and count the reason why there will be no session, unless there is one already."""
        if self._refusal is None:
            self._refusal = refusal
            self._count_refusal()

    def _count_refusal(self) -> None:
        if self._refusal is not None and not self._is_counted:
            self._is_counted = True
            self._gateway.refused(self, self._refusal)

    def is_idle(self, now: float) -> bool:
        """Return whether the client had time to begin, but none of its bytes wait to be read. `now` is monotonic."""
        return now - self.arrived_at > TIME_TO_BEGIN_S and not self.is_waiting

    @property
    def is_waiting(self) -> bool:
        """True if bytes of the client wait to be read."""
        return self._socket.is_waiting

    @property
    def has_failed(self) -> bool:
        """True if the end of this connection, without authentication, counts as a failed connect of its network.

        It does not if the end was not the client's fault. It does if the connection was displaced, even before
        anything was read from it: in a flood from thousands of networks every connection ends like that.
        """
        if self._refusal is Refusal.DISPLACED:
            return True
        return self._refusal not in NO_FAULTS and not self.is_waiting

    def displace(self) -> None:
        """Cut off this unauthenticated connection, to make room for a new one."""
        self._refuse(Refusal.DISPLACED)
        self._count_refusal()
        self.abort()

    def _handshake_timed_out(self) -> None:
        if self._has_bytes_waiting():
            self._call_later(LATER_S, self._handshake_timed_out)
            return
        self._refuse(Refusal.HANDSHAKE_TIMEOUT)
        self.abort()

    # --- messages ---

    def _frame(self, frame: Frame) -> None:
        session = self.session
        if session is None or self.closing is not None:
            return
        if frame.opcode is Opcode.CLOSE:
            return
        if frame.opcode in (Opcode.PING, Opcode.PONG):
            self.perform(session.received_control(self._gateway.now()))
            return
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
            self._is_deflated = isinstance(frame, DeflatedFrame)
            self._fragments = bytearray()
        assert self._fragments is not None  # ServerProtocol refuses a continuation of nothing
        self._fragments += frame.data
        if not frame.fin:
            self.perform(session.received_control(self._gateway.now()))
            return
        data, self._fragments = bytes(self._fragments), None
        now = self._gateway.now()
        message = self._message(session, data, now)
        if message is None:
            return
        actions = session.received(message, now, len(data)) if self._is_text else session.received_binary(now)
        self._gateway.received(session.last_message, len(message))
        self.perform(actions)

    def _message(self, session: Session, data: bytes, now: float) -> bytes | None:
        """Return the message in `data`, inflated if necessary, or None if it closes the connection.

        A message that `Session.received` would not parse is not inflated.
        """
        if self._is_deflated:
            if self._inflater is None:
                self._inflater = Inflater()
            if not self._is_text or not session.would_parse(now):
                self._inflater.skip()
                self._is_limited = self._is_limited or self._is_text
                return data
            assert self._ws is not None
            assert self._ws.max_message_size is not None  # the limit at the handshake, as for plain messages
            try:
                data = self._inflater.inflate(data, self._ws.max_message_size)
            except InflatedTooBigError:
                self.close(Close.FRAME_TOO_BIG)
                return None
            except DeflateError:
                # A client that breaks the agreement may refer to a message that was skipped for its rate.
                self.close(Close.RATE_LIMITED if self._is_limited else Close.BAD_DEFLATE)
                return None
        if not self._is_text:
            return data
        if not _is_utf8(data):
            self.close(Close.NOT_UTF8)
            return None
        return data

    def _has_bytes_waiting(self) -> bool:
        """Return whether bytes that the client sent in time still wait to be read, which delays its deadline.

        The delay is limited, since a client could send a byte now and then.
        """
        settings = self._gateway.settings
        patience_s = PATIENCE * (settings.handshake_timeout + settings.auth_timeout)
        return self.is_waiting and time.monotonic() - self.arrived_at < patience_s

    def _auth_timed_out(self) -> None:
        if self._has_bytes_waiting():
            self._call_later(LATER_S, self._auth_timed_out)
            return
        if self.session is not None:
            self.perform(self.session.auth_deadline())

    def _tick(self) -> None:
        self._deadline = None
        if self.session is not None:
            self.perform(self.session.tick(self._gateway.now()))

    def recheck(self) -> None:
        """Check again whether the session's credential is valid, and reset its timer after a step of the clock."""
        if self.session is None or not self.is_ready or self.closing is not None or self._socket is NO_SOCKET:
            return
        try:
            self._deadline = None
            self.perform(self.session.recheck(self._gateway.now()))
        except Exception:  # noqa: BLE001 - `failed` logs it with its traceback
            self._gateway.failed(self)
            self.close(Close.BUG)

    def _schedule_tick(self) -> None:
        deadline = self.session.next_deadline() if self.session is not None else None
        if deadline == self._deadline or self.closing is not None:
            return
        self._deadline = deadline
        self._cancel_timer()
        if deadline is not None:
            # Wait an hour at most, since the wall clock may be set meanwhile.
            self._call_later(min(3600.0, max(0.0, deadline - self._gateway.now())), self._tick)

    def perform(self, actions: list[Action]) -> None:
        """Perform the actions that the session returned."""
        for action in actions:
            if self.closing is not None:
                return  # an earlier frame exceeded the client's limit of unsent bytes
            match action:
                case Send(frame=frame):
                    self.answer(frame)
                case Stop(close=close):
                    self.close(close)
                case Admit(grant=grant):
                    self.is_ready = True
                    self._socket.lane = Lane.KNOWN
                    self._socket.source = grant.client_id if grant is not None else self.source.address
                    self._cancel_timer()
                    self._gateway.perform(self, action)
                case _:
                    self._gateway.perform(self, action)
        if self.is_ready:
            self._schedule_tick()

    # --- writing ---

    @property
    def is_agreed(self) -> bool:
        """True if the TLS handshake is complete, or there is none."""
        return self._socket.is_agreed

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        return self._socket.unsent

    def answer(self, frame: bytes) -> None:
        """Send and count a frame that is for this client alone."""
        self._gateway.answered(len(frame))
        self.write(frame)

    def write(self, frame: bytes) -> None:
        """Send complete frames, unless the connection is closing. Close a client that does not read its answers."""
        if self.closing is not None or self._socket.is_closing:
            return
        self._socket.write(frame)
        if self.unsent > 2 * self._gateway.settings.max_unsent:
            # Deliveries stay within max_unsent (`write_behind`, and slices of a replay), so the excess is answers.
            self.close(Close.TOO_SLOW)

    def write_rest(self, rest: bytes) -> None:
        """Queue the rest of a frame whose first bytes the kernel has already taken."""
        self._socket.write(rest)

    def write_behind(self, data: bytes) -> bool:
        """Queue data behind the unsent bytes. Return False, queueing nothing, if it would exceed the client's limit."""
        if self.closing is not None or self._socket.is_closing:
            return True  # a closing connection needs no replay
        if self.unsent + len(data) > self._gateway.settings.max_unsent and self.unsent:
            return False
        self._socket.write(data)
        return True

    def fell_behind(self, cursor: int) -> None:
        """Continue from the event log after `cursor`. The hub has removed this connection from its group."""
        self._gateway.fell_behind(self, cursor)

    async def drained(self) -> None:
        """Wait until nothing is unsent or the socket is closed. The caller limits the wait."""
        while self._paused and self._socket is not NO_SOCKET:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def keepalive(self, now: float) -> bool:
        """Ping the client, or cut it off if it did not answer. Return False if it was cut off. `now` is monotonic."""
        if self.session is None or self.closing is not None:
            return True  # the timers of the handshake and the close apply
        if not self.pinged_at:
            self.pinged_at = now
            if not self._paused:
                self._socket.write(wire.PING_FRAME)
            return True
        if now - self.pinged_at < self._gateway.settings.ping_timeout:
            return True
        self._socket.abort()
        return False

    # --- closing ---

    def close(self, close: Close, timeout_s: float | None = None) -> None:
        """Start the closing handshake. Cut off a peer that does not answer in time.

        `timeout_s` defaults to `gateway.close_timeout`.
        """
        if self.closing is not None or self._socket is NO_SOCKET:
            return
        self.closing = close
        self.fd = -1
        self._inflater = None
        if self._ws is None:
            self.abort()
            return
        if self._ws.state is OPEN:
            self._ws.send_close(close.code, close.reason)
        self._flush()
        self._cancel_timer()
        self._call_later(self._gateway.settings.close_timeout if timeout_s is None else timeout_s, self.abort)

    def abort(self) -> None:
        """Close the socket now, dropping unsent bytes."""
        self._socket.abort()

    def _flush(self) -> None:
        """Send the frames that the WebSocket protocol produced, and close when it ends the connection."""
        assert self._ws is not None
        frames = self._ws.data_to_send()
        ends = b"" in frames
        if self.closing is None and (ends or self._ws.close_sent is not None):
            # The protocol ends the connection: a refusal, an answer to the client's close, or a protocol error.
            self.closing = Close.NORMAL
            self.fd = -1
            self._inflater = None
            self._call_later(self._gateway.settings.close_timeout, self.abort)
        if frames:
            self._socket.write(b"".join(frames))
            if ends:
                self._socket.end()
        if self.closing is None and self.unsent > 2 * self._gateway.settings.max_unsent:
            self.close(Close.TOO_SLOW)  # the client does not read its pongs

    # --- the timer: one at a time, for handshake, then authentication, then expiry, then close ---

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
