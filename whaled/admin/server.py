"""The server of the admin API: admits, reads and answers requests on a Unix socket."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import msgspec
import structlog
from aiohttp import web
from msgspec.json import decode, encode

from whaled.admin.calls import STATUS, Call, CallError, Code, Outcome, Route
from whaled.admin.meters import AdminMeter
from whaled.admin.peers import allowed_users, peer_of
from whaled.admin.sockets import listening, own_path
from whaled.admin.views import Error, ErrorBody
from whaled.config.sections import AdminSettings, HttpSettings
from whaled.errors import OperatorError
from whaled.listening import address_of
from whaled.summaries import Summary
from whaled.web.app import Handler
from whaled.web.listener import Connection, Listener, Replies

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

JSON = "application/json"
# The longest request head. No parameter of the API is longer than a name.
MAX_HEAD_BYTES = 8 * 1024
# Lines per minute about refused users: any local user may cause them.
REFUSED_LINES = 5
_CODES = {status: code for code, status in STATUS.items()}


def failure(code: Code, message: str) -> web.Response:
    """Return an error response."""
    body = ErrorBody(error=Error(code=code.value, message=message))
    return web.Response(body=encode(body), status=STATUS[code], content_type=JSON)


def _unreadable(_status: int) -> web.Response:
    return failure(Code.BAD_REQUEST, "the request is not HTTP/1.1")


def _too_large() -> bytes:
    message = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"
    body = encode(ErrorBody(error=Error(code=Code.TOO_LARGE.value, message=message)))
    head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Type: {JSON}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class AdminServer:
    """The server. `routes` are the acts that it offers; `event_log` determines the default place of its socket."""

    def __init__(self, settings: AdminSettings, *, routes: Sequence[Route], event_log: Path, meter: AdminMeter) -> None:
        self._settings = settings
        self._routes = routes
        self._event_log = event_log
        self._meter = meter
        self._listener: Listener | None = None
        self._users: Mapping[int, str] = {}
        self._refusals = Summary(logger, "admin_call_refused", level="warning", per_source=1, in_all=REFUSED_LINES)
        meter.connections.set_function(lambda: self._listener.connections if self._listener is not None else 0)
        meter.connections_limit.set(settings.max_connections)

    @asynccontextmanager
    async def serving(self, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[str | None]:
        """Serve while the context is open. Yield the address, or None without a socket.

        `sockets` are already listening (systemd socket activation). Raises OperatorError for a socket that the
        configuration names and that cannot be made; without one at the default path the daemon runs on.
        """
        settings = self._settings
        if not settings.enabled:
            for sock in sockets:
                sock.close()
            yield None
            return
        self._users = await asyncio.to_thread(allowed_users, settings.users)
        with ExitStack() as stack:
            used = [stack.enter_context(sock) for sock in sockets]
            if not used:
                try:
                    used = [stack.enter_context(listening(own_path(settings, self._event_log, os.environ)))]
                except OperatorError as error:
                    if settings.socket is not None:
                        raise
                    logger.warning("admin_socket_unavailable", problem=str(error))
                    yield None
                    return
            async with self._accepting(used):
                logger.info("admin_ready", listen=address_of(used[0]))
                yield address_of(used[0])

    @asynccontextmanager
    async def _accepting(self, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
        settings = self._settings
        runner = web.AppRunner(self._application(), access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None
        limits = HttpSettings(
            max_connections=settings.max_connections,
            header_timeout=settings.header_timeout,
            idle_timeout=settings.idle_timeout,
            write_timeout=settings.write_timeout,
            max_request=MAX_HEAD_BYTES,
            requests_per_second=settings.requests_per_second,
        )
        replies = Replies(_unreadable, _too_large())
        self._listener = Listener(limits, runner.server, self._meter, replies)
        try:
            async with self._listener.accepting(sockets):
                yield
        finally:
            await runner.cleanup()
            self._refusals.flush()

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=self._settings.max_body)
        for route in self._routes:
            app.router.add_route(route.method, route.path, self._handler(route))
        return app

    def _handler(self, route: Route) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            peer = peer_of(request)
            if peer is None or (actor := self._users.get(peer.uid)) is None:  # the connection was lost meanwhile
                raise CallError(Code.FORBIDDEN, "the connection is lost")
            body = await self._body(request) if route.method != "GET" else {}
            call = Call(actor, f"admin socket, process {peer.pid}", dict(request.query), body)
            if route.method == "GET":
                return web.Response(body=encode(await route.act(call)), content_type=JSON)
            outcome, problem = Outcome.FAILED, None
            try:
                answer = web.Response(body=encode(await route.act(call)), content_type=JSON)
                outcome = Outcome.DONE
            except CallError as error:
                outcome, problem = Outcome.REFUSED, str(error)
                raise
            finally:
                self._meter.acted(outcome)
                logger.info(
                    "admin_act_finished", act=route.path, actor=actor, origin=call.origin, outcome=outcome.value,
                    problem=problem,
                )  # fmt: skip
            return answer

        return handle

    async def _body(self, request: web.Request) -> Mapping[str, object]:
        """Read the JSON object of a request; an empty body is an empty object. Raises CallError."""
        try:
            async with asyncio.timeout(self._settings.header_timeout):
                raw = await request.read()
            body = decode(raw) if raw else {}
        except TimeoutError:
            raise CallError(Code.TIMEOUT, "the body of the request did not arrive in time") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise CallError(Code.BAD_REQUEST, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise CallError(Code.BAD_REQUEST, "the body is not a JSON object")
        return body

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Limit the rate, refuse users who may not call, and answer every failure with a JSON error."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        await connection.turn()
        peer = peer_of(request)
        actor = self._users.get(peer.uid) if peer is not None else None
        if peer is None or actor is None:
            who = "a process without credentials" if peer is None else f"uid {peer.uid}"
            self._refusals.line(who, actor=who, process=None if peer is None else peer.pid)
            answer = failure(Code.FORBIDDEN, f"{who} may not use the admin API: run this as root, or see admin.users")
            answer.force_close()
            return answer
        try:
            return await handler(request)
        except CallError as error:
            answer = failure(error.code, str(error))
        except web.HTTPException as error:
            answer = _of_aiohttp(error.status, self._settings.max_body)
        except Exception:
            logger.exception("admin_call_failed", act=request.match_info.route.name, actor=actor)
            answer = failure(Code.INTERNAL, "a bug; the log of the daemon has the traceback")
        if request.can_read_body and not request.content.is_eof():
            answer.force_close()  # do not read what is left of a refused body
        return answer


def _of_aiohttp(status: int, max_body: int) -> web.Response:
    code = _CODES.get(status, Code.BAD_REQUEST)
    messages = {
        Code.NOT_FOUND: "there is no such act; docs/admin.md lists them",
        Code.METHOD_NOT_ALLOWED: "this act needs another method; docs/admin.md lists them",
        Code.TOO_LARGE: f"the body is larger than {max_body} bytes (admin.max_body)",
    }
    return failure(code, messages.get(code, HTTPStatus(status).phrase))
