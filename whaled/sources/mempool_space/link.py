"""One connection to the mempool backend, from its handshake to its end."""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidURI

from whaled.config.sections import UpstreamSettings
from whaled.model import UpstreamState
from whaled.sampling import Sampler
from whaled.source import Connected, Continuity, MempoolChange, Shortfall, SnapshotTaken, StateChanged, StreamMessage
from whaled.sources.mempool_space.address import unusable
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.continuity import SequenceTracker
from whaled.sources.mempool_space.dialect import PING, DialectError, Frame, decode, subscribe_frames
from whaled.sources.mempool_space.link_errors import LINK_ERRORS, diagnose, not_mempool, stale
from whaled.sources.mempool_space.link_state import FeedMeter, LinkState, Surveyor
from whaled.sources.mempool_space.proxy import Target
from whaled.sources.mempool_space.silence import Silence
from whaled.sources.mempool_space.snapshot import SnapshotRound
from whaled.sources.mempool_space.tunnel import Tunnel, tunnel_of
from whaled.urls import without_secrets
from whaled.websocket_client import Connect, hang_up

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Messages read ahead of the consumer; above this, reading from the socket pauses. The limit is small because a message
# can be as big as max_message. It loses nothing: the kernel buffers ~3 MB and the backend another 10 MB (minutes of
# mainnet) before it drops the connection, and a reconnect then closes the gap.
READ_AHEAD = 8
# Time limit for the closing handshake; then the connection is aborted. A peer that stopped reading never replies to it.
CLOSE_TIMEOUT_S = 1.0
# After these, deltas are missing: their transactions are in the mempool or have already left it.
MISSED = (Continuity.GAP, Continuity.RESTARTED)
# Minimum interval between log lines about the same kind of fault.
LOG_INTERVAL_S = 10.0
# Maximum number of unknown keys that a log line shows.
KEYS_SHOWN = 5
# Maximum number of characters that a log line shows of a text from the backend.
KEY_CHARS = 40
# Number of bytes quoted from the first message of a server that is not a mempool backend.
SAMPLE_CHARS = 100


class _Received(NamedTuple):
    """A message: its frame, and the change that the frame means."""

    frame: Frame
    change: MempoolChange


class _Connect(Connect):
    """A WebSocket connect that goes through `tunnel` if there is one."""

    tunnel: Tunnel | None = None

    async def open_tcp_connection(self) -> ClientConnection:
        """Open the TCP connection, through the tunnel if there is one."""
        if self.tunnel is None:
            return await super().open_tcp_connection()
        uri = self.ws_uri
        tls = ssl.create_default_context() if uri.secure else None
        return await self.tunnel.open(lambda: self.factory(uri), Target(uri.host, uri.port, "upstream.url"), tls)


