"""A proxy on loopback that speaks HTTP CONNECT (RFC 9110, 9.3.6) or SOCKS5 (RFC 1928, 1929), and can fail."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

LOGIN = ("alice", "s3cret:@/?")
LOGIN_QUOTED = "alice:s3cret%3A%40%2F%3F"


class RefusalError(Exception):
    """A refusal: the proxy sends `answer` and closes the connection."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer


class StandIn:
    """The proxy server.

    `hosts` are the names that it resolves, `wants` is the login that it requires, `says` is sent instead of opening a
    tunnel, and with `dribbles` it sends its answer byte by byte. `asked` lists the requested targets.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.hosts: dict[str, str] = {"localhost": "127.0.0.1"}
        self.wants: tuple[str, str] | None = None
        self.says: bytes | None = None
        self.dribbles = False
        self.asked: list[str] = []
        self.port = 0

    def url(self, scheme: str, login: str = "") -> str:
        return f"{scheme}://{login + '@' if login else ''}127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                try:
                    await (self._connect if self.kind == "http" else self._socks)(reader, writer)
                except RefusalError as refusal:
                    writer.write(refusal.answer)
                    await writer.drain()
        finally:
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        self.asked.append(target)
        if method != "CONNECT":
            raise RefusalError(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
        if self.says is not None:
            raise RefusalError(self.says)
        if self.wants is not None:
            token = base64.b64encode(":".join(self.wants).encode()).decode()
            if f"Proxy-Authorization: Basic {token}" not in head:
                raise RefusalError(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        host, _, port = target.rpartition(":")
        answer = b"HTTP/1.1 200 OK\r\nVia: 1.1 stand-in\r\nContent-Length: 0\r\n\r\n"
        there = await self._reach(host.strip("[]"), int(port), b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        await self._answer(writer, answer)
        await _both_ways(reader, writer, *there)

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version, count = await reader.readexactly(2)
        methods = await reader.readexactly(count)
        method = 0 if self.wants is None else 2
        if version != 5 or method not in methods:
            raise RefusalError(b"\x05\xff")
        writer.write(bytes([5, method]))
        if self.wants is not None:
            _, length = await reader.readexactly(2)
            user = await reader.readexactly(length)
            password = await reader.readexactly((await reader.readexactly(1))[0])
            if (user.decode(), password.decode()) != self.wants:
                raise RefusalError(b"\x01\x01")
            writer.write(b"\x01\x00")
        _, command, _, kind = await reader.readexactly(4)
        assert command == 1
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = str(ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append(f"{host}:{port}")
        if self.says is not None:
            raise RefusalError(self.says)
        there = await self._reach(host, port, b"\x05\x05\x00\x01" + bytes(6))
        await self._answer(writer, b"\x05\x00\x00\x03\x09localhost\x00\x01")
        await _both_ways(reader, writer, *there)

    async def _answer(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        pieces = [answer[index : index + 1] for index in range(len(answer))] if self.dribbles else [answer]
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    async def _reach(self, host: str, port: int, refusal: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            address = self.hosts.get(host) or str(ip_address(host))
            return await asyncio.open_connection(address, port)
        except (OSError, ValueError) as error:
            raise RefusalError(refusal) from error


async def _both_ways(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there_reader: asyncio.StreamReader,
    there_writer: asyncio.StreamWriter,
) -> None:
    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))


@asynccontextmanager
async def stand_in(kind: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[StandIn]:
    """Run a proxy; `kind` is http or socks5."""
    proxy = StandIn(kind)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
