"""The handshake request: its checks, its refusals, and the subprotocol and credential in it."""

import re
from collections.abc import Generator, Iterable, Sequence
from typing import Final

from websockets.datastructures import Headers
from websockets.exceptions import ProtocolError, TooManyHeaders
from websockets.http11 import MAX_NUM_HEADERS, Request, Response
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.typing import Subprotocol

from whaled.gateway.deflate import Offers
from whaled.gateway.limits import Refusal
from whaled.gateway.origins import Origins

SUBPROTOCOL = "whaled.v1"
BEARER_SUBPROTOCOL_PREFIX = "bearer."
# Query parameters that carry a credential in other products. whaled refuses them, since URLs end up in logs and
# browser histories.
CREDENTIAL_PARAMETERS = ("token", "access_token", "api_key", "apikey", "jwt", "auth", "authorization")
# The largest handshake request, headers included. The library would collect up to 1 MiB per connection.
MAX_REQUEST_BYTES = 16 * 1024
# Longer than any path of a genuine client or load balancer. The whole path is searched for credentials.
MAX_PATH_BYTES = 2048

# The `Retry-After` of a refused request. Clients that were refused together spread their next attempt themselves.
RETRY_AFTER_S = 5
END_OF_REQUEST = b"\r\n\r\n"
# The first bytes of a TLS connection: its first record is a handshake, and the major version has always been 3.
TLS_BEGINS = b"\x16\x03"

REFUSAL_STATUS = {
    Refusal.GLOBAL_CAP: (503, "too many connections"),
    Refusal.ADDRESS_CAP: (429, "too many connections from this address"),
    Refusal.CONNECT_RATE: (429, "too many connections from this network"),
    Refusal.MEMORY: (503, "out of memory"),
    Refusal.DRAINING: (503, "restarting"),
    Refusal.TOKEN_IN_URL: (
        400,
        "a token in the URL ends up in logs: send it as first message, as Authorization header or as subprotocol",
    ),
}


EXTENSIONS = (Offers(),)
# Headers with lists. No genuine client sends ten items, and the library takes 2 us for each.
LISTS = ("Connection", "Upgrade", "Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol")
MAX_SEPARATORS = 50


class _Reader(StreamReader):
    """The library's reader with two changes.

    Lines may be as long as the request, since a token alone may fill the library's limit of 8 KiB. A length in more
    bytes than it needs is refused (RFC 6455, 5.2). The library reads a frame as 2 bytes, then 2 or 8 bytes of a longer
    length, then 4 bytes of the mask, then the payload.
    """

    _at = 0  # the part that is read next; 0: the beginning of a frame; 1: its length; 2: its mask; 3: its payload

    def read_line(self, m: int, too_long_exc_type: type[Exception] = RuntimeError) -> Generator[None, None, bytearray]:
        """Read a line. Raises EOFError, or `too_long_exc_type` for a line longer than the request may be."""
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
    """The library's server protocol, adapted to whaled.

    It selects the subprotocol `whaled.v1` if the client offers it, and none otherwise. If `compresses`, it accepts
    offers of compression.
    """

    def __init__(self, *, max_size: int | None = None, compresses: bool = False) -> None:
        super().__init__(max_size=max_size, extensions=EXTENSIONS if compresses else None)

    def parse(self) -> Generator[None]:
        """Return the library's parser, using `_Reader`. The library's constructor creates the reader and calls this."""
        self.reader.__class__ = _Reader
        return super().parse()

    def end(self) -> None:
        """Stop the parser and break the reference cycles between this object, its parser and their exceptions.

        Otherwise their memory would wait for a full garbage collection, which is rare.
        """
        self.parser.close()
        if self.handshake_exc is not None:
            self.handshake_exc.__traceback__ = None  # the request also refers to the exception
        self.handshake_exc = self.parser_exc = None

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        """Return the subprotocol of whaled if the client offers it."""
        return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in subprotocols else None


