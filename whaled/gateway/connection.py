"""One client's connection: the sans-I/O WebSocket protocol of `websockets` over a ClientSocket.

`phase.TABLE` has the phases of a connection. There is no task, queue or future per client, so a connection costs a few
KiB, and a delivery costs little more than the kernel's send (docs/performance.md compares this with one task per
connection).
"""

import time
from collections.abc import Callable
from functools import partial

from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response

from whaled.errors import Close
from whaled.gateway import framing, messages
from whaled.gateway.actions import Action, Admit, Send, Stop
from whaled.gateway.admission import Source
from whaled.gateway.forwarded import ForwardedError
from whaled.gateway.handshake import BadRequestError, Server, credential, judge
from whaled.gateway.incoming import UnreadableError
from whaled.gateway.limits import Refusal
from whaled.gateway.nosocket import NO_SOCKET, NoSocket
from whaled.gateway.origins import shown
from whaled.gateway.outbox import Outbox
from whaled.gateway.owner import ConnectionOwner
from whaled.gateway.phase import Phase, Step, after
from whaled.gateway.session import Session
from whaled.gateway.share import Lane
from whaled.gateway.timer import LATER_S, Timer
from whaled.gateway.transport import ClientSocket
from whaled.gateway.websocket import WebSocket

# If a deadline ends while bytes of the client wait to be read, it is extended, up to this multiple of the time allowed
# for handshake and authentication: a client could send a byte now and then.
PATIENCE = 3


