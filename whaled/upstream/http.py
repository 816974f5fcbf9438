"""JSON over HTTP to one backend, bounded in number, size, time and attempts."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Literal, Protocol, Self, TypeVar

import aiohttp
import msgspec
import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from whaled.config.sections import Upstream
from whaled.errors import UpstreamError
from whaled.upstream.address import shown, through
from whaled.upstream.proxy import PASSING, ProxyError
from whaled.upstream.retry_after import http_date, retry_after_s
from whaled.upstream.routes import Routes
from whaled.upstream.sampling import Sampler
from whaled.upstream.surrogates import repaired
from whaled.upstream.tunnel import TunnelConnector, tunnel_of

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")

# The largest answer asked for is mempool/txids: 67 bytes for each of 300,000 transactions is 20 MB.
RESPONSE_LIMIT_BYTES = 64 * 1024 * 1024
ATTEMPTS = 3
# No attempt begins later than one rest_timeout after the first: what took as long as that would take as long again, and
# whoever asked has others to ask meanwhile.
TOTAL_TIMEOUTS = 1
BACKOFF_FIRST_S = 0.25
# Of one call that finds out what a backend answers.
PROBE_S = 3.0
# What is quoted of a body that explains an error.
EXCERPT_CHARS = 120
# An HTTP date has whole seconds and the answer takes its time; what is beyond this is a wrong clock.
CLOCK_SKEW_S = 5.0
CLOCK_LOG_INTERVAL_S = 600.0
# Fault lines of one kind are at least this far apart.
LOG_INTERVAL_S = 10.0


class RestFailure(StrEnum):
    """Why a request failed, or why inputs stay unknown (a metric label)."""

    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    CLIENT_ERROR = "client_error"
    REDIRECTED = "redirected"
    NOT_FOUND = "not_found"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    PROXY = "proxy"
    TLS = "tls"
    TOO_BIG = "too_big"
    GARBAGE = "garbage"
    DEADLINE = "deadline"
    INCOMPLETE = "incomplete"


# Worth asking again: the others give the same answer twice.
TRANSIENT = frozenset(
    {RestFailure.RATE_LIMITED, RestFailure.SERVER_ERROR, RestFailure.TIMEOUT, RestFailure.UNREACHABLE}
)


class RestError(UpstreamError):
    """The REST API gave no usable answer. `retry_after_s` is what the server asked for, in seconds."""

    def __init__(
        self, reason: RestFailure, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s


class RestMeter(Protocol):
    """What the REST client counts."""

    def requested(self, failure: RestFailure | None, seconds: float) -> None:
        """One attempt ended; None is an answer, be it "not found"."""
        ...

    def inputs_unknown(self, failure: RestFailure) -> None:
        """The inputs of a whale could not be fetched."""
        ...

    def clock_skew(self, seconds: float) -> None:
        """How far the clock here is ahead of the backend's, to a second or so."""
        ...


