"""What is decided of a request before it becomes a WebSocket: subprotocol, credential, refusal."""

import re
from collections.abc import Generator, Iterable, Sequence
from typing import Final

from websockets.datastructures import Headers
from websockets.exceptions import ProtocolError, TooManyHeaders
from websockets.http11 import MAX_NUM_HEADERS, Request, Response
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.typing import Subprotocol

from whaled.gateway import wire
from whaled.gateway.deflate import Offers
from whaled.gateway.limits import Refusal
from whaled.gateway.origins import Origins

# Query parameters that carry a credential in other products. URLs end up in logs and histories.
CREDENTIAL_PARAMETERS = ("token", "access_token", "api_key", "apikey", "jwt", "auth", "authorization")
# What the request of a handshake may take, headers and all: the library would collect 1 MiB of each stranger.
MAX_REQUEST_BYTES = 16 * 1024
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
    """Reads lines and frames for the library: lines as long as the request may be (a token alone may have the 8 KiB
    that the library gives a line), and no lengths written in more bytes than they need (RFC 6455, 5.2).

    The library reads a frame as 2 bytes, then 2 or 8 of a longer length, then 4 of the mask, then the payload.
    """

    _at = 0  # 0: a frame begins; 1: its length follows; 2: its mask; 3: its payload

    def read_line(self, m: int, too_long_exc_type: type[Exception] = RuntimeError) -> Generator[None, None, bytearray]:
        """Read a line. Raises EOFError, and `too_long_exc_type`."""
        return super().read_line(max(m, MAX_REQUEST_BYTES), too_long_exc_type)

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

    def parse(self) -> Generator[None]:
        """The library's parser. It begins in the library's constructor, which makes the reader itself."""
        self.reader.__class__ = _Reader
        return super().parse()

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


REQUEST_LINE: Final = re.compile(rb"([A-Za-z]{1,32}) [!-~]+ HTTP/1\.[01]")
LONG_REQUEST_LINE: Final = re.compile(rb"[A-Za-z]{1,32} [!-~]{%d}" % (MAX_PATH_BYTES + 1))
BARE_LINE_FEED: Final = re.compile(rb"(?<!\r)\n")
BODY: Final = re.compile(rb"content-length:(?![ \t]*0[ \t]*$)|transfer-encoding:", re.IGNORECASE)
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
    hosts = len(headers.get_all("Host"))
    if hosts != 1 and not (hosts == 0 and request.protocol == "HTTP/1.0"):
        return Refusal.BAD_HANDSHAKE, ws.reject(400, "a request has one Host header\n")
    _ignore_other_upgrades(headers)
    if "Upgrade" not in headers and request.method in PLAIN_METHODS and request.path.partition("?")[0] in PLAIN_PATHS:
        return Refusal.NO_UPGRADE, _plain(ws, request, is_draining=is_draining)
    if headers.get_all("Sec-WebSocket-Version") not in ([], ["13"]):
        response = ws.reject(426, "this server speaks version 13 of the WebSocket protocol\n")
        response.headers["Upgrade"] = "websocket"
        response.headers["Sec-WebSocket-Version"] = "13"
        return Refusal.BAD_HANDSHAKE, response
    for name in LISTS:
        if _items(headers.get_all(name)) > MAX_SEPARATORS:
            return Refusal.BAD_HANDSHAKE, ws.reject(400, f"{name} has more than {MAX_SEPARATORS} items\n")
    problem = origins.refusal(headers, is_tls=is_tls)
    if problem is not None:
        return Refusal.ORIGIN, ws.reject(403, problem + "\n")
    return None, None


def _items(values: Sequence[str]) -> int:
    return sum(1 + value.count(",") + value.count(";") for value in values)


def _ignore_other_upgrades(headers: Headers) -> None:
    """Leave of an Upgrade what asks for a WebSocket. Some clients offer h2c with every request, and a server that does
    not take an offer answers as if there were none (RFC 9110, 7.8).
    """
    offered = headers.get_all("Upgrade")
    if not offered or _items(offered) > MAX_SEPARATORS:
        return  # it is refused for that
    names = [name.strip().lower() for value in offered for name in value.split(",")]
    if names != ["websocket"]:
        del headers["Upgrade"]
        if "websocket" in names:
            headers["Upgrade"] = "websocket"


def _plain(ws: ServerProtocol, request: Request, *, is_draining: bool) -> Response:
    """The answer to a health check, or to somebody who looks."""
    is_health = request.path.startswith("/healthz")
    status = 503 if is_draining else 200
    response = ws.reject(status, ("restarting\n" if is_draining else "ok\n") if is_health else ABOUT)
    if request.method == "HEAD":
        response.body = b""
    return response


def too_large(request: bytes | bytearray) -> tuple[int, str]:
    """Status and text of the answer to a request of more than MAX_REQUEST_BYTES, of which the beginning is here."""
    if LONG_REQUEST_LINE.match(request):
        return 414, f"the path and query have more than {MAX_PATH_BYTES} bytes\n"
    return 431, f"the request has more than {MAX_REQUEST_BYTES} bytes\n"


def has_bare_line_feed(request: bytes | bytearray, start: int, end: int) -> bool:
    """True if a line of a request ends without CR, from `start` on."""
    return BARE_LINE_FEED.search(request, start, end) is not None


def fault(request: bytes, error: BaseException | None) -> tuple[int, str]:
    """Status and text of the answer to a request that the library cannot read, or does not want to. `error` is its."""
    if isinstance(error, TooManyHeaders):
        return 431, f"the request has more than {MAX_NUM_HEADERS} headers\n"
    lines = request.split(b"\r\n")
    found = REQUEST_LINE.fullmatch(lines[0])
    if found is None:
        return 400, "this is no HTTP/1.1 request that opens a WebSocket\n"
    method = found[1].decode()
    if any(BODY.match(line) for line in lines[1:]):
        if method not in PLAIN_METHODS:
            return 405, f"a WebSocket is opened with GET, not with {method}\n"
        return 400, "a request that opens a WebSocket has no body (Content-Length, Transfer-Encoding)\n"
    return 400, "this is no HTTP/1.1 request that opens a WebSocket\n"


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
