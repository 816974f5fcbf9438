"""A server that sends exactly the frames of a test's script, in the format of docs/protocol.md."""

import asyncio
import base64
import http
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from kit.whales import txid

EPOCH = "k3vQpZ"
AT = "2026-01-01T00:00:00+00:00"


def jwt(name: str, **claims: Any) -> str:
    """Return a token in the format of whaled's for a client of this name, without a valid signature."""
    parts = ({"alg": "HS256", "typ": "JWT"}, {"client_id": name, **claims})
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*texts, "A" * 43])


def position(offset: int, epoch: str = EPOCH) -> dict[str, Any]:
    return {"epoch": epoch, "offset": offset}


def alert_frame(offset: int, *, epoch: str = EPOCH, **data: Any) -> dict[str, Any]:
    return {
        "type": "whale_alert",
        "data": {"transaction_id": txid(offset), "btc_value": 150.0, **data},
        "timestamp": AT,
        "position": position(offset, epoch),
    }


def update_frame(offset: int, of: int, status: str = "confirmed", **data: Any) -> dict[str, Any]:
    return {
        "type": "whale_update",
        "data": {"transaction_id": txid(of), "status": status, "btc_value": 150.0, **data},
        "timestamp": AT,
        "position": position(offset),
    }


class Peer:
    """The server's end of one connection."""

    def __init__(self, ws: ServerConnection) -> None:
        self.ws = ws

    async def say(self, *frames: dict[str, Any]) -> None:
        for frame in frames:
            await self.ws.send(json.dumps(frame))

    async def hear(self, kind: str) -> dict[str, Any]:
        """Return the next message, which must be of this type."""
        message: dict[str, Any] = json.loads(await self.ws.recv())
        assert message["type"] == kind, message
        return message

    async def welcome(self, head: int, *, authenticated: bool = False, epoch: str = EPOCH) -> None:
        await self.say(
            {
                "type": "welcome",
                "message": "Connected to whale alert broadcaster",
                "authenticated": authenticated,
                "client_id": "c1" if authenticated else None,
                "permissions": ["read"] if authenticated else [],
                "server_time": AT,
                "protocol": 1,
                "position": position(head, epoch),
            }
        )

    async def authenticate(self, name: str, head: int = 0) -> None:
        """Expect the token of this name, and accept it."""
        message = await self.hear("auth")
        assert message == {"type": "auth", "token": jwt(name)}, message
        await self.say({"type": "auth_success", "client_id": "c1", "permissions": ["read"], "expires_at": AT})
        await self.welcome(head, authenticated=True)

    async def refuse(self, message: str, reason: str = "Authentication required") -> None:
        await self.say({"type": "error", "code": "unauthenticated", "message": message})
        await self.ws.close(1008, reason)

    async def subscribe(
        self, head: int, *, recovered: bool | None = True, epoch: str = EPOCH, **more: Any
    ) -> dict[str, Any]:
        """Expect a subscribe, accept it and return it."""
        asked = await self.hear("subscribe")
        answer = {"type": "subscribed", "filters": asked["filters"], "position": position(head, epoch), **more}
        await self.say(answer if recovered is None else {**answer, "recovered": recovered})
        return asked

    async def open(self, head: int = 0) -> dict[str, Any]:
        """Send `welcome` and accept a subscribe, as on a connection without authentication."""
        await self.welcome(head)
        return await self.subscribe(head)

    async def open_and_linger(self) -> None:
        """Open the connection and send no events."""
        await self.open()
        await self.linger()

    async def linger(self) -> None:
        """Wait until the client closes the connection."""
        await self.ws.wait_closed()


Script = Callable[[Peer], Awaitable[None]]


class Scripted:
    """A running scripted server: the nth connection gets the nth script."""

    def __init__(self, *scripts: Script, status: tuple[int, dict[str, str]] | None = None) -> None:
        self._scripts = list(scripts)
        self._status = status
        self._failure: BaseException | None = None
        self.handshakes = 0
        self.url = ""

    def answer_http(self, _ws: ServerConnection, _request: Request) -> Response | None:
        self.handshakes += 1
        if self._status is None:
            return None
        status, headers = self._status
        sent = Headers({"Content-Length": "11", "Content-Type": "text/plain", **headers})
        return Response(status, http.HTTPStatus(status).phrase, headers=sent, body=b"come later\n")

    async def handle(self, ws: ServerConnection) -> None:
        try:
            assert self._scripts, "one connection more than the test has scripts for"
            await self._scripts.pop(0)(Peer(ws))
        except ConnectionClosed:
            pass
        except Exception as error:
            self._failure = error
            raise

    def answer_with(self, status: int) -> None:
        """Refuse every further connection with this HTTP status."""
        self._status = (status, {})

    def check(self) -> None:
        """Fail the test if the client deviated from a script."""
        if self._failure is not None:
            raise AssertionError(f"the client did not send what the script expects: {self._failure}")


@asynccontextmanager
async def scripted(
    *scripts: Script, status: tuple[int, dict[str, str]] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Scripted]:
    """Run a scripted server on port 0."""
    server = Scripted(*scripts, status=status)
    async with serve(
        server.handle, "127.0.0.1", 0, process_request=server.answer_http, ssl=tls, compression=None, ping_interval=None
    ) as listening:
        host, port = listening.sockets[0].getsockname()[:2]
        server.url = f"{'wss' if tls else 'ws'}://{host}:{port}"
        async with asyncio.timeout(20):
            yield server
    server.check()