class Connection:
    """A client's connection from accept to close."""

    __slots__ = (
        "_owner", "_refusal", "_socket", "_timer", "_verdict", "_ws", "address", "arrived_at", "close_code",
        "connected_at", "is_client", "is_proxy", "number", "outbox", "phase", "pinged_at", "session", "slot", "source",
    )  # fmt: skip

    def __init__(
        self, owner: ConnectionOwner, address: str, source: Source, slot: int, *, is_proxy: bool = False
    ) -> None:
        self._owner = owner
        self.address = address
        self.source = source
        self.is_proxy = is_proxy  # a trusted proxy's, which has not named its client
        self.slot = slot
        self.number = 0  # given by the roster, counted from the start of the daemon
        self.phase = Phase.AGREEING
        self.outbox = Outbox(self, owner)
        self.session: Session | None = None
        self.is_client = False  # it was admitted, and may be closing by now
        self.close_code = 1006
        self.arrived_at = time.monotonic()
        self.connected_at = 0.0
        self.pinged_at = 0.0
        self._ws = WebSocket()
        self._socket: ClientSocket | NoSocket = NO_SOCKET
        self._verdict: Refusal | None = None  # the refusal with which the request will be answered
        self._refusal: Refusal | None = None  # the reason, once it is counted, why there is no session
        self._timer = Timer()

    def _step(self, step: Step) -> None:
        """Enter the next phase. Raises PhaseError."""
        self.phase = after(self.phase, step)
        if self.phase is Phase.AUTHENTICATING:
            self.outbox.open(self._socket, takes_deflate=self._ws.takes_deflate)
        elif self.phase is Phase.CLOSING:
            self.outbox.shut()
            self._ws.ending()
        elif self.phase is Phase.CLOSED:
            self.outbox.lost()
            self._timer.stop()

    # --- the socket (SocketOwner) ---

    def start(self, client: ClientSocket, verdict: Refusal | None) -> None:
        """Start reading, with a timeout for the handshake. `verdict`, if any, will be the answer to the request."""
        self._socket = client
        self._verdict = verdict
        self._timer.start(self._owner.settings.handshake_timeout, self._handshake_timed_out)
        client.start()

    def proxy_named(self, address: str | None) -> None:
        """Handle the end of the PROXY header: admit its client, if it names one."""
        if address is not None:
            self._verdict = self._owner.client_named(self, address, is_last=False) or self._verdict

    def proxy_failed(self, problem: str) -> None:
        """Handle a bad PROXY header. The connection closes, since its peer speaks no other protocol yet."""
        self._owner.records.proxy_failed(self.address, problem)
        self._refuse(Refusal.PROXY_PROTOCOL)

    def named(self, address: str, source: Source, *, is_proxy: bool) -> None:
        """Take the client's address, which the proxy names, in place of the proxy's."""
        self.address, self.source, self.is_proxy = address, source, is_proxy
        self._socket.source = source.network

    def connection_made(self) -> None:
        """Handle the end of the TLS handshake, if any: bytes may be read and written."""
        self._step(Step.AGREED)

    def tls_failed(self, reason: str) -> None:
        """Handle a failure of TLS: other bytes, no common version or cipher, or too much without application data."""
        self._owner.records.tls_failed(reason)
        if self.session is None:
            self._refuse(Refusal.TLS)

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        self.pinged_at = 0.0
        try:
            if self.phase is Phase.REQUESTING:
                data = self._read_request(data)
            if data:
                for frame in self._ws.frames(data):
                    self._frame(frame)
                self._flush()
            if self._ws.is_flooded:
                self._socket.pause_reading()
        except Exception:  # noqa: BLE001 - `failed` logs it with its traceback
            self._owner.records.failed(self.address)
            if self.session is None:
                self.abort()
            self.close(Close.BUG)

    def _read_request(self, data: bytes) -> bytes:
        """Collect the handshake request. Once it has been answered, return the bytes that follow it."""
        settings = self._owner.settings
        try:
            taken = self._ws.request(data, max_size=settings.max_frame, compresses=settings.compression)
        except BadRequestError as error:
            self._refuse(Refusal.BAD_HANDSHAKE)
            self._ws.refuse(error)
            taken = None
        if taken is not None:
            self._handshake(*taken[:2])
        self._flush()
        return taken[2] if taken is not None else b""

    def eof_received(self) -> None:
        """Handle the end of the client's stream by closing the connection."""
        self._ws.eof()
        self._flush()

    def connection_lost(self) -> None:
        """Handle the end of the socket. Its descriptor may be reused from now on."""
        self._step(Step.LOST)
        self._ws.lost()
        if self._ws.close_sent is not None:
            self.close_code = int(self._ws.close_sent.code)
        if self.session is None:
            self._refuse(Refusal.BAD_HANDSHAKE)
        # Break the cycle socket <-> connection now: the memory of 10,000 clients must not wait for the collector.
        self._socket = NO_SOCKET
        self._owner.disconnected(self)

    def pause_writing(self) -> None:
        """Handle the first unsent bytes."""
        self.outbox.filled()

    def resume_writing(self) -> None:
        """Handle the end of unsent bytes."""
        self.pinged_at = 0.0
        self.outbox.emptied()

    # --- handshake ---

    def _handshake(self, server: Server, request: Request) -> None:
        """Answer the request. Open the session, unless the request is refused."""
        owner, is_tls = self._owner, not self._socket.is_plain
        refusal, response = self._forwarded(server, request.headers) or judge(
            server, request, owner.origins, verdict=self._verdict, is_draining=owner.is_draining, is_tls=is_tls
        )
        if refusal is not None:
            self._count(refusal)  # now that it is sent: a client may leave before it sends a request
        if refusal is Refusal.ORIGIN:
            owner.records.origin_refused(self.address, shown(", ".join(request.headers.get_all("Origin"))))
        server.send_response(server.accept(request) if response is None else response)
        if not self._ws.is_open:
            self._refuse(Refusal.BAD_HANDSHAKE)
            return
        self._flush()
        self._step(Step.UPGRADED)
        self._timer.stop()
        self.session = owner.new_session(self)
        self.connected_at = owner.now()
        self.perform(self.session.opened(credential(request.headers), self.connected_at))
        request.headers.clear()  # the parser keeps the request for as long as the connection lasts
        owner.opened(self)
        if self.phase is Phase.AUTHENTICATING:
            self._socket.favour(1)
            self._timer.start(owner.settings.auth_timeout, self._auth_timed_out)

    def _forwarded(self, server: Server, headers: Headers) -> tuple[Refusal, Response] | None:
        """Admit the client that a trusted proxy names in a header. Return the answer to a header that is unreadable."""
        try:
            address = self._owner.proxies.client(headers) if self.is_proxy else None
        except ForwardedError as error:
            self._owner.records.proxy_failed(self.address, str(error))
            return Refusal.FORWARDED, server.reject(400, f"{error}\n")
        if address is not None:
            self._verdict = self._owner.client_named(self, address, is_last=True) or self._verdict
        return None

    def _refuse(self, refusal: Refusal) -> None:
        """Count the reason why there will be no session, unless there is one already."""
        if self._verdict is None:
            self._count(refusal)

    def _count(self, refusal: Refusal) -> None:
        if self._refusal is None:
            self._refusal = refusal
            self._owner.records.turned_away(refusal, self.source.network)

    @property
    def is_waiting(self) -> bool:
        """True if bytes of the client wait to be read."""
        return self._socket.is_waiting

    @property
    def refusal(self) -> Refusal | None:
        """The reason why there is no session, or will be none. None if there is one, or may be."""
        return self._refusal or self._verdict

    @property
    def progress(self) -> tuple[bool, bool]:
        """The progress of an unauthenticated connection: (TLS handshake complete, HTTP handshake complete)."""
        return self._socket.is_agreed, self.session is not None

    def displace(self, refusal: Refusal = Refusal.DISPLACED) -> None:
        """Cut off this unauthenticated connection, to make room for a new one."""
        self._count(self._verdict or refusal)
        self.abort()

    def _handshake_timed_out(self) -> None:
        if self._is_overdue(self._handshake_timed_out):
            self._refuse(Refusal.HANDSHAKE_TIMEOUT)
            self.abort()

    def _auth_timed_out(self) -> None:
        if self._is_overdue(self._auth_timed_out) and self.session is not None:
            self.perform(self.session.auth_deadline())

    def _is_overdue(self, timed_out: Callable[[], None]) -> bool:
        """Return False, and set the timer again, if bytes that the client sent in time still wait to be read."""
        settings = self._owner.settings
        until = self.arrived_at + PATIENCE * (settings.handshake_timeout + settings.auth_timeout)
        if self.is_waiting and time.monotonic() < until:
            self._timer.start(LATER_S, timed_out)
            return False
        return True

    # --- messages ---

    def _frame(self, frame: Frame) -> None:
        session = self.session
        if session is None or self.phase >= Phase.CLOSING or frame.opcode is Opcode.CLOSE:
            return
        now = self._owner.now()
        data = None if frame.opcode in (Opcode.PING, Opcode.PONG) else self._ws.add(frame)
        if data is None:
            self.perform(session.received_control(now))
            return
        try:
            message, is_text = self._ws.message(data, partial(session.would_parse, now))
        except UnreadableError as error:
            self.close(error.close)
            return
        actions = session.received(message, now, len(data)) if is_text else session.received_binary(now)
        self._owner.records.received(session.last_message, len(message))
        self.perform(actions)

    def recheck(self) -> None:
        """Warn or close a client whose credential expires or is no longer valid, and set the timer."""
        if self.session is None or self.phase is not Phase.READY:
            return
        try:
            self._timer.stop()
            self.perform(self.session.recheck(self._owner.now()))
        except Exception:  # noqa: BLE001 - `failed` logs it with its traceback
            self._owner.records.failed(self.address)
            self.close(Close.BUG)

    def perform(self, actions: list[Action]) -> None:
        """Perform the actions that the session returned."""
        for action in actions:
            if self.phase >= Phase.CLOSING:
                return  # an earlier frame exceeded the client's limit of unsent bytes
            match action:
                case Send(message=message):
                    self.answer(message)
                case Stop(close=close):
                    self.close(close)
                case Admit(grant=grant):
                    self._step(Step.ADMITTED)
                    self.is_client = True
                    self._socket.lane = Lane.KNOWN
                    self._socket.source = grant.client_id if grant is not None else self.source.address
                    self._timer.stop()
                    self._owner.perform(self, action)
                case _:
                    self._owner.perform(self, action)
        if self.phase is Phase.READY and self.session is not None:
            self._timer.set(self.session.next_deadline(), self._owner.now(), self.recheck)

    # --- writing (OutboxOwner) ---

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        return self._socket.unsent

    def answer(self, message: bytes) -> None:
        """Send and count a message that is for this client alone."""
        frame = framing.text_frame(message)
        self._owner.records.answered(len(frame))
        self.outbox.write(frame)

    def fell_behind(self, cursor: int) -> None:
        """Continue from the event log after `cursor`."""
        self._owner.fell_behind(self, cursor)

    def keepalive(self, now: float) -> None:
        """Ping the client, or cut it off if it did not answer. `now` is monotonic."""
        if self.session is None or self.phase >= Phase.CLOSING:
            return  # the timers of the handshake and the close apply
        if not self.pinged_at:
            self.pinged_at = now
            if not self.unsent:
                self._socket.write(framing.PING_FRAME)
        elif now - self.pinged_at >= self._owner.settings.ping_timeout:
            self._socket.abort()

    # --- closing ---

    def send_away(self, close: Close, retry_after_s: float, timeout_s: float | None = None) -> None:
        """Ask the client to reconnect after `retry_after_s`, and close the connection (see `close`)."""
        self.answer(messages.closing(close, retry_after_s))
        self.close(close, timeout_s)

    def close(self, close: Close, timeout_s: float | None = None) -> None:
        """Start the closing handshake. Cut off a peer that does not answer in time.

        `timeout_s` defaults to `gateway.close_timeout`.
        """
        if self.phase >= Phase.CLOSING:
            return
        self._step(Step.ENDED)
        if self._ws.server is None:
            self.abort()
            return
        self._ws.close(close)
        self._flush()
        self._timer.start(self._owner.settings.close_timeout if timeout_s is None else timeout_s, self.abort)

    def abort(self) -> None:
        """Close the socket now, dropping unsent bytes."""
        self._socket.abort()

    def _flush(self) -> None:
        """Send the frames that the WebSocket protocol produced, and close when it ends the connection."""
        data, ends = self._ws.output()
        if self.phase < Phase.CLOSING and (ends or self._ws.close_sent is not None):
            # The protocol ends the connection: a refusal, an answer to the client's close, or a protocol error.
            self._step(Step.ENDED)
            self._timer.start(self._owner.settings.close_timeout, self.abort)
        self._socket.write(data)
        if ends:
            self._socket.end()
        self.outbox.check()  # the client may not read its pongs
