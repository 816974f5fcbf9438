"""One client's connection: what waits to be sent, bounded as the real backend bounds it."""

import asyncio
from collections import deque

from aiohttp import ClientConnectionResetError, WSMsgType
from aiohttp.web import WebSocketResponse

from whaled.simulator.dialogue import Dialogue

# `websocket-handler.ts:1386`: more than this unsent, and the connection is cut without a close frame.
MAX_BUFFERED_BYTES = 10_000_000
# How long a client has to answer a close frame.
CLOSE_WAIT_S = 1.0


class Link:
    """Frames go into an outbox by `send` and out by `pump`. While `running` is not set nothing leaves."""

    def __init__(self, socket: WebSocketResponse, transport: asyncio.Transport, running: asyncio.Event) -> None:
        self.dialogue = Dialogue()
        self.idle = asyncio.Event()
        self.idle.set()
        self._socket = socket
        self._transport = transport
        self._running = running
        self._outbox: deque[tuple[bytes, WSMsgType]] = deque()
        self._waiting = 0
        self._filled = asyncio.Event()
        self._is_cut = False

    def send(self, payload: bytes, kind: WSMsgType = WSMsgType.TEXT) -> None:
        """Queue a frame; a client that does not read is cut off."""
        if self._is_cut:
            return
        if self._waiting + self._transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            self.abort()
            return
        self._outbox.append((payload, kind))
        self._waiting += len(payload)
        self.idle.clear()
        self._filled.set()

    def abort(self) -> None:
        """End the connection without a close frame."""
        self._is_cut = True
        self._outbox.clear()
        self._waiting = 0
        self._transport.abort()

    async def pump(self) -> None:
        """Send what is queued, for ever."""
        while True:
            await self._filled.wait()
            await self._running.wait()
            while self._outbox and self._running.is_set():
                payload, kind = self._outbox.popleft()
                self._waiting -= len(payload)
                try:
                    await self._socket.send_frame(payload, kind)
                except (ClientConnectionResetError, ConnectionError):
                    # The reader sees the end of the connection too, and ends this.
                    self._outbox.clear()
                    self._waiting = 0
            if not self._outbox:
                self._filled.clear()
                self.idle.set()
