"""Why a connection could not be made, in words, and whether trying again may help. Pure."""

import os
import re
import socket
import ssl

from msgspec import Struct
from websockets.exceptions import (
    InvalidMessage,
    InvalidProxyMessage,
    InvalidProxyStatus,
    InvalidStatus,
    ProxyError,
)
from websockets.http11 import Response

from whaled.config.rules import redacted
from whaled.upstream.retry_after import retry_after_s

# Statuses below 500 that pass.
PASSING_STATUSES = {408, 425, 429}
# Statuses from 500 on that do not: who answers knows no WebSocket.
LASTING_STATUSES = {501, 505}
# How much of a refusal's text, and of a redirect's target, an error message quotes.
QUOTED_CHARACTERS = 200

_UNREACHABLE = "the proxy before the server does not reach it"
_NO_TLS = "the proxy before the server makes no TLS connection to it"
_STATUSES = {
    400: "the request is not understood: is the URL right?",
    401: "a proxy wants a login: put it into the URL, wss://user:password@host",
    403: "a proxy, a firewall or an allow list turns this client away",
    404: "nothing is served at this path: is the URL right, and does a proxy pass it on to whaled?",
    405: "no WebSocket is served at this path: does a proxy pass it on to whaled?",
    407: "a proxy wants a login",
    421: "a proxy does not serve this host name",
    426: "a proxy does not pass on `Upgrade`",
    429: "too many connections of this address",
    431: "the request is too large: is the URL right?",
    451: "blocked for legal reasons",
    501: "it knows no WebSocket",
    502: _UNREACHABLE,
    504: _UNREACHABLE,
    505: "it knows no HTTP/1.1, which WebSocket needs",
    511: "the network wants a login first (a captive portal)",
    **dict.fromkeys((521, 522, 523, 524, 530), _UNREACHABLE),
    **dict.fromkeys((525, 526), _NO_TLS),
}
_AUTHORITY = (
    "trust its authority (ssl=ssl.create_default_context(cafile=...), `whaled tail --ca-file FILE`); if that is a "
    "public one, the server does not send the whole chain"
)
# By the codes of OpenSSL (X509_V_ERR_*).
_CERTIFICATES = {
    9: "is the clock of this machine right?",
    10: "the server needs a new one; is the clock of this machine right?",
    **dict.fromkeys((18, 19, 20, 21), _AUTHORITY),
    62: "connect by a name that is in the certificate",
    64: "connect by a name or an address that is in the certificate",
}
_TLS_HINTS = {
    "PROTOCOL_VERSION": "no TLS version in common",
    "UNSUPPORTED_PROTOCOL": "no TLS version in common",
    "CERTIFICATE_REQUIRED": "the server wants a certificate of the client",
}


class Place(Struct, frozen=True, kw_only=True):
    """Where a stream connects to, for messages: no login, no query. `proxy` is the host and port of one."""

    host: str
    port: int
    is_secure: bool
    proxy: str | None = None
    unused_proxy: str | None = None  # a variable of the environment

    def __str__(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_passing(error: Exception) -> bool:
    """Whether trying the same again may work."""
    match error:
        case InvalidStatus(response=response) | InvalidProxyStatus(response=response):
            status = response.status_code
            return status in PASSING_STATUSES or (status >= 500 and status not in LASTING_STATUSES)
        case InvalidMessage() | InvalidProxyMessage():
            return isinstance(error.__cause__, EOFError)  # hung up before it answered
        case ProxyError():
            return True
        case _:
            return isinstance(error, OSError) and not isinstance(error, ssl.SSLCertVerificationError)


def reason_of(error: Exception, place: Place, *, timeout_s: float) -> str:
    """What went wrong, and what to do about it where that is known."""
    match error:
        case InvalidStatus(response=response):
            return f"{place} answered HTTP {response.status_code}{_status(response)}"
        case ProxyError() | InvalidMessage() | ssl.SSLError():
            return _handshake(error, place)
        case TimeoutError():
            return f"no answer from {place} within {timeout_s:g} s{_hint(place)}"
        case ConnectionResetError() if place.is_secure:
            return f"{place} hung up during the TLS handshake: no TLS version in common, or it wants a certificate"
        case OSError() | UnicodeError():
            subject = f"the proxy {place.proxy}" if place.proxy is not None else str(place)
            return f"cannot connect to {subject}: {_network(error, place)}{_hint(place)}"
        case _:
            return f"{place} is no WebSocket server: {error}"


def retry_after(error: Exception, now: float) -> float | None:
    """Retry-After of the answer in seconds, None where there is none that can be read."""
    if not isinstance(error, InvalidStatus):
        return None
    return retry_after_s(error.response.headers.get_all("Retry-After"), now)


def _status(response: Response) -> str:
    """What the server said with its status where it is short plain text, and what the status means."""
    status = response.status_code
    text = bytes(response.body or b"").decode(errors="replace").strip()
    is_quotable = 0 < len(text) <= QUOTED_CHARACTERS and text.isprintable() and not text.startswith("<")
    if 300 <= status < 400:
        # `get` raises where a header comes twice.
        location = next(filter(None, response.headers.get_all("Location")), "")
        to = redacted(location[:QUOTED_CHARACTERS])
        leads = f" to {to!a}" if to else ""
        meaning = f"a redirect{leads}, which is not followed, since the token goes to nobody else"
    elif 200 <= status < 300:
        meaning = "a web page, no WebSocket: is the URL right, does a proxy pass on `Upgrade`?"
    else:
        meaning = _STATUSES.get(status, "")
    return (f": {text}" if is_quotable else "") + (f" ({meaning})" if meaning else "")


def _handshake(error: Exception, place: Place) -> str:
    """A handshake with a proxy, of TLS or of WebSocket that failed."""
    match error:
        case InvalidProxyStatus(response=response):
            meaning = {403: f"it does not allow connections to {place}", 407: "it wants a login: put it into its URL"}
            status = response.status_code
            return f"the proxy {place.proxy} answered HTTP {status} ({meaning.get(status, f'for {place}')})"
        case ProxyError():
            cause = error.__cause__ if error.__cause__ is not None else error
            return f"the proxy {place.proxy} is no such proxy, or failed: {cause}"
        case ssl.SSLCertVerificationError(verify_message=message, verify_code=code):
            advice = _CERTIFICATES.get(code)
            return f"the certificate of {place} is not accepted: {message.rstrip('.')}" + (
                f"; {advice}" if advice else ""
            )
        case ssl.SSLError():
            name = error.reason or ""
            hint = next((text for part, text in _TLS_HINTS.items() if part in name), None)
            words = name.replace("_", " ").lower() or error.strerror or str(error)
            return f"the TLS handshake with {place} failed: {hint or words}"
        case _ if is_passing(error):
            return f"{place} hung up during the handshake"
        case _:
            return f"{place} is no WebSocket server: {error}"


def _network(error: OSError | UnicodeError, place: Place) -> str:
    match error:
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return f"the name server does not answer for {place.host}"
        case socket.gaierror():
            return f"no address is known for {place.host}: is the name right?"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)  # asyncio words its own
        case _:
            numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}  # one for each address
            return ", ".join(sorted(os.strerror(number) for number in numbers)) or str(error) or type(error).__name__


def _hint(place: Place) -> str:
    """A proxy of the environment may be what is missing."""
    if place.unused_proxy is None:
        return ""
    return f" ({place.unused_proxy} of the environment is not used: give a proxy with `proxy=`, `whaled tail --proxy`)"
