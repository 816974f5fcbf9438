"""What a broken, hostile or unlucky client can do to the gateway: nothing to others, and nothing for long."""

import asyncio
import base64
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from support import Rig, alert_draft, ask, receive, receive_type, running_gateway
from test_gateway import closed_with, offsets, stuffed_client, until
from test_session import Tokens
from whaled.auth.tokens import KeyRing, SigningKey, verify
from whaled.config.sections import Auth
from whaled.errors import TokenError, TokenRefusal
from whaled.gateway.limits import ConnectionCaps, FailureLimit, Refusal
from whaled.gateway.server import TURNED_AWAY_LIMIT
from whaled.model import UpstreamState

TEXT, PING, PONG, CLOSE, CONTINUATION = 1, 9, 10, 8, 0


def request(path: str = "/", *headers: str) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13", *headers, "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1")


def masked(opcode: int, body: bytes = b"", *, fin: bool = True) -> bytes:
    """A client's frame; the mask is zeros."""
    size = bytes((0x80 | len(body),)) if len(body) < 126 else b"\xfe" + len(body).to_bytes(2)
    return bytes((opcode | (0x80 if fin else 0),)) + size + bytes(4) + body


class Raw:
    """A client that says exactly what it is told to say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def frame(self) -> tuple[int, bytes]:
        """The server's next frame."""
        async with asyncio.timeout(10):
            first, size = await self.reader.readexactly(2)
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2))
            return first & 0x0F, await self.reader.readexactly(size)

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


@pytest.fixture(autouse=True)
def _nothing_escapes(caplog: pytest.LogCaptureFixture) -> Any:
    """asyncio logs what a callback raised, and every write into a lost connection: neither may happen."""
    yield
    said = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert [line for line in said if logging.WARNING <= logging.getLogger("asyncio").getEffectiveLevel()] == []
    assert said == []


# --- a client that stops sending -------------------------------------------------------------------------------------


async def test_a_client_that_half_closes_with_bytes_unsent_disturbs_no_publication(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_unsent=300_000, close_timeout=0.2) as rig:
        stuck = stuffed_client(rig)
        try:
            await until(lambda: rig.gateway.hub.live_members == 1)
            async with rig.connect(max_queue=None) as other:
                await until(lambda: rig.gateway.hub.live_members == 2)
                count = 0
                while all(connection.fd >= 0 for connection in rig.gateway.hub.members()):
                    await rig.alerts(*range(count, count + 50))
                    count += 50
                stuck.shutdown(socket.SHUT_WR)
                await until(lambda: rig.gateway.closing == 1)
                await rig.alerts(count)
                assert await offsets(other, count + 1) == list(range(1, count + 2))
                await until(lambda: rig.gateway.connections == 1)
                assert rig.value("whaled_connections_closed_total", code="1006") == 1
        finally:
            stuck.close()
