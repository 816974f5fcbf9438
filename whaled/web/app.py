"""The plain HTTP server: metrics for Prometheus and health for load balancers.

It runs on the daemon's event loop, so that a response also proves that the loop is alive.
"""

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import structlog
from aiohttp import hdrs, web
from msgspec import Struct
from msgspec.json import encode

from whaled.config.sections import HttpSettings
from whaled.hosts import is_address_or_localhost, split_authority
from whaled.listening import address_of, open_sockets
from whaled.model import Position, UpstreamState
from whaled.web.exposition import Exposition, Format, accepted_format, accepts_gzip
from whaled.web.listener import BACKLOG, Connection, Listener
from whaled.web.meters import HttpMeter

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

MISDIRECTED = "this server does not answer to the name in the Host header: add it to http.allowed_hosts\n"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Health(Struct, frozen=True, kw_only=True):
    """The body of /healthz. `shortfall` names what the backend cannot provide, null if nothing is missing."""

    status: str
    upstream: UpstreamState
    shortfall: str | None
    connections: int
    position: Position
    version: str


class HttpServer:
    """The server and its settings, which a reload replaces.

    `metrics` renders the registry, `health` returns the state of the daemon.
    """

    def __init__(
        self,
        settings: HttpSettings,
        *,
        metrics: Callable[[Format], bytes],
        health: Callable[[], Health],
        meter: HttpMeter,
    ) -> None:
        self._settings = settings
        self._health = health
        self._meter = meter
        self._exposition = Exposition(metrics, meter, clock=time.monotonic)
        self._listener: Listener | None = None
        self.addresses: tuple[str, ...] = ()
        meter.connections.set_function(lambda: self.connections)
        meter.connections_limit.set_function(lambda: self._settings.max_connections)

    def reconfigure(self, settings: HttpSettings) -> None:
        """Apply new limits."""
        self._settings = settings
        if self._listener is not None:
            self._listener.reconfigure(settings)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return self._listener.connections if self._listener is not None else 0

    @asynccontextmanager
    async def serving(self, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[str | None]:
        """Serve while the context is open. Yield the first listening address, or None if the server is not enabled.

        `sockets` are already listening (systemd socket activation). Without them, sockets for `host` and `port` of the
        settings are opened. Raises ListenError.
        """
        settings = self._settings
        if not settings.enabled:
            yield None
            return
        runner = web.AppRunner(self._application(), access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None
        self._listener = Listener(settings, runner.server, self._meter)
        listening: Sequence[socket.socket] = sockets
        try:
            if not sockets:
                opened = await open_sockets(settings.host, settings.port, BACKLOG, section="http")
                listening = opened.sockets
                for missing in opened.missing:
                    logger.warning(
                        "listen_address_missing", key="http.host", address=missing.host, reason=missing.reason
                    )
            self.addresses = tuple(map(address_of, listening))
            async with self._listener.accepting(listening):
                yield self.addresses[0]
        finally:
            for sock in listening:
                sock.close()
            await runner.cleanup()

    def render_anew(self) -> None:
        """Render the metrics again for the next request, so that they show the outcome of a reload at once."""
        self._exposition.render_anew()

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/healthz", self._get_health)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other host names (DNS rebinding) and limit the rate of requests."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        await connection.turn()
        hosts = request.headers.getall(hdrs.HOST, ())
        if len(hosts) > 1 or (not hosts and request.version >= (1, 1)):
            return web.Response(status=400, text="exactly one Host header is required\n")
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        # No browser connects to a Unix socket.
        if hosts and isinstance(peer, tuple) and not is_allowed(hosts[0], self._settings.allowed_hosts):
            return web.Response(status=421, text=MISDIRECTED)
        return await handler(request)

    async def _get_metrics(self, request: web.Request) -> web.Response:
        chosen = accepted_format(request.headers.get(hdrs.ACCEPT, ""))
        is_compressed = accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, ""))
        body = self._exposition.body(chosen, self._settings.render_interval, is_compressed=is_compressed)
        headers = {hdrs.CONTENT_TYPE: chosen.value, hdrs.VARY: "Accept, Accept-Encoding"}
        if is_compressed:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _get_health(self, _request: web.Request) -> web.Response:
        now = self._health()
        # A missing backend does not make this process unhealthy, since a restart would not bring it back.
        return web.Response(
            body=encode(now), status=200 if now.status == "ok" else 503, content_type="application/json"
        )


def is_allowed(host: str, names: Sequence[str]) -> bool:
    """Return whether a Host header names this server: an IP address, localhost, or one of `names` ("*" allows all).

    A foreign page can make a browser connect here under the page's own host name, but never under an IP address.
    """
    found = split_authority(host.strip())
    return found is not None and ("*" in names or found[0] in names or is_address_or_localhost(found[0]))
