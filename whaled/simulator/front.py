"""The simulator's listening socket and the connections on it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from aiohttp import WSMsgType, web

from whaled.errors import ListenError
from whaled.listening import stop_accepting
from whaled.simulator.backend import Update
from whaled.simulator.dialogue import MAX_MESSAGE_BYTES, HangUp
from whaled.simulator.link import CLOSE_WAIT_S, Link
from whaled.simulator.messages import Messages, join
from whaled.simulator.rest import Handler

CONTROL_PREFIX = "/simulator"
# Timeout for requests in progress when the simulator stops.
STOP_WAIT_S = 1.0


class Front:
    """The server: the stream on any path, and the routes of `app` for requests without a WebSocket upgrade.

    `messages` returns the messages of the current backend process. While `running` is not set, the server neither sends
    nor reads messages. Connections to the control routes survive `go_down`: they are not the backend's.
    """

    def __init__(self, host: str, port: int, running: asyncio.Event, messages: Callable[[], Messages]) -> None:
        self.port = port
        self.links: set[Link] = set()
        self.subscribed = asyncio.Event()
        self.app = web.Application(middlewares=[self._upgrade])
        self._host = host
        self._running = running
        self._messages = messages
        self._spared: set[asyncio.Transport] = set()
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=STOP_WAIT_S, handler_cancellation=True)
        self._listener: asyncio.Server | None = None

    async def come_up(self) -> None:
        """Listen; after a `go_down` on the same port. Raises ListenError if the port is not available."""
        if self._runner.server is None:
            await self._runner.setup()
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._runner.server, self._host, self.port, reuse_address=True)
        except OSError as error:
            raise ListenError(self._host, self.port, error, "choose another --port") from error
        self.port = self._listener.sockets[0].getsockname()[1]

    async def go_down(self) -> None:
        """Behave like a process that has died: abort connections without close frames, and refuse new ones."""
        await self._stop_listening()
        self.subscribed.clear()
        self._abort_connections()

    async def close(self) -> None:
        """Stop the server for good."""
        await self._stop_listening()
        self._spared.clear()
        self._abort_connections()
        await self._runner.cleanup()

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            await stop_accepting([self._listener])
            self._listener = None

    def broadcast(self, update: Update) -> None:
        """Send an update to all clients that are subscribed to it."""
        messages = self._messages()
        messages.changed()
        if not self.links:
            return
        own = messages.update(update)
        for link in list(self.links):
            parts = link.dialogue.push(update, own, messages)
            if parts:
                link.send(join(parts))

    def _abort_connections(self) -> None:
        server = self._runner.server
        for connection in server.connections if server else ():
            if connection.transport is not None and connection.transport not in self._spared:
                connection.transport.abort()

    @web.middleware
    async def _upgrade(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        # Like the real backend, this accepts a WebSocket on any path.
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._serve(request)
        if request.path.startswith(CONTROL_PREFIX):
            with self._spare(request.transport):
                return await handler(request)
        return await handler(request)

    @contextmanager
    def _spare(self, transport: asyncio.Transport | None) -> Iterator[None]:
        if transport is None:
            yield
            return
        self._spared.add(transport)
        try:
            yield
        finally:
            self._spared.discard(transport)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        # aiohttp refuses a message that reaches its limit, the real backend one that exceeds it.
        socket = web.WebSocketResponse(
            autoping=False, compress=False, max_msg_size=MAX_MESSAGE_BYTES + 1, timeout=CLOSE_WAIT_S, decode_text=False
        )
        await socket.prepare(request)
        if request.transport is None:
            return socket
        link = Link(socket, request.transport, self._running)
        self.links.add(link)
        try:
            async with asyncio.TaskGroup() as tasks:
                pump = tasks.create_task(link.pump())
                await self._listen(socket, link)
                pump.cancel()
        finally:
            self.links.discard(link)
            link.idle.set()
        return socket

    async def _listen(self, socket: "web.WebSocketResponse[bool]", link: Link) -> None:
        async for message in socket:
            await self._running.wait()
            if message.type is WSMsgType.PING:
                link.send(message.data, WSMsgType.PONG)
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                continue
            try:
                parts = link.dialogue.receive(message.data, time.monotonic(), self._messages())
            except HangUp:
                await _hang_up(socket)
                return
            if link.dialogue.is_subscribed:
                self.subscribed.set()
            if parts:
                link.send(join(parts))


async def _hang_up(socket: "web.WebSocketResponse[bool]") -> None:
    """Close without a code, then wait at most CLOSE_WAIT_S for the client's close frame."""
    await socket.send_frame(b"", WSMsgType.CLOSE)
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_WAIT_S):
            async for _ in socket:
                continue
