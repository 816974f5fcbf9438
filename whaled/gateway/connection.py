"""One client's socket: the WebSocket protocol of `websockets` (its part without I/O) under an asyncio.Protocol.

No task, queue or future per client: a connection costs a few KiB, and a delivery costs the kernel's send
(docs/performance.md has the comparison with one task per connection).
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import structlog
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.typing import Origin

from whaled.config.sections import Gateway as GatewaySettings
from whaled.errors import Close
from whaled.gateway import wire
from whaled.gateway.handshake import Server, credential, has_credential, refuse
from whaled.gateway.limits import Refusal
from whaled.gateway.session import (
    Action,
    Admit,
    Attach,
    Crowded,
    Detach,
    Limited,
    Refused,
    Rejected,
    Send,
    Session,
    State,
    Stop,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# What the request of a handshake may take, headers and all: the library would collect 1 MiB of each stranger.
MAX_REQUEST_BYTES = 16 * 1024
END_OF_REQUEST = b"\r\n\r\n"
# Bytes are read in slices, so that the limits act amid a flood of small frames, not after a whole read of 256 KiB.
SLICE_BYTES = 4096
# Once the connection is closing the client's own close is looked for in so many bytes; a flood is left unread.
CLOSING_BYTES = 64 * 1024


class ConnectionOwner(Protocol):
    """The gateway, as a connection sees it."""

    settings: GatewaySettings
    allowed_origins: list[Origin | None] | None
    retry_after_s: int
    is_draining: bool

    def connected(self, connection: "Connection") -> Refusal | None:
        """Count a new connection, or say why it is refused."""
        ...

    def refused(self, reason: Refusal) -> None:
        """A handshake did not lead to a session."""
        ...

    def new_session(self, connection: "Connection") -> Session:
        """The rules for a connection whose handshake is done."""
        ...

    def perform(
        self, connection: "Connection", action: Admit | Attach | Detach | Refused | Limited | Crowded | Rejected
    ) -> None:
        """An action that concerns more than the socket."""
        ...

    def received(self, kind: wire.MessageType, size_bytes: int) -> None:
        """A message came in."""
        ...

    def answered(self, size_bytes: int) -> None:
        """A frame was sent to this client alone."""
        ...

    def send_away(self, connection: "Connection") -> None:
        """Tell a client to come back, and close it."""
        ...

    def failed(self) -> None:
        """A bug met while serving a client."""
        ...

    def fell_behind(self, connection: "Connection", cursor: int) -> None:
        """The connection is to go on from the log once it has drained."""
        ...

    def disconnected(self, connection: "Connection") -> None:
        """The socket is gone."""
        ...

    def now(self) -> float:
        """Unix seconds."""
        ...


class Connection(asyncio.Protocol):
    """A client's connection from accept to close."""

    __slots__ = (
        "__weakref__", "_closing_bytes", "_deadline", "_direct_fd", "_drained", "_fragments", "_gateway", "_is_text",
        "_paused", "_refusal", "_request_bytes", "_request_end", "_timer", "_transport", "_ws", "address",
        "close_code", "closing", "connected_at", "delivery", "fd", "is_counted", "is_ready", "pinged_at", "session",
        "slot",
    )  # fmt: skip

    def __init__(self, gateway: ConnectionOwner) -> None:
        self._gateway = gateway
        self._ws = Server(origins=gateway.allowed_origins, max_size=gateway.settings.max_frame)
        self._transport: asyncio.Transport = _NO_TRANSPORT
        self._direct_fd = -1
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._fragments: bytearray | None = None
        self._is_text = True
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._refusal: Refusal | None = None
        self._request_bytes = 0
        self._request_end = b""
        self._closing_bytes = 0
        self.fd = -1
        self.address = ""
        self.session: Session | None = None
        self.is_counted = False
        self.is_ready = False
        self.closing: Close | None = None
        self.close_code = 1006
        self.connected_at = 0.0
        self.pinged_at = 0.0
        self.slot = 0
        self.delivery: asyncio.Task[None] | None = None

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection and wait for its handshake, not forever."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if isinstance(peer, tuple) else "unix"
        # pause_writing is to tell as soon as anything is unsent, resume_writing when nothing is. TLS transports pause
        # at the limit, plain ones beyond it.
        is_plain = transport.get_extra_info("ssl_object") is None
        transport.set_write_buffer_limits(high=0 if is_plain else 1, low=0)
        self._refusal = self._gateway.connected(self)
        if is_plain:
            self._direct_fd = transport.get_extra_info("socket").fileno()
        self._call_later(self._gateway.settings.handshake_timeout, self._handshake_timed_out)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        self.pinged_at = 0.0
        try:
            if self.session is None and self.closing is None:
                data = self._request(data)
            for start in range(0, len(data), SLICE_BYTES):
                if not self._takes(data[start : start + SLICE_BYTES]):
                    break
        except Exception:
            log.exception("client message failed", address=self.address)
            self._gateway.failed()
            if self.session is None:
                self.abort()
            self.close(Close.BUG)

    def _request(self, data: bytes) -> bytes:
        """Take the bytes of the handshake's request; returns what comes behind it, which must wait for the answer."""
        seen = self._request_end + data
        end = seen.find(END_OF_REQUEST)
        size = len(data) if end < 0 else end + len(END_OF_REQUEST) - len(self._request_end)
        self._request_end = seen[-len(END_OF_REQUEST) + 1 :]
        self._request_bytes += size
        if self._request_bytes > MAX_REQUEST_BYTES:
            self._ws.send_response(self._ws.reject(431, f"the request has more than {MAX_REQUEST_BYTES} bytes\n"))
            self._flush()
            return b""
        self._takes(data[:size])
        return data[size:]

    def _takes(self, data: bytes) -> bool:
        """Let the WebSocket protocol read, and do what comes of it. False if the rest need not be read."""
        if self.closing is not None:
            self._closing_bytes += len(data)
            if self._closing_bytes > CLOSING_BYTES:
                self._transport.pause_reading()
                return False
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Request):
                self._handshake(event)
            elif isinstance(event, Frame):
                self._frame(event)
        self._flush()
        return True

    def eof_received(self) -> bool:
        """The client has nothing more to say; whaled closes too."""
        self._ws.receive_eof()
        self._flush()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a broken link has many names; the close code tells
        """The socket is gone; its descriptor may be reused from now on."""
        self.fd = self._direct_fd = -1
        self._cancel_timer()
        self._ws.receive_eof()
        sent = self._ws.close_sent
        if sent is not None:  # an answer repeats the client's code
            self.close_code = sent.code
        if self.session is None and self._refusal is None:
            self._gateway.refused(Refusal.BAD_HANDSHAKE)
        self._wake()
        self._gateway.disconnected(self)
        # Break the cycle transport <-> protocol now: 10,000 clients leaving must not wait for the collector.
        self._transport = _NO_TRANSPORT

    def pause_writing(self) -> None:
        """Bytes are unsent: frames go behind them from now on."""
        self._paused = True
        self.fd = -1

    def resume_writing(self) -> None:
        """Everything is sent."""
        self._paused = False
        self.pinged_at = 0.0
        if self.session is not None and self.closing is None:
            self.fd = self._direct_fd
        self._wake()

    # --- handshake ---

    def _handshake(self, request: Request) -> None:
        response = self._judge(request)
        refused = response is not None
        if response is None:
            response = self._ws.accept(request)
        self._ws.send_response(response)
        if self._ws.state is not OPEN:
            if not refused:
                is_origin = response.status_code == 403
                self._gateway.refused(Refusal.ORIGIN if is_origin else Refusal.BAD_HANDSHAKE)
                self._refusal = Refusal.ORIGIN if is_origin else Refusal.BAD_HANDSHAKE
            return
        self._cancel_timer()
        self._flush()
        self.session = self._gateway.new_session(self)
        self.connected_at = self._gateway.now()
        self.fd = -1 if self._paused else self._direct_fd
        self.perform(self.session.opened(credential(request.headers), self.connected_at))
        if self._gateway.is_draining:
            self._gateway.send_away(self)
        if self.session.state is State.AUTHENTICATING:
            self._call_later(self._gateway.settings.auth_timeout, self._auth_timed_out)

    def _judge(self, request: Request) -> Response | None:
        if self._refusal is None and has_credential(request.path):
            self._refusal = Refusal.TOKEN_IN_URL
        if self._refusal is None:
            return None
        self._gateway.refused(self._refusal)
        return refuse(self._ws, self._refusal, self._gateway.retry_after_s)

    def _handshake_timed_out(self) -> None:
        if self._refusal is None:
            self._refusal = Refusal.HANDSHAKE_TIMEOUT
            self._gateway.refused(Refusal.HANDSHAKE_TIMEOUT)
        self._transport.abort()

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
            self._fragments = bytearray()
        assert self._fragments is not None  # ServerProtocol refuses a continuation of nothing
        self._fragments += frame.data
        if not frame.fin:
            self.perform(session.received_control(self._gateway.now()))
            return
        message, self._fragments = self._fragments, None
        now = self._gateway.now()
        actions = session.received(bytes(message), now) if self._is_text else session.received_binary(now)
        self._gateway.received(session.last_message, len(message))
        self.perform(actions)

    def _auth_timed_out(self) -> None:
        if self.session is not None:
            self.perform(self.session.auth_deadline())

    def _tick(self) -> None:
        self._deadline = None
        if self.session is not None:
            self.perform(self.session.tick(self._gateway.now()))

    def _schedule_tick(self) -> None:
        deadline = self.session.next_deadline() if self.session is not None else None
        if deadline == self._deadline or self.closing is not None:
            return
        self._deadline = deadline
        self._cancel_timer()
        if deadline is not None:
            # An hour at most: the wall clock may be set meanwhile.
            self._call_later(min(3600.0, max(0.0, deadline - self._gateway.now())), self._tick)

    def perform(self, actions: list[Action]) -> None:
        """Do what the session decided."""
        for action in actions:
            if self.closing is not None:
                return  # it was too slow for what was sent just now
            match action:
                case Send(frame=frame):
                    self.answer(frame)
                case Stop(close=close):
                    self.close(close)
                case Admit():
                    self.is_ready = True
                    self._cancel_timer()
                    self._gateway.perform(self, action)
                case _:
                    self._gateway.perform(self, action)
        if self.is_ready:
            self._schedule_tick()

    # --- writing ---

    @property
    def unsent(self) -> int:
        """Bytes the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    def answer(self, frame: bytes) -> None:
        """Send a frame that is for this client alone."""
        self._gateway.answered(len(frame))
        self.write(frame)

    def write(self, frame: bytes) -> None:
        """Send complete frames, unless the connection is closing. A client that asks and does not read is closed."""
        if self.closing is not None or self._transport.is_closing():
            return
        self._transport.write(frame)
        if self.unsent > 2 * self._gateway.settings.max_unsent:
            # Deliveries keep to max_unsent (`write_behind`, and slices of a replay): this much is answers it asked for.
            self.close(Close.TOO_SLOW)

    def write_rest(self, rest: bytes) -> None:
        """Queue the rest of a frame whose beginning is in the socket already."""
        self._transport.write(rest)

    def write_behind(self, data: bytes) -> bool:
        """Queue data behind what is unsent, if the client may have that much unsent."""
        if self.closing is not None or self._transport.is_closing():
            return True  # it is going; it costs nothing more
        if self.unsent + len(data) > self._gateway.settings.max_unsent and self.unsent:
            return False
        self._transport.write(data)
        return True

    def fell_behind(self, cursor: int) -> None:
        """The hub took this connection out: go on from the log."""
        self._gateway.fell_behind(self, cursor)

    async def drained(self) -> None:
        """Wait until nothing is unsent, or the socket is gone. The caller bounds the wait."""
        while self._paused and self._transport is not _NO_TRANSPORT:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def keepalive(self, now: float) -> bool:
        """Ping a client, or give up one that did not answer. False if it was given up. `now` is monotonic."""
        if self.session is None or self.closing is not None:
            return True  # the handshake's and the close's own timers watch it
        if not self.pinged_at:
            self.pinged_at = now
            if not self._paused:
                self._transport.write(wire.PING_FRAME)
            return True
        if now - self.pinged_at < self._gateway.settings.ping_timeout:
            return True
        self._transport.abort()
        return False

    # --- closing ---

    def close(self, close: Close, timeout_s: float | None = None) -> None:
        """Start the closing handshake; a peer that does not answer in time (`gateway.close_timeout`) is cut off."""
        if self.closing is not None or self._transport is _NO_TRANSPORT:
            return
        self.closing = close
        self.fd = -1
        if self._ws.state is OPEN:
            self._ws.send_close(close.code, close.reason)
        self._flush()
        self._cancel_timer()
        self._call_later(self._gateway.settings.close_timeout if timeout_s is None else timeout_s, self.abort)

    def abort(self) -> None:
        """Cut the connection now."""
        self._transport.abort()

    def _flush(self) -> None:
        """Send what the WebSocket protocol has to say, and follow it when it ends the connection."""
        transport = self._transport
        frames = self._ws.data_to_send()
        ends = b"" in frames
        if self.closing is None and (ends or self._ws.close_sent is not None):
            # The protocol itself ends: a refusal, an answer to the client's close or to its silence, a broken rule.
            # Said first: a transport raises for what is written behind its end.
            self.closing = Close.NORMAL
            self.fd = -1
            self._call_later(self._gateway.settings.close_timeout, self.abort)
        if frames and not transport.is_closing():
            transport.write(b"".join(frames))
            if ends and transport.can_write_eof():
                with contextlib.suppress(OSError):  # the client is gone, as reading will tell
                    transport.write_eof()
            elif ends:
                transport.close()
        if self.closing is None and self.unsent > 2 * self._gateway.settings.max_unsent:
            self.close(Close.TOO_SLOW)  # pongs nobody reads

    # --- one timer at a time: handshake, then authentication, then expiry, then close ---

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _NoTransport(asyncio.Transport):
    """Before the connection is made and after it is lost: whatever is written goes nowhere."""

    def write(self, data: object) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def is_closing(self) -> bool:
        return True

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


_NO_TRANSPORT = _NoTransport()
