"""Frames of RFC 6455 around the JSON messages to clients.

Frames from a server are not masked (5.1), so the same bytes serve every client.

Pure.
"""

PING_FRAME = b"\x89\x00"


def text_frame(payload: bytes, *, is_compressed: bool = False) -> bytes:
    """Return a final, unmasked text frame with this payload (RFC 6455, 5.2)."""
    first = 0xC1 if is_compressed else 0x81
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2) + payload
    return bytes((first, 127)) + size.to_bytes(8) + payload


def payload_of(frame: bytes) -> memoryview:
    """Return the payload of a frame made by `text_frame`."""
    return memoryview(frame)[{126: 4, 127: 10}.get(frame[1], 2) :]
