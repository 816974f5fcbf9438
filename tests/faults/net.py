"""What stands between whaled and whoever it talks to, and spoils it: a TCP proxy and a reverse proxy for REST."""

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

from support import SMALL_SEGMENT
from whaled.listening import stop_accepting

CHUNK = 65536
CLOSE_WAIT_S = 1.0


class Way(Enum):
    """Where bytes go: `UP` to the server, `DOWN` to the client."""

    UP = auto()
    DOWN = auto()


class Cut(Struct, frozen=True):
    """Where a connection is cut: after `part` (0..1) of a frame. Frame 0 is the HTTP handshake, WebSocket frames count
    from 1.
    """

    way: Way
    frame: int
    part: float = 1.0


class Piece(Struct, frozen=True):
    """Bytes of one frame: which, from where in it, and how long it is (None while its header is not whole)."""

    frame: int
    at: int
    data: bytes
    total: int | None

    @property
    def is_last(self) -> bool:
        return self.total is not None and self.at + len(self.data) == self.total


class Frames:
    """Tells the frames of one direction apart: an HTTP head, then WebSocket frames (RFC 6455, 5.2)."""

    def __init__(self) -> None:
        self._frame = 0
        self._at = 0
        self._total: int | None = None
        self._head = b""

    @property
    def is_between(self) -> bool:
        """No frame is under way."""
        return self._at == 0 and not self._head

    def split(self, data: bytes) -> Iterator[Piece]:
        """The bytes as pieces of frames. A head that is not whole yet is held back."""
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
    """A WebSocket frame of a server. `announced` lies about the length."""
    return struct.pack("!BBQ", first_byte, 127, len(payload) if announced is None else announced) + payload


class Pace(Struct):
    """How fast what comes down is read: so many bytes at a time, and a pause after them."""

    at_once: int = CHUNK
    pause_s: float = 0.0


class Theft(Struct):
    """The next whole frame that `takes` likes never arrives, and nothing else is wrong. Tells whether that happened."""

    takes: Callable[[bytes], bool]
    is_done: bool = False

    async def was_done(self) -> bool:
        """For `Rig.until`."""
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
        """Forward nothing from now on, and tell nobody: what a router does that forgot the connection."""
        self._moving.clear()

    def insert(self, frame: bytes) -> None:
        """Put a frame of our own before the next one of the server."""
        self._inserts.append(frame)
        if self._frames[Way.DOWN].is_between:
            self._flush()

    def steal(self, theft: Theft) -> None:
        """Hold back whole frames of the server, from the next one on, until one of them is taken."""
        self._theft = theft

    def _let_through(self, piece: Piece, writer: asyncio.StreamWriter) -> None:
        """Pass a piece on: at once, or as a whole frame while one is looked for, or not at all."""
        if piece.at and not self._held:
            writer.write(piece.data)  # began before anybody looked
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
        """What was taken in is passed on, if somebody takes it."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_WAIT_S):
                for _, writer in self._ends.values():
                    writer.close()
                for _, writer in self._ends.values():
                    await writer.wait_closed()

    async def run(self) -> None:
        """Forward until either side ends, or the cut."""
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
    """Listens on a port of its own and forwards to `target`; without one, connections are reset.

    `cuts` are taken by connections in their order, None for one that is left alone. One not reached is put back.
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
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        """Listen."""
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
        """Half-open: the connections there are stay, and nothing goes through them any more. New ones work."""
        for pipe in self._pipes:
            pipe.freeze()

    def insert(self, frame: bytes) -> None:
        """A frame of our own to every client."""
        for pipe in self._pipes:
            pipe.insert(frame)

    def steal(self, takes: Callable[[bytes], bool]) -> Theft:
        """Swallow one frame of the server that `takes` likes, while the connection stays as it is."""
        theft = Theft(takes)
        for pipe in self._pipes:
            pipe.steal(theft)
        return theft

    async def _connected(self, target: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the server. With small buffers of the kernel, what is not read piles up in the server."""
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
    """What a REST question gets instead of its answer."""

    STATUS = auto()
    HANG = auto()
    SLOW = auto()
    GARBAGE = auto()
    TRUNCATED = auto()
    RESET = auto()


class Trouble(Struct):
    """The next `times` questions of each path that matches get `reply`. `tried` counts the hits."""

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
    """REST through a reverse proxy. `troubles` are looked at in their order, the first that matches is done."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._port = 0
        self.troubles: list[Trouble] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Of the REST interface."""
        return f"http://127.0.0.1:{self._port}/api/v1/"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Gate"]:
        """Listen."""
        app = web.Application()
        app.router.add_route("*", "/api/v1/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        async with AsyncExitStack() as stack:
            # A fresh connection for each question: an idle one may be dead after a restart, and that is no answer.
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
        """Half of the answer, then the connection ends."""
        content = answer[2]
        response = web.StreamResponse(headers={"Content-Length": str(len(content) + 1)})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        return _reset(request)


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
