"""What is decided of a request before it becomes a WebSocket: subprotocol, credential, refusal."""

import re
from collections.abc import Generator, Iterable, Sequence
from typing import Final

from websockets.datastructures import Headers
from websockets.exceptions import ProtocolError
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.typing import Subprotocol

from whaled.gateway import wire
from whaled.gateway.deflate import Offers
from whaled.gateway.limits import Refusal
from whaled.gateway.origins import Origins

# Query parameters that carry a credential in other products. URLs end up in logs and histories.
CREDENTIAL_PARAMETERS = ("token", "access_token", "api_key", "apikey", "jwt", "auth", "authorization")
# Longer than any that a client or a balancer asks for. All of it is searched.
MAX_PATH_BYTES = 2048

REFUSAL_STATUS = {
    Refusal.GLOBAL_CAP: (503, "too many connections"),
    Refusal.ADDRESS_CAP: (429, "too many connections from this address"),
    Refusal.MEMORY: (503, "out of memory"),
    Refusal.DRAINING: (503, "restarting"),
    Refusal.TOKEN_IN_URL: (
        400,
        "a token in the URL ends up in logs: send it as first message, as Authorization header or as subprotocol",
    ),
}


EXTENSIONS = (Offers(),)
# Lists in headers: no client sends ten items, and the library takes 2 us for each.
LISTS = ("Connection", "Upgrade", "Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol")
MAX_SEPARATORS = 50


class _Reader(StreamReader):
    """Reads frames for the library, and refuses lengths written in more bytes than they need (RFC 6455, 5.2).

    The library reads a frame as 2 bytes, then 2 or 8 of a longer length, then 4 of the mask, then the payload.
    """

    _at = 0  # 0: a frame begins; 1: its length follows; 2: its mask; 3: its payload

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """Read n bytes. Raises EOFError, ProtocolError."""
        data = yield from super().read_exact(n)
        match self._at:
            case 0:
                self._at = 1 if data[1] & 0x7F >= 126 else 2
            case 1:
                if int.from_bytes(data) < (126 if n == 2 else 1 << 16):
                    raise ProtocolError("a length in more bytes than it needs")
                self._at = 2
            case 2:
                self._at = 3
            case _:
                self._at = 0
        return data


class Server(ServerProtocol):
    """Selects `whaled.v1` if a browser offers it, and goes on without a subprotocol otherwise. `compresses` if a client
    asks for it.
    """

    def __init__(self, *, max_size: int | None = None, compresses: bool = False) -> None:
        super().__init__(max_size=max_size, extensions=EXTENSIONS if compresses else None)
        # The library makes its reader itself, and its parser has hold of it already.
        self.reader.__class__ = _Reader

    def end(self) -> None:
        """Read nothing more. The parser refers to this object, and exceptions to its frames: without this, the cycles
        wait for the garbage collector, which rarely looks at what is old.
        """
        self.parser.close()
        if self.handshake_exc is not None:
            self.handshake_exc.__traceback__ = None  # the request keeps it as well
        self.handshake_exc = self.parser_exc = None

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        return Subprotocol(wire.SUBPROTOCOL) if wire.SUBPROTOCOL in subprotocols else None


def refuse(ws: ServerProtocol, refusal: Refusal, retry_after_s: int) -> Response:
    """The answer to a client that is turned away."""
    status, text = REFUSAL_STATUS[refusal]
    response = ws.reject(status, text + "\n")
    if status != 400:
        response.headers["Retry-After"] = str(retry_after_s)
    return response


# Paths that load balancers and people ask for without wanting a WebSocket.
PLAIN_PATHS = {"/", "/healthz"}
PLAIN_METHODS = {"GET", "HEAD", "OPTIONS"}
ABOUT = "This port serves Bitcoin whale alerts over WebSocket: connect with ws:// or wss://.\n"


def judge(
    ws: ServerProtocol, request: Request, origins: Origins, *, is_draining: bool, is_tls: bool
) -> tuple[Refusal | None, Response | None]:
    """Why a request opens no WebSocket, and its answer, as far as the library does not decide that."""
    headers = request.headers
    if len(request.path) > MAX_PATH_BYTES:
        return Refusal.BAD_HANDSHAKE, ws.reject(414, f"the path and query have more than {MAX_PATH_BYTES} bytes\n")
    if has_credential(request.path):
        return Refusal.TOKEN_IN_URL, refuse(ws, Refusal.TOKEN_IN_URL, 0)
    if len(headers.get_all("Host")) != 1:
        return Refusal.BAD_HANDSHAKE, ws.reject(400, "a request has one Host header\n")
    if "Upgrade" not in headers and request.method in PLAIN_METHODS and request.path.partition("?")[0] in PLAIN_PATHS:
        return Refusal.NO_UPGRADE, _plain(ws, request, is_draining=is_draining)
    if headers.get_all("Sec-WebSocket-Version") not in ([], ["13"]):
        response = ws.reject(426, "this server speaks version 13 of the WebSocket protocol\n")
        response.headers["Upgrade"] = "websocket"
        response.headers["Sec-WebSocket-Version"] = "13"
        return Refusal.BAD_HANDSHAKE, response
    for name in LISTS:
        if sum(1 + value.count(",") + value.count(";") for value in headers.get_all(name)) > MAX_SEPARATORS:
            return Refusal.BAD_HANDSHAKE, ws.reject(400, f"{name} has more than {MAX_SEPARATORS} items\n")
    problem = origins.refusal(headers, is_tls=is_tls)
    if problem is not None:
        return Refusal.ORIGIN, ws.reject(403, problem + "\n")
    return None, None


def _plain(ws: ServerProtocol, request: Request, *, is_draining: bool) -> Response:
    """The answer to a health check, or to somebody who looks."""
    is_health = request.path.startswith("/healthz")
    status = 503 if is_draining else 200
    response = ws.reject(status, ("restarting\n" if is_draining else "ok\n") if is_health else ABOUT)
    if request.method == "HEAD":
        response.body = b""
    return response


def credential(headers: Headers) -> str | None:
    """The credential of the Authorization header, or of the subprotocol pair that browsers can send."""
    for header in headers.get_all("Authorization"):
        scheme, _, credential = header.partition(" ")
        if scheme.lower() == "bearer" and credential:
            return credential.strip()
    for offered in headers.get_all("Sec-WebSocket-Protocol"):
        for name in offered.split(","):
            if name.strip().startswith(wire.BEARER_SUBPROTOCOL_PREFIX):
                return name.strip().removeprefix(wire.BEARER_SUBPROTOCOL_PREFIX)
    return None


def has_credential(path: str) -> bool:
    """Whether a request's path carries what other products take for a credential, however its name is written."""
    return _CREDENTIAL.search("&" + path.partition("?")[2]) is not None


def _names(names: Iterable[str]) -> str:
    """A pattern for these names, each letter as it is or percent-encoded. Parsing a query takes ten times as long."""
    return "|".join(
        "".join(f"(?:{re.escape(letter)}|%{ord(letter):02x}|%{ord(letter.upper()):02x})" for letter in name)
        for name in names
    )


_CREDENTIAL: Final = re.compile(rf"&(?:{_names(CREDENTIAL_PARAMETERS)})=[^&]", re.ASCII | re.IGNORECASE)
