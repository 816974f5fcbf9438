"""A WebSocket client that sends exactly the bytes it is given, and the frames of both sides."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kit.gateway import Rig

TEXT, PING, PONG, CLOSE, CONTINUATION = 1, 9, 10, 8, 0


def request(path: str = "/", *headers: str) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13", *headers, "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1")


def masked(opcode: int, body: bytes = b"", *, fin: bool = True) -> bytes:
    """Return a client's frame; the mask is zeros."""
    size = bytes((0x80 | len(body),)) if len(body) < 126 else b"\xfe" + len(body).to_bytes(2)
    return bytes((opcode | (0x80 if fin else 0),)) + size + bytes(4) + body


class Raw:
    """A client that writes exactly the bytes of the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._is_answered = False

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the server's next frame."""
        first, body = await self.whole_frame()
        return first & 0x0F, body

    async def whole_frame(self) -> tuple[int, bytes]:
        """First byte and payload of the server's next frame."""
        if not self._is_answered:
            assert await self.status() == 101
        async with asyncio.timeout(10):
            first, size = await self.reader.readexactly(2)
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2))
            return first, await self.reader.readexactly(size)

    async def told(self, kind: str) -> Any:
        """The next JSON frame of a type."""
        while True:
            opcode, body = await self.frame()
            if opcode == TEXT and (message := json.loads(body))["type"] == kind:
                return message

    async def closed(self) -> tuple[int, str]:
        """Code and reason of the close frame, after whatever comes before it."""
        while True:
            opcode, body = await self.frame()
            if opcode == CLOSE:
                return int.from_bytes(body[:2]), body[2:].decode()

    async def status(self) -> int:
        """The status of the answer to the handshake."""
        self._is_answered = True
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1])

    async def rest(self) -> bytes:
        """Everything until the server ends the connection."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
        return b""


@asynccontextmanager
async def raw(rig: Rig, *first: bytes) -> AsyncIterator[Raw]:
    host, port = rig.url.removeprefix("ws://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    client = Raw(reader, writer)
    client.send(b"".join(first))
    try:
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def payload(frame: bytes) -> Any:
    """Return the JSON in an unmasked text frame, by the length rules of RFC 6455."""
    assert frame[0] == 0x81
    size, start = frame[1], 2
    if size == 126:
        size, start = int.from_bytes(frame[2:4]), 4
    elif size == 127:
        size, start = int.from_bytes(frame[2:10]), 10
    assert len(frame) == start + size
    return json.loads(frame[start:])
