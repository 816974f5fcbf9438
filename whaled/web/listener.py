"""The listener of the HTTP server: accepts and admits connections, and cuts those that are idle, slow or too many.

aiohttp serves a connection and limits how much it reads ahead. It limits neither the number of connections nor the time
of a request head or an unread response, and asyncio's own accept loop logs a traceback for each connection when
descriptors run out.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from enum import StrEnum

import structlog
from aiohttp import hdrs, web
from msgspec import Struct

from whaled.config.sections import HttpSettings
from whaled.listening import SHORTAGES, peer_address, source_of
from whaled.summaries import Summary
from whaled.web.meters import ConnectionMeter, Cut
from whaled.web.pace import Pace

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The number of connections that the kernel holds until they are accepted. Beyond it, a client retries after a second.
BACKLOG = 1024
# The interval at which the time limits of connections are checked.
SWEEP_S = 0.25
# A connection whose peer has read nothing for this time may be displaced by a new one.
STALLED_S = 1.0
# The pause after a new connection that was refused or displaced another. Each costs the event loop 200 us, so a flood
# takes at most a fifth of its time.
CROWDED_S = 0.001
# The pause before the next accept when descriptors or memory are short. Connections wait in the kernel.
ACCEPT_PAUSE_S = 1.0

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def _unreadable(status: int) -> web.Response:
    return web.Response(status=status, text="the request could not be read\n")


class Replies(Struct, frozen=True):
    """The responses to what no handler sees: a request that is not HTTP, and a head that is too large (as bytes)."""

    unreadable: Callable[[int], web.Response] = _unreadable
    too_large: bytes = TOO_LARGE


REPLIES = Replies()


class _Phase(StrEnum):
    HEAD = "head"  # the first request, or the rest of a request head, has not arrived yet
    IDLE = "idle"  # between two requests
    TURN = "turn"  # a request waits for the rate limit
    ANSWER = "answer"  # a request is being answered


class Connection(web.RequestHandler):
    """aiohttp's connection with limits. Requests are handled one at a time; pipelined ones wait in the kernel."""

    __slots__ = ("_listener", "_phase", "_since", "_stream", "_turn", "_unread", "_unsent_since", "source")

    def __init__(self, server: web.Server, listener: "Listener", source: str) -> None:
        super().__init__(
            server, loop=asyncio.get_running_loop(), access_log=None, lingering_time=0.0  # type: ignore[arg-type]  # as AppRunner passes it
        )  # fmt: skip
        self.source = source
        self._listener = listener
        self._stream: asyncio.Transport | None = None
        self._phase = _Phase.HEAD
        self._since = self._loop.time()
        self._unread = 0
        self._turn: asyncio.Future[None] | None = None
        self._unsent_since: float | None = None

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection, unless it has been displaced since it was accepted."""
        assert isinstance(transport, asyncio.Transport)
        self._stream = transport
        # Have pause_writing called as soon as any byte is unsent.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        if not self._listener.holds(self):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Handle bytes of requests, and cut a connection whose request head is too large."""
        requests = self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self._unread = 0
            if not self._is_busy:
                self._enter(_Phase.ANSWER)
        elif data and not self._is_busy:
            if self._phase is _Phase.IDLE:
                self._enter(_Phase.HEAD)
            self._unread += len(data)
            if self._unread > self._listener.settings.max_request and self._stream is not None:
                self._stream.write(self._listener.replies.too_large)
                self.cut(Cut.REQUEST_TOO_LARGE)

    def pause_writing(self) -> None:
        """Record that the kernel does not take all of a response now."""
        super().pause_writing()
        self._unsent_since = self._loop.time()

    def resume_writing(self) -> None:
        """Record that the kernel has taken everything."""
        super().resume_writing()
        self._unsent_since = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop counting a connection that is closed, and cancel its turn."""
        self._listener.forget(self)
        if self._turn is not None:
            self._turn.cancel()
        super().connection_lost(exc)

    # --- aiohttp ---

    async def turn(self) -> None:
        """Wait until the rate limit admits the current request. The connection may be displaced in the meantime."""
        self._turn = self._listener.pace.turn()
        if self._turn is None:
            return
        self._listener.meter.delayed()
        self._enter(_Phase.TURN)
        await self._turn
        self._enter(_Phase.ANSWER)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a response. Return once the kernel has taken it or the connection is lost."""
        resp.headers.setdefault(hdrs.SERVER, "whaled")  # aiohttp's default reveals its version and that of Python
        result = await super().finish_response(request, resp, start_time)
        self._listener.meter.answered(result[0].status)
        self._enter(_Phase.ANSWER if self._messages else _Phase.IDLE)
        return result

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to an invalid request or to a bug.

        An invalid request is not logged, since any client could fill the log with them.
        """
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        answer = self._listener.replies.unreadable(status)
        answer.force_close()
        return answer

    # --- limits ---

    def overdue(self, now: float) -> Cut | None:
        """Return the time limit that the connection has exceeded, if any."""
        settings = self._listener.settings
        if self._unsent_since is not None and now - self._unsent_since > settings.write_timeout:
            return Cut.WRITE_TIMEOUT
        waited_s = now - self._since
        if self._phase is _Phase.HEAD and waited_s > settings.header_timeout:
            return Cut.HEADER_TIMEOUT
        if self._phase is _Phase.IDLE and waited_s > settings.idle_timeout:
            return Cut.IDLE_TIMEOUT
        return None

    def waited_s(self, now: float) -> float | None:
        """Return the seconds without progress; None if the connection may not be displaced.

        It may not while a request is being answered and its response is being read.
        """
        if self._unsent_since is not None:
            stalled_s = now - self._unsent_since
            return stalled_s if stalled_s > STALLED_S else None
        return None if self._phase is _Phase.ANSWER else now - self._since

    def cut(self, reason: Cut) -> None:
        """Close the connection now. Unsent bytes are lost."""
        self._listener.meter.cut(reason)
        self._listener.forget(self)
        if self._stream is not None:
            self._stream.abort()

    @property
    def _is_busy(self) -> bool:
        return self._phase in {_Phase.TURN, _Phase.ANSWER}

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = self._loop.time()


class Listener:
    """The connections of the HTTP server."""

    def __init__(
        self, settings: HttpSettings, server: web.Server, meter: ConnectionMeter, replies: Replies = REPLIES
    ) -> None:
        self.replies = replies
        self.settings = settings
        self.pace = Pace(settings.requests_per_second)
        self.meter = meter
        self._server = server
        self._connections: dict[Connection, None] = {}
        self._by_source: dict[str, int] = {}
        self._shortages = Summary(logger, "http_accept_failed", level="warning", per_source=1, in_all=1)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    def reconfigure(self, settings: HttpSettings) -> None:
        """Apply new limits."""
        self.settings = settings
        self.pace.reconfigure(settings.requests_per_second)

    def holds(self, connection: Connection) -> bool:
        """Return whether a connection is counted: neither displaced nor closed."""
        return connection in self._connections

    @asynccontextmanager
    async def accepting(self, sockets: Iterable[socket.socket]) -> AsyncIterator[None]:
        """Accept from listening sockets while the context is open. Open connections remain open afterwards."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._accept(sock), name="http accept") for sock in sockets]
            running.append(tasks.create_task(self._sweep(), name="http time limits"))
            try:
                yield
            finally:
                for task in running:
                    task.cancel()
                self._shortages.flush()

    async def _accept(self, listening: socket.socket) -> None:
        """Accept one connection per iteration of the loop."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listening)
            except OSError as error:
                # Any other error is of one connection that its peer has already closed (accept(2)).
                if error.errno in SHORTAGES:
                    self.meter.accept_failed()
                    self._shortages.line("accept", error=error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_S if error.errno in SHORTAGES else 0)
                continue
            source = source_of(peer_address(peer))
            was_crowded = self._is_full() or self._is_address_full(source)
            refusal = self._admit(source)
            if refusal is not None:
                self.meter.cut(refusal)
                sock.close()
                await asyncio.sleep(CROWDED_S)
                continue
            connection = Connection(self._server, self, source)
            self._connections[connection] = None
            self._by_source[source] = self._by_source.get(source, 0) + 1
            try:
                await loop.connect_accepted_socket(lambda made=connection: made, sock)  # type: ignore[misc]
            except OSError:
                self.forget(connection)
                sock.close()
            if was_crowded:
                await asyncio.sleep(CROWDED_S)

    def _is_full(self) -> bool:
        return len(self._connections) >= self.settings.max_connections

    def _is_address_full(self, source: str) -> bool:
        # All clients of a Unix socket have the same address.
        return source != "unix" and self._by_source.get(source, 0) >= self.settings.max_connections_per_address

    def _admit(self, source: str) -> Cut | None:
        """Make room for a new connection, displacing another if necessary. Return why it is refused, or None."""
        is_address_full = self._is_address_full(source)
        if not is_address_full and not self._is_full():
            return None
        crowded = source if is_address_full else max(self._by_source, key=self._by_source.__getitem__)
        now = asyncio.get_running_loop().time()
        waiting = [
            (waited_s, connection)
            for connection in self._connections
            if connection.source == crowded and (waited_s := connection.waited_s(now)) is not None
        ]
        if not waiting:
            return Cut.ADDRESS_FULL if is_address_full else Cut.FULL
        _, longest = max(waiting, key=lambda found: found[0])
        longest.cut(Cut.DISPLACED)
        return None

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in list(self._connections):
                reason = connection.overdue(now)
                if reason is not None:
                    connection.cut(reason)

    def forget(self, connection: Connection) -> None:
        """Stop counting a connection. A second call does nothing."""
        if connection not in self._connections:
            return
        del self._connections[connection]
        left = self._by_source[connection.source] - 1
        if left:
            self._by_source[connection.source] = left
        else:
            del self._by_source[connection.source]