class Http:
    """Requests to one backend. Made by `open`."""

    def __init__(
        self,
        settings: Upstream,
        meter: RestMeter,
        session: aiohttp.ClientSession,
        *,
        response_limit_bytes: int = RESPONSE_LIMIT_BYTES,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.routes = Routes.of(settings)
        self.shown_base = shown(self.routes.base)
        self._through = through(settings)
        self._is_through_socket = settings.unix_socket is not None
        self.meter = meter
        self._session = session
        self._limit_bytes = response_limit_bytes
        self._clock = clock
        self._monotonic = monotonic
        self._total_s = settings.rest_timeout * TOTAL_TIMEOUTS
        self._backoff = wait_random_exponential(multiplier=BACKOFF_FIRST_S, max=settings.rest_timeout)
        self.lines = Sampler(LOG_INTERVAL_S, monotonic)
        self._clock_lines = Sampler(CLOCK_LOG_INTERVAL_S, monotonic)
        # aiohttp counts the wait for a free connection into its timeout; a request that waits for its turn is not slow.
        self.concurrency = settings.rest_concurrency
        self._slots = asyncio.Semaphore(settings.rest_concurrency)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: Upstream, meter: RestMeter, *, response_limit_bytes: int = RESPONSE_LIMIT_BYTES
    ) -> AsyncIterator[Self]:
        """A client whose connections are closed at the end of the block."""
        async with aiohttp.ClientSession(
            connector=_connector(settings),
            timeout=aiohttp.ClientTimeout(total=settings.rest_timeout, sock_connect=settings.connect_timeout),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield cls(settings, meter, session, response_limit_bytes=response_limit_bytes)

    async def get(self, path: str, kind: type[T]) -> T | None:
        """The JSON answer to a GET as `kind`; None if the backend does not know it (404) or has nothing (204).

        Raises RestError after the last attempt.
        """
        return self._decoded(path, kind, await self._ask("GET", path))

    async def post(self, path: str, body: object, kind: type[T]) -> T | None:
        """The JSON answer to a POST of `body` as JSON. Must be a question: it may be asked more than once."""
        return self._decoded(path, kind, await self._ask("POST", path, msgspec.json.encode(body)))

    async def text(self, path: str) -> str | None:
        """The plain text answer to a GET; None as for `get`."""
        raw = await self._ask("GET", path)
        return None if raw is None else raw.decode("utf-8", "replace").strip()

    async def raw(self, path: str) -> bytes | None:
        """The answer to a GET as it is; None as for `get`."""
        return await self._ask("GET", path)

    async def _ask(self, method: Literal["GET", "POST"], path: str, body: bytes | None = None) -> bytes | None:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            # A Retry-After beyond the total ends it at once.
            stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(self._total_s),
            wait=self._delay_s,
            reraise=True,
        )
        answer: bytes | None = await retrying(self._attempt, method, path, body)
        return answer

    def _delay_s(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after_s if isinstance(error, RestError) else None
        return self._backoff(state) if asked is None else asked

    async def _attempt(self, method: str, path: str, body: bytes | None) -> bytes | None:
        async with self._slots:
            started = self._monotonic()
            failure: RestFailure | None = None
            try:
                return await self._exchange(method, path, body)
            except RestError as exc:
                failure = exc.reason
                raise
            except asyncio.CancelledError:
                failure = RestFailure.DEADLINE
                raise
            finally:
                self.meter.requested(failure, self._monotonic() - started)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> bytes | None:
        url = self.routes.url(path)
        if url is None:
            raise RestError(
                RestFailure.NOT_FOUND,
                f"{path}: in esplora mode electrs answers this, and none was found: set upstream.esplora_url",
            )
        return await self._exchange_at(method, url, body)

    async def probe(self, url: str, body: bytes | None = None, *, limit_bytes: int | None = None) -> bytes | None:
        """What a URL answers to GET, or to POST with a body; None for no answer. One attempt, not counted.

        With `limit_bytes` no more than that is read, and the rest given up.
        """
        try:
            async with asyncio.timeout(PROBE_S):
                return await self._exchange_at("GET" if body is None else "POST", url, body, limit_bytes)
        except (RestError, TimeoutError):
            return None

    async def _exchange_at(
        self, method: str, url: str, body: bytes | None, limit_bytes: int | None = None
    ) -> bytes | None:
        what = f"{method} {shown(url)}"
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                self._compare_clocks(response.headers.get("Date"))
                if limit_bytes is not None and response.status == 200:
                    return await response.content.read(limit_bytes)
                return await self._answer(what, response)
        except ProxyError as exc:
            raise RestError(RestFailure.PROXY, f"{what}: {exc}") from exc
        except TimeoutError as exc:
            raise RestError(
                RestFailure.TIMEOUT, f"{what}: no answer within upstream.rest_timeout{self._through}"
            ) from exc
        except (aiohttp.ClientSSLError, ssl.SSLError) as exc:
            raise RestError(RestFailure.TLS, f"{what}: TLS failed: {exc}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            # Through a proxy the reason was a ProxyError; a Unix socket may be served while nothing is behind it.
            way = self._through if self._is_through_socket else ""
            raise RestError(RestFailure.UNREACHABLE, f"{what}: {str(exc) or type(exc).__name__}{way}") from exc

    def _compare_clocks(self, date: str | None) -> None:
        """Tokens end by this machine's clock and alerts are stamped with it: a wrong one is worth a line."""
        theirs = http_date(date)
        if theirs is None:
            return
        skew_s = self._clock() - theirs
        self.meter.clock_skew(skew_s)
        if abs(skew_s) > CLOCK_SKEW_S and (suppressed := self._clock_lines.admit("clock")) is not None:
            logger.warning(
                "the clocks of this machine and of the backend differ: check the time synchronisation of both; "
                "tokens and timestamps go by the one here",
                ahead_s=round(skew_s, 1),
                suppressed=suppressed,
            )

    async def _answer(self, what: str, response: aiohttp.ClientResponse) -> bytes | None:
        status = response.status
        if status in {404, 204}:
            return None
        if 300 <= status < 400:
            where = shown(response.headers.get("Location", ""))
            raise RestError(
                RestFailure.REDIRECTED,
                f"{what}: HTTP {status} redirects to {where or 'nowhere'}; set upstream.rest_url to where the API is",
                status=status,
            )
        if status >= 400:
            raise await self._refusal(what, response)
        raw = bytearray()
        try:
            async for chunk in response.content.iter_any():
                raw += chunk
                if len(raw) > self._limit_bytes:
                    raise RestError(RestFailure.TOO_BIG, f"{what}: the answer exceeds {self._limit_bytes} bytes")
        except BaseException:
            # The error's traceback holds this frame, and tenacity's state the error: until the collector comes by.
            raw.clear()
            raise
        return bytes(raw)

    async def _refusal(self, what: str, response: aiohttp.ClientResponse) -> RestError:
        status = response.status
        excerpt = (await response.content.read(EXCERPT_CHARS)).decode("utf-8", "replace")
        reason = RestFailure.CLIENT_ERROR
        if status == 429:
            reason = RestFailure.RATE_LIMITED
        elif status >= 500:
            reason = RestFailure.SERVER_ERROR
        asked_s = retry_after_s(response.headers.getall("Retry-After", ()), self._clock())
        return RestError(reason, f"{what}: HTTP {status}: {excerpt}", status=status, retry_after_s=asked_s)

    def _decoded(self, path: str, kind: type[T], raw: bytes | None) -> T | None:
        if raw is None:
            return None
        try:
            return msgspec.json.decode(repaired(raw), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            problem = str(exc)
        excerpt = raw[:EXCERPT_CHARS].decode("utf-8", "replace")
        # As above: a task group keeps the error, its traceback this frame, and a UnicodeDecodeError all that was read.
        del raw
        raise RestError(RestFailure.GARBAGE, f"{self.shown(path)}: {problem}; the answer begins with {excerpt!r}")

    def found(self, path: str, answer: T | None) -> T:
        """`answer`, which every mempool backend has; RestError if it has not."""
        if answer is None:
            expected = "is this a mempool backend? upstream.rest_url is expected to end in /api/v1/"
            if self.routes.is_electrs(path):
                expected = "is this the electrs of the backend? See upstream.esplora_url"
            raise RestError(RestFailure.NOT_FOUND, f"{self.shown(path)}: HTTP 404; {expected}", status=404)
        return answer

    def shown(self, path: str) -> str:
        """Where a path is asked for, fit for log lines."""
        return shown(self.routes.url(path) or path)


def _connector(settings: Upstream) -> aiohttp.BaseConnector:
    if settings.unix_socket is not None:
        return aiohttp.UnixConnector(settings.unix_socket, limit=settings.rest_concurrency)
    tunnel = tunnel_of(settings)
    if tunnel is None:
        return aiohttp.TCPConnector(limit=settings.rest_concurrency)
    key = "upstream.url" if settings.rest_url is None else "upstream.rest_url"
    return TunnelConnector(tunnel, key, settings.rest_concurrency)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error.__cause__, ProxyError):
        return error.__cause__.fault in PASSING
    return isinstance(error, RestError) and error.reason in TRANSIENT
