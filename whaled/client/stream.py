"""WhaleStream: connects, reconnects and resumes, and hands the events to its consumer."""

import asyncio
import importlib.util
import logging
import os
import ssl as ssl_module
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from msgspec import Struct
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential
from websockets.exceptions import InvalidProxy, InvalidURI
from websockets.proxy import parse_proxy
from websockets.uri import parse_uri

from whaled.client.credentials import Credentials, TokenProvider
from whaled.client.cursor import Cursor
from whaled.client.dial import Dial, Limits, call
from whaled.client.events import (
    Connected,
    Disconnected,
    Missed,
    Progress,
    StreamEvent,
    TokenRenewed,
    WhaleAlert,
    WhaleUpdate,
)
from whaled.client.failures import LinkLostError
from whaled.client.reasons import Place
from whaled.client.since import Since, checked
from whaled.client.visit import Visit
from whaled.hosts import is_loopback
from whaled.model import Position
from whaled.urls import redacted
from whaled.websocket_client import hang_up

# Standard logging, not structlog: a bot that configures neither still gets warnings on stderr.
log = logging.getLogger("whaled.client")

# Yielded only with `link_events=True`.
LINK_EVENTS = (Connected, Disconnected, Progress, TokenRenewed)
# These variables are not used. If one is set, an error message of a failed connection names it.
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class Retry(Struct, frozen=True, kw_only=True):
    """The reconnect backoff.

    It is a random wait of at most `initial_s`, which doubles with each failure in a row up to `max_s`. A connection
    that lasted `stable_after_s` resets it. A wait that the server requests (`retry_after`, Retry-After) is added.
    """

    initial_s: float = 0.5
    max_s: float = 30.0
    stable_after_s: float = 10.0


class WhaleStream:
    """The whale alerts of one server, each once and in order, across any number of connections.

    - `url`: `ws://` or `wss://`. `ssl` replaces the verifying default context of `wss://`.
    - `token`: a JWT or an API key.
    - `token_provider`: awaited for a token when there is none, when the server refused it, and before it expires. An
      OSError or TimeoutError from it is retried; any other exception ends the stream.
    - `filters`: as in docs/protocol.md.
    - `since`: the start: a Position (usually saved by the last run), a Last, a datetime with a time zone, or a text for
      `parse_since`. None starts now.
    - `link_events`: also yield Connected, Disconnected, Progress and TokenRenewed. Without it, connects and losses are
      logged (logger `whaled.client`).
    - `reconnect`: False raises LinkLostError instead of reconnecting.
    - `proxy`: an HTTP or SOCKS proxy. The environment's proxy variables are not used.
    - `compression`: ask the server to compress alerts. None means yes, unless the server is on this machine, where
      compression costs time and saves nothing.

    Iterate in one task. Raises ValueError for an invalid argument. Iterating raises StreamError (see
    whaled.client.failures), or the exception of `token_provider`.
    """

    def __init__(  # noqa: PLR0913 - all are keyword arguments, and few streams need more than two
        self,
        url: str,
        *,
        token: str | None = None,
        token_provider: TokenProvider | None = None,
        filters: Mapping[str, object] | None = None,
        since: Since | str | None = None,
        link_events: bool = False,
        reconnect: bool = True,
        ssl: ssl_module.SSLContext | None = None,
        proxy: str | None = None,
        compression: bool | None = None,
        retry: Retry | None = None,
        limits: Limits | None = None,
    ) -> None:
        start = checked(since)
        self._dial = _dial(
            url, ssl, filters=dict(filters or {}), proxy=proxy, compression=compression, limits=limits or Limits()
        )
        self._link_events = link_events
        self._reconnect = reconnect
        self._retry = retry or Retry()
        self._credentials = Credentials(token, token_provider, self._dial.limits.open_timeout_s, comes_back=reconnect)
        self._cursor = Cursor(start)
        self._position = self._cursor.received
        self._buffer = _Buffer(self._dial.limits.buffered_events)
        self._backoff = wait_random_exponential(multiplier=self._retry.initial_s, max=self._retry.max_s)
        self._was_connected = False
        self._reader: asyncio.Task[None] | None = None

    @property
    def position(self) -> Position | None:
        """The position of the newest event that was yielded; inside the loop, of the current event.

        Save it once the event is processed, and pass it as `since` to the next run. None until the server has sent a
        position.
        """
        return self._position

    @property
    def token(self) -> str | None:
        """The current token. Save it whenever it changes (TokenRenewed): using an older one again may revoke both."""
        return self._credentials.token

    async def __aenter__(self) -> Self:
        if self._reader is not None:
            raise RuntimeError("a WhaleStream is entered once; make a new one with since=stream.position")
        # A TaskGroup would wrap an exception of the `async with` body in an ExceptionGroup. __aexit__ ends this task.
        self._reader = asyncio.create_task(self._read(), name="whaled stream")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self.stop()
            await asyncio.wait({self._reader})

    def stop(self) -> None:
        """End the iteration after the current event. Buffered events are dropped and not included in `position`."""
        self._buffer.end(None, drop=True)
        if self._reader is not None:
            self._reader.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._reader is None:
            raise RuntimeError("use `async with WhaleStream(...) as stream:` around `async for event in stream:`")
        while True:
            event = await self._buffer.get()
            if event is None:
                raise StopAsyncIteration
            if isinstance(event, WhaleAlert | WhaleUpdate | Missed | Progress):
                self._position = event.position
            if self._link_events or not isinstance(event, LINK_EVENTS):
                return event

    # --- the reading task ---

    async def _read(self) -> None:
        try:
            await AsyncRetrying(
                retry=retry_if_exception(self._comes_back),
                wait=self._delay,
                before_sleep=self._report_lost,
                reraise=True,
            )(self._visit)
        except asyncio.CancelledError:
            self._buffer.end(None)
            raise
        except Exception as error:  # noqa: BLE001 - it is raised in the consumer's task
            self._buffer.end(error)

    async def _visit(self) -> None:
        await self._credentials.current()
        ws = await call(self._dial, is_first=not self._was_connected)
        try:
            visit = Visit(ws, self._dial, credentials=self._credentials, cursor=self._cursor, deliver=self._deliver)
            await visit.run()
        finally:
            await hang_up(ws, self._dial.limits.close_timeout_s)

    async def _deliver(self, event: StreamEvent) -> None:
        if isinstance(event, TokenRenewed):
            if self._link_events:
                self._buffer.put_first(event)
            else:
                log.info("the server renewed the token")
            return
        if isinstance(event, Connected):
            self._was_connected = True
            if not self._link_events:
                log.info("connected to %s", self._dial.place)
        await self._buffer.put(event)

    def _comes_back(self, error: BaseException) -> bool:
        return self._reconnect and isinstance(error, LinkLostError)

    def _delay(self, state: RetryCallState) -> float:
        lost = _lost(state)
        if lost.was_up_s >= self._retry.stable_after_s:
            state.attempt_number = 1
        return self._backoff(state) + (lost.retry_after_s or 0.0)

    async def _report_lost(self, state: RetryCallState) -> None:
        lost = _lost(state)
        if not self._link_events:
            log.warning("%s; trying again in %.1f s", lost, state.upcoming_sleep)
        await self._buffer.put(Disconnected(reason=lost.reason, code=lost.code, retry_in_s=state.upcoming_sleep))


