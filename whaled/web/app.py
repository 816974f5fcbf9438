"""The plain HTTP server: metrics for Prometheus and health for load balancers. Runs on the daemon's own event loop,
so that an answer also proves the loop is alive.
"""

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from msgspec import Struct
from msgspec.json import encode

from whaled.config.sections import Http
from whaled.errors import ListenError
from whaled.listening import address_of, host_port
from whaled.model import Position, UpstreamState

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health(Struct, frozen=True, kw_only=True):
    """The answer of /healthz. `shortfall` is what the backend cannot give, null if nothing is missing."""

    status: str
    upstream: UpstreamState
    shortfall: str | None
    connections: int
    position: Position
    version: str


def application(*, metrics: Callable[[], bytes], health: Callable[[], Health]) -> web.Application:
    """The routes. `metrics` renders the registry, `health` says how the daemon is."""

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": PROMETHEUS_TEXT})

    async def get_health(_request: web.Request) -> web.Response:
        now = health()
        # An absent backend is not this process's illness: a restart would not bring it back.
        return web.Response(
            body=encode(now), status=200 if now.status == "ok" else 503, content_type="application/json"
        )

    app = web.Application()
    app.router.add_get("/metrics", get_metrics)
    app.router.add_get("/healthz", get_health)
    return app


@asynccontextmanager
async def serving(settings: Http, app: web.Application, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[str]:
    """Serve until left; yields the first address listened on. Raises ListenError.

    `sockets` are already listening (systemd); without them `host` and `port` of the settings are opened.
    """
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        if not sockets:
            site = web.TCPSite(runner, settings.host, settings.port)
            try:
                await site.start()
            except OSError as error:
                raise ListenError(settings.host, settings.port, error, "set http.host and http.port") from error
            host, port = runner.addresses[0][:2]
            yield host_port(host, port)
        else:
            for sock in sockets:
                await web.SockSite(runner, sock).start()
            yield address_of(sockets[0])
    finally:
        await runner.cleanup()
