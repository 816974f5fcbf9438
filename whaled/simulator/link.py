"""The connection of one client: its unsent frames, with the real backend's limit."""

import asyncio
from collections import deque

from aiohttp import ClientConnectionResetError, WSMsgType
from aiohttp.web import WebSocketResponse

from whaled.simulator.dialogue import Dialogue

# `websocket-handler.ts:1386`: with more unsent bytes, the backend aborts the connection without a close frame.
MAX_BUFFERED_BYTES = 10_000_000
# Timeout for a client's close frame.
CLOSE_WAIT_S = 1.0


class Link:
    """A connection with an outbox: `send` fills it, `pump` empties it. While `running` is not set, nothing is sent."""

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
        """Queue a frame. Aborts the connection if the client has too many unsent bytes."""
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
        """Send queued frames until cancelled."""
        while True:
            await self._filled.wait()
            await self._running.wait()
            while self._outbox and self._running.is_set():
                payload, kind = self._outbox.popleft()
                self._waiting -= len(payload)
                try:
                    await self._socket.send_frame(payload, kind)
                except (ClientConnectionResetError, ConnectionError):
                    # The reading task also detects the end of the connection, and cancels this one.
                    self._outbox.clear()
                    self._waiting = 0
            if not self._outbox:
                self._filled.clear()
                self.idle.set()