class BadRequestError(Exception):
    """Bytes that are no handshake request. `status` and `text` are the response."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status = status
        self.text = text


def take_request(collected: bytearray, data: bytes) -> tuple[bytes, bytes] | None:
    """Add `data` to the bytes collected so far. Return the request, once it is complete, and the bytes that follow it.

    Raises BadRequestError as soon as these bytes can be no request.
    """
    seen = len(collected)
    collected += data
    end = collected.find(END_OF_REQUEST, max(0, seen - len(END_OF_REQUEST) + 1))
    size = end + len(END_OF_REQUEST) if end >= 0 else len(collected)
    if size > MAX_REQUEST_BYTES:
        raise BadRequestError(*too_large(collected))
    if collected.startswith(TLS_BEGINS):
        raise BadRequestError(400, "this port speaks no TLS: connect with ws://\n")
    if has_bare_line_feed(collected, seen, size):
        raise BadRequestError(400, "a line of the request ends with LF alone: HTTP/1.1 has CR LF\n")
    return (bytes(collected[:size]), bytes(collected[size:])) if end >= 0 else None


def refuse(ws: ServerProtocol, refusal: Refusal) -> Response:
    """Return the response to a refused request."""
    status, text = REFUSAL_STATUS[refusal]
    response = ws.reject(status, text + "\n")
    if status != 400:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


REQUEST_LINE: Final = re.compile(rb"([A-Za-z]{1,32}) [!-~]+ HTTP/1\.[01]")
LONG_REQUEST_LINE: Final = re.compile(rb"[A-Za-z]{1,32} [!-~]{%d}" % (MAX_PATH_BYTES + 1))
BARE_LINE_FEED: Final = re.compile(rb"(?<!\r)\n")
BODY: Final = re.compile(rb"content-length:(?![ \t]*0[ \t]*$)|transfer-encoding:", re.IGNORECASE)
# Paths that load balancers and people request without opening a WebSocket.
PLAIN_PATHS = {"/", "/healthz"}
PLAIN_METHODS = {"GET", "HEAD", "OPTIONS"}
ABOUT = "This port serves Bitcoin whale alerts over WebSocket: connect with ws:// or wss://.\n"


def judge(
    ws: ServerProtocol,
    request: Request,
    origins: Origins,
    *,
    verdict: Refusal | None,
    is_draining: bool,
    is_tls: bool,
) -> tuple[Refusal | None, Response | None]:
    """Return the refusal of a request and its response, or (None, None) if only the library may still refuse it.

    `verdict` is the refusal that was decided at the accept, if any. A health check is answered nevertheless.
    """
    refusal, response = _judge(ws, request, origins, is_draining=is_draining, is_tls=is_tls)
    if verdict is not None and refusal is not Refusal.NO_UPGRADE:
        return verdict, refuse(ws, verdict)
    return refusal, response


def _judge(
    ws: ServerProtocol, request: Request, origins: Origins, *, is_draining: bool, is_tls: bool
) -> tuple[Refusal | None, Response | None]:
    headers = request.headers
    if len(request.path) > MAX_PATH_BYTES:
        return Refusal.BAD_HANDSHAKE, ws.reject(414, f"the path and query have more than {MAX_PATH_BYTES} bytes\n")
    if has_credential(request.path):
        return Refusal.TOKEN_IN_URL, refuse(ws, Refusal.TOKEN_IN_URL)
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
    """Remove every protocol except `websocket` from the Upgrade header.

    Some clients offer h2c with every request, and a server may ignore an offer (RFC 9110, 7.8).
    """
    offered = headers.get_all("Upgrade")
    if not offered or _items(offered) > MAX_SEPARATORS:
        return  # `judge` refuses a list this long
    names = [name.strip().lower() for value in offered for name in value.split(",")]
    if names != ["websocket"]:
        del headers["Upgrade"]
        if "websocket" in names:
            headers["Upgrade"] = "websocket"


def _plain(ws: ServerProtocol, request: Request, *, is_draining: bool) -> Response:
    """Return the response to a health check or another request without an upgrade."""
    is_health = request.path.startswith("/healthz")
    status = 503 if is_draining else 200
    response = ws.reject(status, ("restarting\n" if is_draining else "ok\n") if is_health else ABOUT)
    if request.method == "HEAD":
        response.body = b""
    return response


def too_large(request: bytes | bytearray) -> tuple[int, str]:
    """Return status and text of the response to a request larger than MAX_REQUEST_BYTES, given its first bytes."""
    if LONG_REQUEST_LINE.match(request):
        return 414, f"the path and query have more than {MAX_PATH_BYTES} bytes\n"
    return 431, f"the request has more than {MAX_REQUEST_BYTES} bytes\n"


def has_bare_line_feed(request: bytes | bytearray, start: int, end: int) -> bool:
    """Return whether a line in request[start:end] ends with LF alone."""
    return BARE_LINE_FEED.search(request, start, end) is not None


def fault(request: bytes, error: BaseException | None) -> tuple[int, str]:
    """Return status and text of the response to a request that the library refused with `error`."""
    if isinstance(error, TooManyHeaders):
        return 431, f"the request has more than {MAX_NUM_HEADERS} headers\n"
    lines = request.split(b"\r\n")
    found = REQUEST_LINE.fullmatch(lines[0])
    if found is None:
        return 400, "this is not an HTTP/1.1 request that opens a WebSocket\n"
    method = found[1].decode()
    if any(BODY.match(line) for line in lines[1:]):
        if method not in PLAIN_METHODS:
            return 405, f"a WebSocket is opened with GET, not with {method}\n"
        return 400, "a request that opens a WebSocket has no body (Content-Length, Transfer-Encoding)\n"
    return 400, "this is not an HTTP/1.1 request that opens a WebSocket\n"


def credential(headers: Headers) -> str | None:
    """Return the credential of the Authorization header, or of a `bearer.` subprotocol, which browsers can send."""
    for header in headers.get_all("Authorization"):
        scheme, _, credential = header.partition(" ")
        if scheme.lower() == "bearer" and credential:
            return credential.strip()
    for offered in headers.get_all("Sec-WebSocket-Protocol"):
        for name in offered.split(","):
            if name.strip().startswith(BEARER_SUBPROTOCOL_PREFIX):
                return name.strip().removeprefix(BEARER_SUBPROTOCOL_PREFIX)
    return None


def has_credential(path: str) -> bool:
    """Return whether the query of a path has one of CREDENTIAL_PARAMETERS, in any case and percent-encoding."""
    return _CREDENTIAL.search("&" + path.partition("?")[2]) is not None


def _names(names: Iterable[str]) -> str:
    """Return a pattern for these names, each letter literal or percent-encoded.

    Parsing the query instead would take ten times as long.
    """
    return "|".join(
        "".join(f"(?:{re.escape(letter)}|%{ord(letter):02x}|%{ord(letter.upper()):02x})" for letter in name)
        for name in names
    )


_CREDENTIAL: Final = re.compile(rf"&(?:{_names(CREDENTIAL_PARAMETERS)})=[^&]", re.ASCII | re.IGNORECASE)