class Link:
    """Connections to the backend in `settings.url`, one at a time.

    The sequence of deltas and the link state carry over from one connection to the next.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        meter: FeedMeter,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        surveyor: Surveyor | None = None,
    ) -> None:
        self._settings = settings
        self._surveyor = surveyor
        self._meter = meter
        self._clock = clock
        self._monotonic = monotonic
        self._sampler = Sampler(LOG_INTERVAL_S, monotonic)
        self._tracker = SequenceTracker()
        self.state = LinkState(meter)

    async def messages(self, attempt: int) -> AsyncGenerator[StreamMessage, None]:
        """Yield the messages of one connection, from its handshake until it ends with a LinkLostError.

        `attempt` is reported in Connected. Raises ConfigError if `url` or `proxy` can never work.
        """
        connection = await self._open()
        try:
            first = await self._subscribe(connection)
            if self._surveyor is not None:
                await self._surveyor.connected(first.frame.backend, first.frame.blocks or ())
            self._meter.connected()
            logger.info("upstream_connected", attempt=attempt, **self._described(first.frame))
            yield Connected(attempt)
            listening = self._listen(connection, first)
            del first  # it has the mempool's newest transactions, and a connection lasts for weeks
            async with aclosing(listening) as messages:
                async for message in messages:
                    yield message
                    del message  # see _listen
        except LINK_ERRORS as exc:
            raise diagnose(exc, self._settings) from exc
        finally:
            await hang_up(connection, CLOSE_TIMEOUT_S)

    async def _open(self) -> ClientConnection:
        settings = self._settings
        try:
            connecting = _Connect(
                settings.url,
                **_connect_arguments(settings),
                proxy=None,  # keeps websockets from reading the environment; whaled uses its own tunnel
                compression=None,  # the backend does not accept it
                open_timeout=settings.connect_timeout,
                ping_interval=None,  # whaled sends the dialect's own pings, which the backend's application answers
                close_timeout=CLOSE_TIMEOUT_S,
                max_size=settings.max_message,
                max_queue=READ_AHEAD,
            )
        except (InvalidURI, ValueError) as exc:  # a port out of range raises ValueError
            raise unusable("upstream.url", settings.url, "ws://127.0.0.1:8999/api/v1/ws") from exc
        connecting.tunnel = tunnel_of(settings)
        try:
            return await connecting
        except UnicodeError as exc:
            raise unusable("upstream.url", settings.url, "ws://127.0.0.1:8999/api/v1/ws") from exc
        except LINK_ERRORS as exc:
            raise diagnose(exc, settings) from exc

    async def _subscribe(self, connection: ClientConnection) -> _Received:
        """Subscribe to everything and return the init object, or the first delta or block if that arrives earlier.

        Other frames that arrive earlier are skipped: the init object contains what the backend broadcasts to all
        clients.
        """
        first_text: str | None = None
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                for frame in subscribe_frames():
                    await connection.send(frame)
                while True:
                    raw = await connection.recv(decode=False)
                    first_text = raw[:SAMPLE_CHARS].decode("utf-8", "replace")
                    received = self._received(raw)
                    if received is not None and _is_from_mempool(received.frame):
                        return received
        except TimeoutError:
            raise not_mempool(first_text, self._settings) from None

    async def _listen(self, connection: ClientConnection, first: _Received) -> AsyncGenerator[StreamMessage, None]:
        silence = Silence(self._settings)
        snapshot = SnapshotRound(self._settings.connect_timeout)
        in_sync = False
        received: _Received | None = first
        del first
        while True:
            change = None
            was_in_sync = in_sync
            if received is not None:
                in_sync = _is_in_sync(received, before=in_sync)
                change = self._synced(in_sync)
            elif silence.pings > 1:
                change = self.state.become(UpstreamState.DEGRADED, "a ping is unanswered")
            is_new = received is not None and in_sync and (not was_in_sync or received.change.continuity in MISSED)
            request = self._next_request(snapshot, received, is_new=is_new)
            for each in self._changes(change):
                yield each
            if received is not None:
                yield received.change
            if request is not None:
                await self._send(connection, request)
                if snapshot.is_over:
                    yield SnapshotTaken()
            # A message may have tens of thousands of objects, a frame 100 MB, and the next one may take a long time to
            # arrive. Whatever is allocated in between would lie beside them and hold their pages afterwards. So all
            # loops that pass messages on forget each one before they wait for the next.
            del received
            raw = await self._receive(connection, silence, snapshot.due)
            received = self._received(raw) if raw is not None else None
            del raw

    def _synced(self, in_sync: bool) -> StateChanged | None:
        if in_sync:
            return self.state.become(UpstreamState.CONNECTED, "in sync")
        return self.state.become(UpstreamState.DEGRADED, "the backend is not in sync")

    def _changes(self, change: StateChanged | None) -> list[StreamMessage]:
        return [each for each in (self._surveyed(), change) if each is not None]

    def _surveyed(self) -> Shortfall | None:
        """Return a change in the surveyor's findings. Raises LinkLostError if it now refuses the backend."""
        if self._surveyor is None:
            return None
        if self._surveyor.refusal is not None:
            raise self._surveyor.refusal
        return self.state.lacks(self._surveyor.shortfall)

    def _next_request(self, snapshot: SnapshotRound, received: _Received | None, *, is_new: bool) -> str | None:
        """Return the next frame to send in a snapshot round, if any, after this message.

        With `is_new` a new round begins.
        """
        now = self._monotonic()
        frame = received.frame if received is not None else None
        if frame is not None and frame.projected is not None:
            snapshot.projected(len(frame.projected))
        request = None
        if is_new:
            request = snapshot.begin(now)
        elif frame is not None and frame.snapshot is not None:
            request = snapshot.answered(frame.snapshot, now)
        if request is None and snapshot.due is not None and now >= snapshot.due:
            self._meter.snapshot_incomplete()
            logger.warning(
                "upstream_projected_block_missing",
                within_s=self._settings.connect_timeout,
            )
            request = snapshot.end()
        return request

    async def _receive(self, connection: ClientConnection, silence: Silence, due: float | None) -> bytes | None:
        """Return the next message; None after a ping was sent, or once `due` has passed."""
        waited_s = remaining_s = silence.remaining_s()
        if due is not None:
            waited_s = max(0.0, min(remaining_s, due - self._monotonic()))
        try:
            async with asyncio.timeout(waited_s):
                raw = await connection.recv(decode=False)
        except TimeoutError:
            if waited_s < remaining_s:
                silence.add(waited_s)
                return None
            if silence.elapsed():
                raise stale(self._settings) from None
            silence.pings += 1
            await self._ping(connection)
            return None
        silence.reset()
        return raw

    async def _ping(self, connection: ClientConnection) -> None:
        await self._send(connection, PING)

    async def _send(self, connection: ClientConnection, text: str) -> None:
        try:
            async with asyncio.timeout(self._settings.stale_after):
                await connection.send(text)
        except TimeoutError:
            raise stale(self._settings) from None

    def _received(self, raw: bytes) -> _Received | None:
        """Decode and count a message; None if nothing in it is usable."""
        received_at, received_monotonic = self._clock(), self._monotonic()
        # Decoded on the event loop: msgspec holds the GIL, so a thread blocks the loop for exactly as long (measured:
        # 0.13 s for the 168 MB of 110,000 transactions either way, 0.45 s for 300,000). Such a message arrives once
        # after a backend restart.
        try:
            frame = decode(raw)
        except DialectError as exc:
            self._meter.undecodable(exc.reason)
            self._log_fault(exc.reason, "upstream_message_skipped", detail=str(exc), sample=exc.sample)
            return None
        self._meter.received(len(raw), self._monotonic() - received_monotonic)
        malformed = len(frame.skipped) + (frame.delta.malformed if frame.delta is not None else 0)
        if malformed:
            self._meter.malformed(malformed)
            self._log_fault("malformed", "upstream_message_parts_skipped", parts=frame.skipped, count=malformed)
        if frame.unknown:
            self._meter.unknown(len(frame.unknown))
            self._log_fault("unknown", "upstream_message_keys_unknown", keys=_shortened(frame.unknown))
        change = change_of(
            frame,
            received_at=received_at,
            received_monotonic=received_monotonic,
            continuity=self._observed(frame),
        )
        return _Received(frame, change)

    def _observed(self, frame: Frame) -> Continuity | None:
        if frame.delta is None:
            return None
        before = self._tracker.last
        continuity = self._tracker.observe(frame.delta.sequence)
        self._meter.observed(continuity)
        if continuity in MISSED:
            logger.warning(
                "upstream_sequence_gap",
                continuity=continuity.name.lower(),
                expected=None if before is None else before + 1,
                sequence=frame.delta.sequence,
            )
        return continuity

    def _log_fault(self, kind: str, event: str, **fields: object) -> None:
        suppressed = self._sampler.admit(kind)
        if suppressed is not None:
            logger.warning(event, **fields, suppressed=suppressed)

    def _described(self, frame: Frame) -> dict[str, object]:
        backend = frame.backend
        known = (
            {}
            if backend is None
            else {
                "version": backend.version[:KEY_CHARS],
                "mode": backend.backend[:KEY_CHARS],
            }
        )
        return {"url": without_secrets(self._settings.url), **known}


def _shortened(keys: Sequence[str]) -> list[str]:
    return [key[:KEY_CHARS] for key in keys[:KEYS_SHOWN]]


def _connect_arguments(settings: UpstreamSettings) -> dict[str, Any]:
    """Return the connect arguments for a Unix socket, if one is configured.

    The Host header and the TLS check still use the URL's host.
    """
    return {} if settings.unix_socket is None else {"unix": True, "path": settings.unix_socket}


def _is_from_mempool(frame: Frame) -> bool:
    return frame.is_init or frame.delta is not None or frame.block is not None


def _is_in_sync(received: _Received, *, before: bool) -> bool:
    """Return whether the backend's view of the mempool is in sync: it reports so, or its sequence advances."""
    frame = received.frame
    if frame.is_init:
        return frame.is_ready
    if frame.loading is not None:
        return not frame.loading
    return before or received.change.continuity is Continuity.IN_ORDER
