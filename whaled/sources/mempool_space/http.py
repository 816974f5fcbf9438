"""JSON over HTTP to one backend, with limits on concurrency, size, time and attempts."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Literal, Self, TypeVar

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

from whaled.config.sections import UpstreamSettings
from whaled.registry import Component, Registry
from whaled.retry_after import http_date, retry_after_s
from whaled.sampling import Sampler
from whaled.source import BackendError
from whaled.sources.mempool_space.address import through
from whaled.sources.mempool_space.proxy import PASSING, ProxyError
from whaled.sources.mempool_space.routes import Routes
from whaled.sources.mempool_space.surrogates import repaired
from whaled.sources.mempool_space.tunnel import TunnelConnector, tunnel_of
from whaled.urls import without_secrets

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")

# The largest response is that of mempool/txids: 67 bytes for each of 300,000 transactions are 20 MB.
RESPONSE_LIMIT_BYTES = 64 * 1024 * 1024
ATTEMPTS = 3
# No attempt begins more than one rest_timeout after the first: a call that took that long would take as long again, and
# its caller has other calls to make in that time.
TOTAL_TIMEOUTS = 1
BACKOFF_FIRST_S = 0.25
# Time limit for one probe.
PROBE_S = 3.0
# Maximum length quoted from the body of an error response.
EXCERPT_CHARS = 120
# A Date header has whole seconds and the response takes time to arrive; a larger difference is a wrong clock.
CLOCK_SKEW_S = 5.0
CLOCK_LOG_INTERVAL_S = 600.0
# Minimum interval between log lines about the same kind of fault.
LOG_INTERVAL_S = 10.0


class RestFailure(StrEnum):
    """The reason a request failed, or inputs remain unknown (a metric label)."""

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


# A request is repeated after these failures; after the others a repetition would fail in the same way.
TRANSIENT = frozenset(
    {RestFailure.RATE_LIMITED, RestFailure.SERVER_ERROR, RestFailure.TIMEOUT, RestFailure.UNREACHABLE}
)


# These failures concern the backend as a whole, not the single request: the next request would fail alike.
BACKEND_WIDE = frozenset({RestFailure.UNREACHABLE, RestFailure.RATE_LIMITED, RestFailure.TLS, RestFailure.REDIRECTED})


class RestError(BackendError):
    """A REST call without a usable response. `retry_after_s` is the delay that the server requested, in seconds."""

    reason: RestFailure

    def __init__(
        self, reason: RestFailure, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason, message, is_backend_wide=reason in BACKEND_WIDE, retry_after_s=retry_after_s)
        self.status = status


class RestMeter:
    """The metrics of requests to the backend over REST."""

    def __init__(self, registry: Registry) -> None:
        self._errors = registry.errors.labels(Component.REST)
        self._requests = registry.counter(
            "rest_requests", "REST requests, by outcome.", "outcome", ("answered", *RestFailure)
        )
        self._seconds = registry.histogram("rest_request_seconds", "Duration of a REST request.")
        self._skew = registry.gauge(
            "upstream_clock_skew_seconds", "This machine's clock minus the backend's, at the last REST response."
        )
        self._inputs = registry.counter(
            "rest_inputs_unknown", "Transactions whose inputs could not be fetched, by reason.", "reason", RestFailure
        )

    def requested(self, failure: RestFailure | None, seconds: float) -> None:
        """Count an attempt and its duration. `failure` is None for a response, including "not found"."""
        self._requests.labels(failure or "answered").inc()
        self._seconds.observe(seconds)
        if failure is not None and failure is not RestFailure.NOT_FOUND:
            self._errors.inc()

    def inputs_unknown(self, failure: RestFailure) -> None:
        """Count a whale whose inputs could not be fetched."""
        self._inputs.labels(failure).inc()

    def clock_skew(self, seconds: float) -> None:
        """Set by how many seconds the local clock is ahead of the backend's, accurate to about a second."""
        self._skew.set(seconds)


