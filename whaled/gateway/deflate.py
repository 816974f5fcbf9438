"""permessage-deflate (RFC 7692) without context takeover: no message refers to an earlier one.

The compressed frame of an event is therefore the same for every client, and is made once. Some clients (Tornado,
Mojolicious) refer to their earlier messages although the handshake excludes it, so up to 32 KiB of a client's earlier
messages are kept until the client has shown that it keeps the agreement.

Only events are compressed. Answers to one client are not: an answer may contain a token next to text that the client
chose, and the compressed size would reveal the token piece by piece.

Pure.
"""

import zlib
from collections.abc import Sequence

from websockets.exceptions import NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.typing import ExtensionParameter

from whaled.gateway import framing

# The sender's window, in bits. Most alerts fit into its 4 KiB, so a larger window gains nothing. The few clients that
# allow only a smaller one get no compression.
WINDOW_BITS = 12
# Level 1 comes within 1 % of the size of the highest level, and takes two thirds of its time for large messages, for
# any content. The memory level is the lowest that does not increase the size; the memory is cleared for each message.
LEVEL = 1
MEMORY_LEVEL = 6
# Payloads below this size (positions, states of the backend) shrink by a fifth at most, which is less than the headers
# of a network packet.
SMALLEST_BYTES = 200
# Compression runs in the event loop at 30 us per KiB. A frame that would take longer than 8 ms is not compressed.
LARGEST_BYTES = 256 * 1024

# The bytes that the sender removes from the end of a message and the receiver appends (RFC 7692, 7.2.1 and 7.2.2).
TAIL = b"\x00\x00\xff\xff"
# An empty final block, appended to detect a message that is cut off: it can only follow a complete block.
END = b"\x01\x00\x00\xff\xff"
# Genuine messages have at most one final block. Each one requires a new decompressor.
MAX_FINAL_BLOCKS = 16
# The largest window that a client may use.
MAX_WINDOW_BITS = 15
MAX_WINDOW_BYTES = 1 << MAX_WINDOW_BITS
# A client has shown that it keeps the agreement after this many messages: a compressor with context takeover would
# refer to the first message in its second one, since all begin with `{"type":"`.
ALONE_MESSAGES = 16


class DeflateError(Exception):
    """The compressed data is damaged or cut off."""


class InflatedTooBigError(Exception):
    """The inflated message is larger than the limit."""


class Deflater:
    """The compressor of frames. One serves all clients, since it keeps no state between messages."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW_BITS, MEMORY_LEVEL)

    def frame(self, plain: bytes) -> bytes:
        """Return the compressed form of a text frame, or the frame itself if compression does not make it smaller."""
        payload = framing.payload_of(plain)
        if not SMALLEST_BYTES <= len(payload) <= LARGEST_BYTES:
            return plain
        # A full flush clears the compressor's history. A new compressor would take half as long again.
        data = self._zlib.compress(payload) + self._zlib.flush(zlib.Z_FULL_FLUSH)
        frame = framing.text_frame(data[: -len(TAIL)], is_compressed=True)
        return frame if len(frame) < len(plain) else plain


def inflate(data: bytes | bytearray, limit_bytes: int, before: bytes = b"") -> bytes:
    """Return the message in `data`, which may refer to the client's earlier messages, `before`.

    Raises DeflateError, and InflatedTooBigError as soon as the output exceeds `limit_bytes` by one byte.
    """
    rest = bytes(data) + TAIL + END
    message = b""
    for _ in range(MAX_FINAL_BLOCKS):
        # A block may also refer to data before a final block.
        known = (before + message)[-MAX_WINDOW_BYTES:]
        inflater = zlib.decompressobj(-MAX_WINDOW_BITS, known) if known else zlib.decompressobj(-MAX_WINDOW_BITS)
        try:
            message += inflater.decompress(rest, limit_bytes + 1 - len(message))
        except zlib.error as error:
            raise DeflateError(str(error)) from None
        if len(message) > limit_bytes:
            raise InflatedTooBigError
        if not inflater.eof:
            raise DeflateError("it ends in the middle of a block")
        rest = inflater.unused_data
        if not rest:
            return message
    raise DeflateError(f"more than {MAX_FINAL_BLOCKS} final blocks")


class Inflater:
    """The decompressor of one client's messages.

    It inflates each message on its own if possible, and with the earlier ones if the message refers to them. zlib
    reports every reference to data it does not have, so a skipped message (`skip`) never leads to a wrong result.
    """

    __slots__ = ("_alone", "_before")

    def __init__(self) -> None:
        self._before = b""
        self._alone = 0  # consecutive messages that referred to no earlier one; -1 once a message did

    def inflate(self, data: bytes, limit_bytes: int) -> bytes:
        """Return the next message. Raises InflatedTooBigError, DeflateError."""
        if self._alone < 0:
            message = inflate(data, limit_bytes, self._before)
        else:
            try:
                message = inflate(data, limit_bytes)
            except DeflateError:
                if not self._before:
                    raise
                message = inflate(data, limit_bytes, self._before)
                self._alone = -1
            else:
                self._alone += 1
        if self._alone < ALONE_MESSAGES:
            self._before = (self._before + message)[-MAX_WINDOW_BYTES:]
        else:
            self._alone = ALONE_MESSAGES
            self._before = b""
        return message

    def skip(self) -> None:
        """Skip a message without inflating it. Later messages cannot refer to it or anything before it."""
        self._before = b""


class DeflatedFrame(Frame):
    """The first frame of a compressed message."""


class _Deflate(Extension):
    """The extension that marks compressed messages, which are inflated only when they are complete.

    An unfinished message therefore holds its received bytes but no decompressor. One instance serves all connections,
    since it has no state.
    """

    name = ServerPerMessageDeflateFactory.name

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:  # noqa: ARG002 - `inflate` has the limit
        if frame.rsv1 and frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            return DeflatedFrame(frame.opcode, frame.data, frame.fin, False, frame.rsv2, frame.rsv3)
        return frame  # if the bit is set on another frame, the library reports the protocol error

    def encode(self, frame: Frame) -> Frame:
        return frame  # the library sends control frames only; whaled writes the others itself


_DEFLATE = _Deflate()


class Offers(ServerPerMessageDeflateFactory):
    """The negotiation: accepts the first suitable offer, without context takeover and with the shared window."""

    def __init__(self) -> None:
        super().__init__(server_no_context_takeover=True, client_no_context_takeover=True)

    def process_request_params(  # type: ignore[override]  # the library's returns a class of its own
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], Extension]:
        """Return the accepted parameters and the extension. Raises NegotiationError to decline an offer."""
        answer, _ = super().process_request_params(params, accepted_extensions)
        window = dict(answer).get("server_max_window_bits")
        if window is None:
            return answer, _DEFLATE
        if int(window) < WINDOW_BITS:
            raise NegotiationError(f"server_max_window_bits below {WINDOW_BITS}")
        kept = [(name, value) for name, value in answer if name != "server_max_window_bits"]
        return [*kept, ("server_max_window_bits", str(WINDOW_BITS))], _DEFLATE