class _Buffer:
    """A bounded queue of events between the reading task and the consumer, with an end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: deque[StreamEvent] = deque()
        self._is_ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()  # an event was added, or the end was set
        self._room = asyncio.Event()

    async def put(self, event: StreamEvent) -> None:
        """Add an event once there is room."""
        while len(self._events) >= self._limit and not self._is_ended:
            self._room.clear()
            await self._room.wait()
        if not self._is_ended:
            self._events.append(event)
            self._changed.set()

    def put_first(self, event: TokenRenewed) -> None:
        """Add an event ahead of the waiting ones, even if the buffer is full. It replaces an older one at the front."""
        if self._is_ended:
            return
        if self._events and isinstance(self._events[0], TokenRenewed):
            self._events.popleft()
        self._events.appendleft(event)
        self._changed.set()

    async def get(self) -> StreamEvent | None:
        """Return the next event, None at the end. Raises the error that ended the stream. Safe to cancel."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        self._room.set()
        return self._events.popleft()

    def end(self, error: Exception | None, *, drop: bool = False) -> None:
        """Accept no more events, and with `drop` discard the waiting ones. The error of the first call counts."""
        if not self._is_ended:
            self._is_ended = True
            self._error = error
        if drop:
            self._events.clear()
            self._error = None
        self._changed.set()
        self._room.set()


def _lost(state: RetryCallState) -> LinkLostError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, LinkLostError)  # `_comes_back` retries no other error
    return error


def _dial(
    url: str,
    ssl: ssl_module.SSLContext | None,
    *,
    filters: Mapping[str, object],
    proxy: str | None,
    compression: bool | None,
    limits: Limits,
) -> Dial:
    """Return the parameters of a connection from a stream's arguments. Raises ValueError."""
    try:
        uri = parse_uri(url)
    except (InvalidURI, ValueError) as error:
        problem = error.msg if isinstance(error, InvalidURI) else error
        hint = _url_hint(url)
        raise ValueError(
            f"{redacted(url)!r} is not a WebSocket URL such as ws://127.0.0.1:8765: {problem}"
            + (f"; {hint}" if hint else "")
        ) from None
    if ssl is not None and not uri.secure:
        raise ValueError(f"{redacted(url)!r} is not encrypted: a TLS context requires wss://")
    tls = ssl if ssl is not None else True if uri.secure else None
    place = Place(
        host=uri.host,
        port=uri.port,
        is_secure=uri.secure,
        proxy=None if proxy is None else _proxy_place(proxy),
        unused_proxy=None
        if proxy is not None
        else next((name for name in PROXY_VARIABLES if os.environ.get(name)), None),
    )
    return Dial(
        url=url,
        place=place,
        filters=filters,
        tls=tls,
        proxy=proxy,
        compresses=not is_loopback(uri.host) if compression is None else compression,
        limits=limits,
    )


def _url_hint(url: str) -> str | None:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "begin it with ws:// or wss://"
    scheme = {"http": "ws", "https": "wss"}.get(scheme.lower(), "")
    return f"use {scheme}://{redacted('x://' + rest).removeprefix('x://')}" if scheme else None


def _proxy_place(proxy: str) -> str:
    """Return the host and port of a proxy. Raises ValueError for one that cannot be used."""
    try:
        parsed = parse_proxy(proxy)
    except (InvalidProxy, ValueError) as error:
        problem = error.msg if isinstance(error, InvalidProxy) else error
        raise ValueError(f"{redacted(proxy)!r} is not a proxy such as http://127.0.0.1:3128: {problem}") from None
    if parsed.scheme.startswith("socks") and importlib.util.find_spec("python_socks") is None:
        raise ValueError(f"{redacted(proxy)!r} is a SOCKS proxy, which needs the package python-socks[asyncio]")
    return f"[{parsed.host}]:{parsed.port}" if ":" in parsed.host else f"{parsed.host}:{parsed.port}"
