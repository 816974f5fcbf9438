"""The WebSocket protocol of one connection, without its socket: bytes in, requests and messages out, bytes to send.

Pure.
"""

from collections.abc import Callable, Iterator

from websockets.frames import Close as ClosePayload
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import OPEN

from whaled.errors import Close
from whaled.gateway.handshake import BadRequestError, Server, fault, take_request
from whaled.gateway.incoming import Incoming

# Once the connection is closing, the first CLOSING_BYTES are searched for the client's close frame. Later bytes are
# read and dropped: if they stayed unread, closing the socket would reset it, and the client would not see the close
# code. After DROPPED_BYTES reading stops, so that a flood costs nothing more.
CLOSING_BYTES = 1024
DROPPED_BYTES = 64 * 1024


class WebSocket:
    """The server's end of the protocol: one request, then frames.

    `server`, the library's protocol, is created for a complete request, so that connections that send none are cheap.
    """

    __slots__ = ("_closing_bytes", "_incoming", "_request", "server")

    def __init__(self) -> None:
        self._request = bytearray()
        self._closing_bytes: int | None = None  # the bytes received since the connection is closing
        self._incoming: Incoming | None = None  # created for the first message
        self.server: Server | None = None

    # --- the handshake ---

    def request(self, data: bytes, *, max_size: int, compresses: bool) -> tuple[Server, Request, bytes] | None:
        """Add received bytes. Return None until the request is complete.

        Then return the protocol, with which to answer it, the request, and the bytes that follow it. Frames may have
        `max_size` bytes at most. Raises BadRequestError if this will never be a request.
        """
        taken = take_request(self._request, data)
        if taken is None:
            return None
        raw, rest = taken
        self._request = bytearray()
        server = self.server = Server(max_size=max_size, compresses=compresses)
        server.receive_data(raw)
        for event in server.events_received():
            if isinstance(event, Request):
                return server, event, rest
        raise BadRequestError(*fault(raw, server.handshake_exc))

    def refuse(self, error: BadRequestError) -> None:
        """Answer a request that the library has not parsed, or could not parse."""
        self._request = bytearray()
        if self.server is not None:
            self.server.end()
        self.server = Server()
        response = self.server.reject(error.status, error.text)
        if error.status == 405:
            response.headers["Allow"] = "GET"
        self.server.send_response(response)

    @property
    def is_open(self) -> bool:
        """True from the response that opens the WebSocket to the first close frame or protocol error."""
        return self.server is not None and self.server.state is OPEN

    @property
    def takes_deflate(self) -> bool:
        """True if the client accepts compressed frames."""
        return self.server is not None and bool(self.server.extensions)

    # --- messages ---

    def frames(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete with these bytes. The library answers pings and protocol errors."""
        if self._closing_bytes is not None:
            self._closing_bytes += len(data)
            if self._closing_bytes > CLOSING_BYTES:
                return
        assert self.server is not None
        self.server.receive_data(data)
        for event in self.server.events_received():
            if isinstance(event, Frame):
                yield event

    def add(self, frame: Frame) -> bytes | None:
        """Add a data frame. Return the data of its message, or None if that is not complete."""
        return self._message.add(frame)

    def message(self, data: bytes, would_parse: Callable[[], bool]) -> tuple[bytes, bool]:
        """Return the message in the data that `add` returned, and whether it is text. Raises UnreadableError."""
        return self._message.read(data, would_parse), self._message.is_text

    @property
    def _message(self) -> Incoming:
        if self._incoming is None:
            assert self.server is not None
            assert self.server.max_message_size is not None
            self._incoming = Incoming(self.server.max_message_size)
        return self._incoming

    def ending(self) -> None:
        """Forget the message that the client was sending: the connection is closing."""
        self._incoming = None
        self._closing_bytes = 0

    @property
    def is_flooded(self) -> bool:
        """True if the client continues to send although the connection is closing."""
        return self._closing_bytes is not None and self._closing_bytes > DROPPED_BYTES

    # --- the end, and the bytes to send ---

    def eof(self) -> None:
        """Handle the end of the client's stream."""
        if self.server is not None:
            self.server.receive_eof()

    def close(self, close: Close) -> None:
        """Make a close frame, if the WebSocket is open."""
        if self.server is not None and self.server.state is OPEN:
            self.server.send_close(close.code, close.reason)

    def output(self) -> tuple[bytes, bool]:
        """Return the bytes to send, and whether the end of the stream follows them."""
        if self.server is None:
            return b"", False
        data = self.server.data_to_send()
        return b"".join(data), b"" in data

    @property
    def close_sent(self) -> ClosePayload | None:
        """The close frame that was made, if any. If the client closed first, it repeats its code."""
        return self.server.close_sent if self.server is not None else None

    def lost(self) -> None:
        """Break the reference cycles of the library: the socket is closed."""
        if self.server is not None:
            self.server.end()