class Http:
    """An HTTP client of one backend. Created by `open`."""

    def __init__(
        self,
        settings: UpstreamSettings,
        meter: RestMeter,
        session: aiohttp.ClientSession,
        *,
        response_limit_bytes: int = RESPONSE_LIMIT_BYTES,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.routes = Routes.of(settings)
        self.shown_base = without_secrets(self.routes.base)
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
        # aiohttp's timeout would include the wait for a free connection, and a request that only waits is not slow.
        self.concurrency = settings.rest_concurrency
        self._slots = asyncio.Semaphore(settings.rest_concurrency)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: UpstreamSettings, meter: RestMeter, *, response_limit_bytes: int = RESPONSE_LIMIT_BYTES
    ) -> AsyncIterator[Self]:
        """Return a client whose connections are closed at the end of the `async with` block."""
        async with aiohttp.ClientSession(
            connector=_connector(settings),
            timeout=aiohttp.ClientTimeout(total=settings.rest_timeout, sock_connect=settings.connect_timeout),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield cls(settings, meter, session, response_limit_bytes=response_limit_bytes)

    async def get(self, path: str, kind: type[T]) -> T | None:
        """Return the JSON response to a GET, decoded as `kind`; None for status 404 or 204.

        Raises RestError after the last attempt.
        """
        return self._decoded(path, kind, await self._request("GET", path))

    async def post(self, path: str, body: object, kind: type[T]) -> T | None:
        """Return the JSON response to a POST of `body` as JSON, decoded as `kind`; None as for `get`.

        The call must have no side effects: it may be sent more than once.
        """
        return self._decoded(path, kind, await self._request("POST", path, msgspec.json.encode(body)))

    async def text(self, path: str) -> str | None:
        """Return the plain text response to a GET; None as for `get`."""
        raw = await self._request("GET", path)
        return None if raw is None else raw.decode("utf-8", "replace").strip()

    async def raw(self, path: str) -> bytes | None:
        """Return the body of the response to a GET, undecoded; None as for `get`."""
        return await self._request("GET", path)

    async def _request(self, method: Literal["GET", "POST"], path: str, body: bytes | None = None) -> bytes | None:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            # A Retry-After that exceeds the total ends the call at once.
            stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(self._total_s),
            wait=self._delay_s,
            reraise=True,
        )
        answer: bytes | None = await retrying(self._attempt, method, path, body)
        return answer

    def _delay_s(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        requested_s = error.retry_after_s if isinstance(error, RestError) else None
        return self._backoff(state) if requested_s is None else requested_s

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
        """Return the response of a URL to GET, or to POST if there is a body; None without a usable response.

        One attempt, not counted in the metrics. With `limit_bytes` at most that number of bytes is read.
        """
        try:
            async with asyncio.timeout(PROBE_S):
                return await self._exchange_at("GET" if body is None else "POST", url, body, limit_bytes)
        except (RestError, TimeoutError):
            return None

    async def _exchange_at(
        self, method: str, url: str, body: bytes | None, limit_bytes: int | None = None
    ) -> bytes | None:
        what = f"{method} {without_secrets(url)}"
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                self._compare_clocks(response.headers.get("Date"))
                if limit_bytes is not None and response.status == 200:
                    return await response.content.read(limit_bytes)
                return await self._body(what, response)
        except ProxyError as exc:
            raise RestError(RestFailure.PROXY, f"{what}: {exc}") from exc
        except TimeoutError as exc:
            raise RestError(
                RestFailure.TIMEOUT, f"{what}: no response within upstream.rest_timeout{self._through}"
            ) from exc
        except (aiohttp.ClientSSLError, ssl.SSLError) as exc:
            raise RestError(RestFailure.TLS, f"{what}: TLS failed: {exc}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            # Failures of a proxy raise ProxyError; a Unix socket may accept connections while its target is down.
            way = self._through if self._is_through_socket else ""
            raise RestError(RestFailure.UNREACHABLE, f"{what}: {str(exc) or type(exc).__name__}{way}") from exc

    def _compare_clocks(self, date: str | None) -> None:
        """Record the clock difference and log a large one: the local clock expires tokens and timestamps alerts."""
        theirs = http_date(date)
        if theirs is None:
            return
        skew_s = self._clock() - theirs
        self.meter.clock_skew(skew_s)
        if abs(skew_s) > CLOCK_SKEW_S and (suppressed := self._clock_lines.admit("clock")) is not None:
            logger.warning(
                "upstream_clock_skewed",
                ahead_s=round(skew_s, 1),
                suppressed=suppressed,
            )

    async def _body(self, what: str, response: aiohttp.ClientResponse) -> bytes | None:
        status = response.status
        if status in {404, 204}:
            return None
        if 300 <= status < 400:
            where = without_secrets(response.headers.get("Location", ""))
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
            # tenacity's state keeps the error, and its traceback this stack frame, until the next garbage collection.
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
        delay_s = retry_after_s(response.headers.getall("Retry-After", ()), self._clock())
        return RestError(reason, f"{what}: HTTP {status}: {excerpt}", status=status, retry_after_s=delay_s)

    def _decoded(self, path: str, kind: type[T], raw: bytes | None) -> T | None:
        if raw is None:
            return None
        try:
            return msgspec.json.decode(repaired(raw), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            problem = str(exc)
        excerpt = raw[:EXCERPT_CHARS].decode("utf-8", "replace")
        # A task group keeps the error, its traceback keeps this stack frame, and a UnicodeDecodeError keeps the body.
        del raw
        raise RestError(RestFailure.GARBAGE, f"{self.shown(path)}: {problem}; the answer begins with {excerpt!r}")

    def found(self, path: str, answer: T | None) -> T:
        """Return `answer`, which every mempool backend provides. Raises RestError if it is None."""
        if answer is None:
            expected = "is this a mempool backend? upstream.rest_url is expected to end in /api/v1/"
            if self.routes.is_electrs(path):
                expected = "is this the electrs of the backend? See upstream.esplora_url"
            raise RestError(RestFailure.NOT_FOUND, f"{self.shown(path)}: HTTP 404; {expected}", status=404)
        return answer

    def shown(self, path: str) -> str:
        """Return the URL of a path, in its form for log lines."""
        return without_secrets(self.routes.url(path) or path)


def _connector(settings: UpstreamSettings) -> aiohttp.BaseConnector:
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
