"""Proxies that inject faults between whaled and its peers: a TCP proxy, and a reverse proxy for REST."""

import asyncio
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import Enum, auto

import aiohttp
from aiohttp import web
from msgspec import Struct

from kit.gateway import SMALL_SEGMENT
from whaled.listening import stop_accepting

CHUNK = 65536
CLOSE_WAIT_S = 1.0


class Way(Enum):
    """The direction of bytes: `UP` to the server, `DOWN` to the client."""

    UP = auto()
    DOWN = auto()


class Cut(Struct, frozen=True):
    """The point at which a connection is cut: after `part` (0..1) of a frame.

    Frame 0 is the HTTP handshake, WebSocket frames count from 1.
    """

    way: Way
    frame: int
    part: float = 1.0


class Piece(Struct, frozen=True):
    """Bytes of one frame: its number, their offset in it, and its length (None while its header is incomplete)."""

    frame: int
    at: int
    data: bytes
    total: int | None

    @property
    def is_last(self) -> bool:
        return self.total is not None and self.at + len(self.data) == self.total


class Frames:
    """A splitter of one direction into frames: an HTTP head, then WebSocket frames (RFC 6455, 5.2)."""

    def __init__(self) -> None:
        self._frame = 0
        self._at = 0
        self._total: int | None = None
        self._head = b""

    @property
    def is_between(self) -> bool:
        """True if no frame is incomplete."""
        return self._at == 0 and not self._head

    def split(self, data: bytes) -> Iterator[Piece]:
        """Yield the bytes as pieces of frames. An incomplete head is held back."""
        while data:
            if self._total is None:
                self._head += data
                self._total = self._length(self._head)
                if self._total is None:
                    return
                data, self._head = self._head, b""
            part, data = data[: self._total - self._at], data[self._total - self._at :]
            yield Piece(self._frame, self._at, part, self._total)
            self._at += len(part)
            if self._at == self._total:
                self._frame, self._at, self._total = self._frame + 1, 0, None

    def _length(self, head: bytes) -> int | None:
        if self._frame == 0:
            end = head.find(b"\r\n\r\n")
            return None if end < 0 else end + 4
        if len(head) < 2:
            return None
        short, mask = head[1] & 0x7F, 4 if head[1] & 0x80 else 0
        extended = {126: 2, 127: 8}.get(short, 0)
        if len(head) < 2 + extended:
            return None
        payload = int.from_bytes(head[2 : 2 + extended], "big") if extended else short
        return 2 + extended + mask + payload


def text_frame(payload: bytes, *, announced: int | None = None, first_byte: int = 0x81) -> bytes:
    """Return a server's WebSocket frame. `announced` is a false length for its header."""
    return struct.pack("!BBQ", first_byte, 127, len(payload) if announced is None else announced) + payload


class Pace(Struct):
    """The rate at which the server's bytes are read: at most `at_once` bytes, then a pause."""

    at_once: int = CHUNK
    pause_s: float = 0.0


class Theft(Struct):
    """A fault that removes the next whole frame for which `takes` is true. `is_done` is set once that happened."""

    takes: Callable[[bytes], bool]
    is_done: bool = False

    async def was_done(self) -> bool:
        """Return `is_done`, as a condition for `Rig.until`."""
        return self.is_done


