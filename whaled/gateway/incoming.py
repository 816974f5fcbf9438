"""Assembles the data frames of one client into messages, and inflates compressed ones.

Pure.
"""

from collections.abc import Callable

from websockets.frames import Frame, Opcode

from whaled.errors import Close
from whaled.gateway.deflate import DeflatedFrame, DeflateError, InflatedTooBigError, Inflater


class UnreadableError(Exception):
    """A message that closes the connection."""

    def __init__(self, close: Close) -> None:
        super().__init__(close.reason)
        self.close = close


class Incoming:
    """The message that a client is sending, and its decompressor, which is created for a client that compresses.

    `limit_bytes` is the limit of an inflated message, the same as the limit of a plain one.
    """

    __slots__ = ("_fragments", "_inflater", "_is_deflated", "_limit_bytes", "_skipped", "is_text")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._fragments: bytearray | None = None
        self._inflater: Inflater | None = None
        self._is_deflated = False
        self._skipped = False  # a compressed message was over the rate limit
        self.is_text = True

    def add(self, frame: Frame) -> bytes | None:
        """Add a frame. Return the data of the message if this frame completes it, else None."""
        if frame.opcode is not Opcode.CONT:
            self.is_text = frame.opcode is Opcode.TEXT
            self._is_deflated = isinstance(frame, DeflatedFrame)
            self._fragments = bytearray()
        assert self._fragments is not None  # ServerProtocol refuses a continuation of nothing
        self._fragments += frame.data
        if not frame.fin:
            return None
        data, self._fragments = bytes(self._fragments), None
        return data

    def read(self, data: bytes, would_parse: Callable[[], bool]) -> bytes:
        """Return the message in the data that `add` returned, inflated if necessary. Raises UnreadableError.

        A message that would not be parsed is not inflated.
        """
        if self._is_deflated:
            if self._inflater is None:
                self._inflater = Inflater()
            if not self.is_text or not would_parse():
                self._inflater.skip()
                self._skipped = self._skipped or self.is_text
                return data
            data = self._inflated(self._inflater, data)
        if self.is_text and not _is_utf8(data):
            raise UnreadableError(Close.NOT_UTF8)
        return data

    def _inflated(self, inflater: Inflater, data: bytes) -> bytes:
        try:
            return inflater.inflate(data, self._limit_bytes)
        except InflatedTooBigError:
            raise UnreadableError(Close.FRAME_TOO_BIG) from None
        except DeflateError:
            # A client that breaks the agreement may refer to a message that was skipped for its rate.
            raise UnreadableError(Close.RATE_LIMITED if self._skipped else Close.BAD_DEFLATE) from None


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
