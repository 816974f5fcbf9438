"""A running HTTP server, and clients with raw sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from whaled.config.sections import HttpSettings
from whaled.metrics import Metrics
from whaled.model import Position, UpstreamState
from whaled.web.app import Health, HttpServer
from whaled.web.exposition import Format

HEALTH = Health(
    status="ok",
    upstream=UpstreamState.CONNECTED,
    shortfall=None,
    connections=0,
    position=Position("e", 0),
    version="0",
)
LIMIT_S = 20


class Answer:
    """A response as it was on the wire."""

    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
        self.body = body


class Visitor:
    """A client that writes and reads only when the test does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str = "/metrics", *headers: str, host: str = "localhost") -> Answer:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *headers]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        return await self.answer()

    async def answer(self) -> Answer:
        async with asyncio.timeout(LIMIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
            length = int(Answer(head, b"").headers["content-length"])
            return Answer(head, await self.reader.readexactly(length))

    async def closed(self) -> bytes:
        """Return what still comes until the server closes."""
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


class Rig:
    def __init__(self, address: str, metrics: Metrics, server: HttpServer) -> None:
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        self.metrics = metrics
        self.server = server

    @asynccontextmanager
    async def visitor(self, source: str = "127.0.0.1", receive_buffer: int | None = None) -> AsyncIterator[Visitor]:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((source, 0))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024 if receive_buffer else 2**20)
        try:
            yield Visitor(reader, writer)
        finally:
            writer.transport.abort()

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.collectors.get_sample_value(name, labels)
        assert value is not None
        return value

    def cut(self, reason: str) -> float:
        return self.value("whaled_http_connections_cut_total", reason=reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - a metric is no event
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(render: Callable[[Format], bytes] | None = None, **settings: Any) -> AsyncIterator[Rig]:
    metrics = Metrics()
    server = HttpServer(
        HttpSettings(port=0, **settings), metrics=render or metrics.render, health=lambda: HEALTH, meter=metrics.http
    )
    async with server.serving() as address:
        assert address is not None
        yield Rig(address, metrics, server)