class Pipe:
    """One connection through a proxy."""

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        cut: Cut | None,
        pace: Pace,
    ) -> None:
        self._ends = {Way.UP: (client[0], server[1]), Way.DOWN: (server[0], client[1])}
        self._frames = {way: Frames() for way in Way}
        self._cut = cut
        self._pace = pace
        self._theft: Theft | None = None
        self._held = b""
        self._moving = asyncio.Event()
        self._moving.set()
        self._inserts: deque[bytes] = deque()
        self.was_cut = False

    def freeze(self) -> None:
        """Stop forwarding without closing anything, like a router that lost the connection's state."""
        self._moving.clear()

    def insert(self, frame: bytes) -> None:
        """Insert a frame before the server's next one."""
        self._inserts.append(frame)
        if self._frames[Way.DOWN].is_between:
            self._flush()

    def steal(self, theft: Theft) -> None:
        """Buffer the server's frames until each is whole, from the next one on, until one is removed."""
        self._theft = theft

    def _let_through(self, piece: Piece, writer: asyncio.StreamWriter) -> None:
        """Forward a piece: at once, or in a whole frame while one is to be removed, or not at all."""
        if piece.at and not self._held:
            writer.write(piece.data)  # the frame began before `steal`
            return
        self._held += piece.data
        if not piece.is_last:
            return
        frame, self._held, theft = self._held, b"", self._theft
        if theft is not None and theft.takes(frame):
            theft.is_done, self._theft = True, None
        else:
            writer.write(frame)

    def _flush(self) -> None:
        while self._inserts:
            self._ends[Way.DOWN][1].write(self._inserts.popleft())

    def abort(self) -> None:
        """Reset both sides."""
        for _, writer in self._ends.values():
            writer.transport.abort()
        self._moving.set()

    async def _close(self) -> None:
        """Close both sides, flushing buffered bytes for at most CLOSE_WAIT_S."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_WAIT_S):
                for _, writer in self._ends.values():
                    writer.close()
                for _, writer in self._ends.values():
                    await writer.wait_closed()

    async def run(self) -> None:
        """Forward until either side closes, or the connection is cut."""
        copies = {asyncio.ensure_future(self._copy(way)) for way in Way}
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            if not self.was_cut:
                await self._close()
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.wait(copies)
            self.abort()

    async def _copy(self, way: Way) -> None:
        reader, writer = self._ends[way]
        with suppress(OSError):
            while True:
                await self._moving.wait()
                data = await reader.read(self._pace.at_once if way is Way.DOWN else CHUNK)
                await self._moving.wait()
                if not data or writer.is_closing():
                    return
                for piece in self._frames[way].split(data):
                    if self._is_end(way, piece, writer):
                        return
                await writer.drain()
                if way is Way.DOWN and self._pace.pause_s:
                    await asyncio.sleep(self._pace.pause_s)

    def _is_end(self, way: Way, piece: Piece, writer: asyncio.StreamWriter) -> bool:
        cut = self._cut
        if cut is not None and cut.way is way and cut.frame == piece.frame and piece.total is not None:
            stop = int(cut.part * piece.total)
            if piece.at + len(piece.data) >= stop:
                writer.write(piece.data[: stop - piece.at])
                self.was_cut = True
                return True
        if way is Way.DOWN and (self._theft is not None or self._held):
            self._let_through(piece, writer)
        else:
            writer.write(piece.data)
        if way is Way.DOWN and piece.is_last:
            self._flush()
        return False


class Proxy:
    """A TCP proxy that forwards to `target`; without a target, it resets connections.

    Each new connection takes the next of the `cuts`; None leaves a connection intact. A cut that a connection did not
    reach is appended again.
    """

    def __init__(self, target: tuple[str, int] | None = None, *, receive_buffer: int | None = None) -> None:
        self.target = target
        self.pace = Pace()
        self._receive_buffer = receive_buffer
        self.port = 0
        self.connections = 0
        self.cuts: deque[Cut | None] = deque()
        self.cut_count = 0
        self._pipes: set[Pipe] = set()
        self._serving: set[asyncio.Task[None] | None] = set()

    @property
    def address(self) -> str:
        """The host and port."""
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        """Listen on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.target = None
            await stop_accepting([server])
            while self._serving:
                self.cut()
                await asyncio.sleep(0)

    def cut(self) -> None:
        """Reset every connection."""
        for pipe in list(self._pipes):
            pipe.abort()

    def freeze(self) -> None:
        """Make the existing connections half-open: they stay open and forward nothing. New ones work."""
        for pipe in self._pipes:
            pipe.freeze()

    def insert(self, frame: bytes) -> None:
        """Insert a frame into every connection, towards the client."""
        for pipe in self._pipes:
            pipe.insert(frame)

    def steal(self, takes: Callable[[bytes], bool]) -> Theft:
        """Remove one frame of the server for which `takes` is true, without affecting the connection otherwise."""
        theft = Theft(takes)
        for pipe in self._pipes:
            pipe.steal(theft)
        return theft

    async def _connected(self, target: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the server. With small kernel buffers, unread bytes accumulate in the server."""
        if self._receive_buffer is None:
            return await asyncio.open_connection(*target)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, target)
            return await asyncio.open_connection(sock=sock, limit=self._receive_buffer)
        except BaseException:
            sock.close()
            raise

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        self._serving.add(task)
        try:
            await self._forward(reader, writer)
        finally:
            writer.transport.abort()
            self._serving.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.target is None:
            return
        cut = self.cuts.popleft() if self.cuts else None
        try:
            server = await self._connected(self.target)
        except OSError:
            return
        pipe = Pipe((reader, writer), server, cut, self.pace)
        self._pipes.add(pipe)
        try:
            await pipe.run()
        finally:
            self._pipes.discard(pipe)
            self.cut_count += pipe.was_cut
            if cut is not None and not pipe.was_cut:
                self.cuts.append(cut)


class Reply(Enum):
    """The response to a REST request in place of the backend's."""

    STATUS = auto()
    HANG = auto()
    SLOW = auto()
    GARBAGE = auto()
    TRUNCATED = auto()
    RESET = auto()


class Trouble(Struct):
    """A fault: the next `times` requests whose path matches get `reply`. `tried` counts them."""

    reply: Reply
    path: str = ".*"
    status: int = 500
    headers: dict[str, str] = {}
    seconds: float = 0.3
    times: int = 1
    tried: int = 0

    def takes(self, path: str) -> bool:
        if self.times <= 0 or re.fullmatch(self.path, path) is None:
            return False
        self.times -= 1
        self.tried += 1
        return True


class Gate:
    """A reverse proxy for REST. The first of the `troubles` that matches a request is applied."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._port = 0
        self.troubles: list[Trouble] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """The URL of the REST interface."""
        return f"http://127.0.0.1:{self._port}/api/v1/"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Gate"]:
        """Listen on a free port."""
        app = web.Application()
        app.router.add_route("*", "/api/v1/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        async with AsyncExitStack() as stack:
            # A new connection for each request, since an idle one may be dead after a restart.
            self._session = await stack.enter_async_context(
                aiohttp.ClientSession(trust_env=False, connector=aiohttp.TCPConnector(force_close=True))
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._port = runner.addresses[0][1]
            yield self

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.asked.append(path)
        body = await request.read()
        trouble = next((each for each in self.troubles if each.takes(path)), None)
        match trouble:
            case Trouble(reply=Reply.STATUS):
                return web.Response(status=trouble.status, headers=trouble.headers, text="trouble")
            case Trouble(reply=Reply.HANG):
                await asyncio.Event().wait()
            case Trouble(reply=Reply.SLOW):
                await asyncio.sleep(trouble.seconds)
            case Trouble(reply=Reply.GARBAGE):
                return web.Response(body=b"<html>\xff\x00 not JSON", content_type="application/json")
            case Trouble(reply=Reply.TRUNCATED):
                return await self._truncated(request, await self._asked(request, path, body))
            case Trouble(reply=Reply.RESET):
                return _reset(request)
        try:
            status, kind, content = await self._asked(request, path, body)
        except (aiohttp.ClientError, OSError):
            return _reset(request)
        return web.Response(status=status, body=content, headers={"Content-Type": kind})

    async def _asked(self, request: web.Request, path: str, body: bytes) -> tuple[int, str, bytes]:
        url = f"{self._target}/{path}" + (f"?{request.query_string}" if request.query_string else "")
        async with self._session.request(request.method, url, data=body or None) as response:
            return response.status, response.headers.get("Content-Type", ""), await response.read()

    async def _truncated(self, request: web.Request, answer: tuple[int, str, bytes]) -> web.StreamResponse:
        """Send half of the response, then reset the connection."""
        content = answer[2]
        response = web.StreamResponse(headers={"Content-Length": str(len(content) + 1)})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        return _reset(request)


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
