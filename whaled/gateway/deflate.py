"""permessage-deflate (RFC 7692) without context takeover: no message refers to one before it.

So the compressed frame of an event is the same for every client, and is made once. Some clients (Tornado, Mojolicious)
refer to their earlier messages although they were told not to: what a client compressed is remembered for that, up to
32 KiB, until it turns out to keep the agreement. Only events are compressed. Answers to one client are not: they may
hold a token beside text of the client's choosing, and the size of both compressed together would give the token away,
piece by piece.
"""

import zlib
from collections.abc import Sequence

from websockets.exceptions import NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.typing import ExtensionParameter

from whaled.gateway import wire

# The sender's window, in bits. Most alerts are smaller than it, so that a larger one gains nothing; clients that allow
# less than the 4 KiB are few, and get no compression.
WINDOW_BITS = 12
# As small as with the highest level within 1 %; large ones take two thirds of the time, whatever is in them. The memory
# level is the least that loses nothing: what it adds is cleared for each message.
LEVEL = 1
MEMORY_LEVEL = 6
# Smaller payloads (positions, states of the backend) lose a fifth at most: less than a network packet has of headers.
SMALLEST_BYTES = 200
# Compressing takes 30 us for each KiB, in the loop: a frame that would hold it up for longer than 8 ms is not.
LARGEST_BYTES = 256 * 1024

# What the sender leaves out at the end of a message, and the receiver appends (RFC 7692, 7.2.1 and 7.2.2).
TAIL = b"\x00\x00\xff\xff"
# An empty final block. A message that is whole ends where it can follow.
END = b"\x01\x00\x00\xff\xff"
# A message has one final block if any; each costs a decompressor.
MAX_FINAL_BLOCKS = 16
# A client may use any window.
MAX_WINDOW_BITS = 15
MAX_WINDOW_BYTES = 1 << MAX_WINDOW_BITS
# A compressor that is kept finds something of `{"type":"` again in its second message.
ALONE_MESSAGES = 16


class DeflateError(Exception):
    """What was to be inflated is damaged or cut off."""


class InflatedTooBigError(Exception):
    """A message is larger than it may be."""


class Deflater:
    """Makes compressed frames. One serves all clients: it forgets each message before the next."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW_BITS, MEMORY_LEVEL)

    def frame(self, plain: bytes) -> bytes:
        """The compressed form of a text frame, or the frame itself where that is no gain."""
        payload = wire.payload_of(plain)
        if not SMALLEST_BYTES <= len(payload) <= LARGEST_BYTES:
            return plain
        # A full flush clears what the compressor knows; a new compressor would take half as long again.
        data = self._zlib.compress(payload) + self._zlib.flush(zlib.Z_FULL_FLUSH)
        frame = wire.text_frame(data[: -len(TAIL)], is_compressed=True)
        return frame if len(frame) < len(plain) else plain


def inflate(data: bytes | bytearray, limit_bytes: int, before: bytes = b"") -> bytes:
    """The message that a client compressed to `data`, having compressed `before`.

    Raises InflatedTooBigError, having made no more than a byte too many, and DeflateError.
    """
    rest = bytes(data) + TAIL + END
    message = b""
    for _ in range(MAX_FINAL_BLOCKS):
        # A block may refer to what came before a final one, too.
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
    """Inflates the messages of one client, each by itself if that can be: only what refers to a message before needs
    that. zlib notices every such reference, so that nothing wrong is read where a message was left out (`skip`).
    """

    __slots__ = ("_alone", "_before")

    def __init__(self) -> None:
        self._before = b""
        self._alone = 0  # messages in a row that needed none before; -1 once one did

    def inflate(self, data: bytes, limit_bytes: int) -> bytes:
        """The next message. Raises InflatedTooBigError, DeflateError."""
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
        """A message is not inflated. What came before it is out of reach."""
        self._before = b""


class DeflatedFrame(Frame):
    """The first frame of a compressed message."""


class _Deflate(Extension):
    """Marks compressed messages. They are inflated once they are whole, so that one that is never finished holds what
    has arrived of it and no decompressor. It has no state: one serves all connections.
    """

    name = ServerPerMessageDeflateFactory.name

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:  # noqa: ARG002 - `inflate` has the limit
        if frame.rsv1 and frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            return DeflatedFrame(frame.opcode, frame.data, frame.fin, False, frame.rsv2, frame.rsv3)
        return frame  # with the bit set it breaks the rules, which the caller looks after

    def encode(self, frame: Frame) -> Frame:
        return frame  # control frames only: the others are written by whaled itself


_DEFLATE = _Deflate()


class Offers(ServerPerMessageDeflateFactory):
    """Takes the first offer that can be kept: no context takeover either way, and the window of the shared frames."""

    def __init__(self) -> None:
        super().__init__(server_no_context_takeover=True, client_no_context_takeover=True)

    def process_request_params(  # type: ignore[override]  # the library's returns a class of its own
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], Extension]:
        """Raises NegotiationError for an offer that is declined."""
        answer, _ = super().process_request_params(params, accepted_extensions)
        window = dict(answer).get("server_max_window_bits")
        if window is None:
            return answer, _DEFLATE
        if int(window) < WINDOW_BITS:
            raise NegotiationError(f"server_max_window_bits below {WINDOW_BITS}")
        kept = [(name, value) for name, value in answer if name != "server_max_window_bits"]
        return [*kept, ("server_max_window_bits", str(WINDOW_BITS))], _DEFLATE
