"""Describe why a connection could not be opened, and decide whether a retry may help."""

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

from whaled.retry_after import retry_after_s
from whaled.urls import redacted

# Statuses below 500 that are temporary.
PASSING_STATUSES = {408, 425, 429}
# Statuses from 500 on that are permanent: the responding server does not support WebSocket.
LASTING_STATUSES = {501, 505}
# At most this much of a response's text, and of a redirect's target, is quoted in an error message.
QUOTED_CHARACTERS = 200

_UNREACHABLE = "the proxy in front of the server cannot reach it"
_NO_TLS = "the proxy in front of the server cannot establish TLS with it"
_STATUSES = {
    400: "a bad request: is the URL right?",
    401: "a proxy requires a login: put it into the URL, wss://user:password@host",
    403: "a proxy, a firewall or an allow list refuses this client",
    404: "nothing is served at this path: is the URL right, and does a proxy pass it on to whaled?",
    405: "no WebSocket is served at this path: does a proxy pass it on to whaled?",
    407: "a proxy requires a login",
    421: "a proxy does not serve this host name",
    426: "a proxy does not pass on `Upgrade`",
    429: "too many connections from this address",
    431: "the request is too large: is the URL right?",
    451: "blocked for legal reasons",
    501: "it does not support WebSocket",
    502: _UNREACHABLE,
    504: _UNREACHABLE,
    505: "it does not support HTTP/1.1, which WebSocket needs",
    511: "the network requires a login first (a captive portal)",
    **dict.fromkeys((521, 522, 523, 524, 530), _UNREACHABLE),
    **dict.fromkeys((525, 526), _NO_TLS),
}
_AUTHORITY = (
    "trust its authority (ssl=ssl.create_default_context(cafile=...), `whaled tail --ca-file FILE`); if that is a "
    "public one, the server does not send the complete chain"
)
# Advice by OpenSSL's verification error (X509_V_ERR_*).
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
    "CERTIFICATE_REQUIRED": "the server requires a client certificate",
}


class Place(Struct, frozen=True, kw_only=True):
    """The server that a stream connects to, for error messages: without login or query. `proxy` is a host and port."""

    host: str
    port: int
    is_secure: bool
    proxy: str | None = None
    unused_proxy: str | None = None  # an environment variable that is set and not used

    def __str__(self) -> str:
        """Return the host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_passing(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    match error:
        case InvalidStatus(response=response) | InvalidProxyStatus(response=response):
            status = response.status_code
            return status in PASSING_STATUSES or (status >= 500 and status not in LASTING_STATUSES)
        case InvalidMessage() | InvalidProxyMessage():
            return isinstance(error.__cause__, EOFError)  # the peer closed the connection before it responded
        case ProxyError():
            return True
        case _:
            return isinstance(error, OSError) and not isinstance(error, ssl.SSLCertVerificationError)


def reason_of(error: Exception, place: Place, *, timeout_s: float) -> str:
    """Return a one-line description of the error, with advice where there is some."""
    match error:
        case InvalidStatus(response=response):
            return f"{place} answered HTTP {response.status_code}{_status(response)}"
        case ProxyError() | InvalidMessage() | ssl.SSLError():
            return _handshake(error, place)
        case TimeoutError():
            return f"no answer from {place} within {timeout_s:g} s{_hint(place)}"
        case ConnectionResetError() if place.is_secure:
            return f"{place} hung up during the TLS handshake: no TLS version in common, or it requires a certificate"
        case OSError() | UnicodeError():
            subject = f"the proxy {place.proxy}" if place.proxy is not None else str(place)
            return f"cannot connect to {subject}: {_network(error, place)}{_hint(place)}"
        case _:
            return f"{place} is not a WebSocket server: {error}"


def retry_after(error: Exception, now: float) -> float | None:
    """Return the response's Retry-After in seconds, None if it is absent or invalid."""
    if not isinstance(error, InvalidStatus):
        return None
    return retry_after_s(error.response.headers.get_all("Retry-After"), now)


def _status(response: Response) -> str:
    """Return the response's text, if it is short and plain, and the meaning of its status."""
    status = response.status_code
    text = bytes(response.body or b"").decode(errors="replace").strip()
    is_quotable = 0 < len(text) <= QUOTED_CHARACTERS and text.isprintable() and not text.startswith("<")
    if 300 <= status < 400:
        # `get` raises if a header occurs twice.
        location = next(filter(None, response.headers.get_all("Location")), "")
        to = redacted(location[:QUOTED_CHARACTERS])
        leads = f" to {to!a}" if to else ""
        meaning = f"a redirect{leads}, which is not followed: the token is sent to no other server"
    elif 200 <= status < 300:
        meaning = "a web page, not a WebSocket: is the URL right, does a proxy pass on `Upgrade`?"
    else:
        meaning = _STATUSES.get(status, "")
    return (f": {text}" if is_quotable else "") + (f" ({meaning})" if meaning else "")


def _handshake(error: Exception, place: Place) -> str:
    """Describe a failed handshake: with a proxy, TLS or WebSocket."""
    match error:
        case InvalidProxyStatus(response=response):
            meaning = {
                403: f"it does not allow connections to {place}",
                407: "it requires a login: put it into its URL",
            }
            status = response.status_code
            return f"the proxy {place.proxy} answered HTTP {status} ({meaning.get(status, f'for {place}')})"
        case ProxyError():
            cause = error.__cause__ if error.__cause__ is not None else error
            return f"the proxy {place.proxy} failed, or is not a proxy of this kind: {cause}"
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
            return f"{place} is not a WebSocket server: {error}"


def _network(error: OSError | UnicodeError, place: Place) -> str:
    match error:
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return f"the name server does not respond for {place.host}"
        case socket.gaierror():
            return f"no address found for {place.host}: is the name right?"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)  # asyncio replaces the system's text by its own
        case _:
            # With several addresses, asyncio lists one error number per address in the text.
            numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
            return ", ".join(sorted(os.strerror(number) for number in numbers)) or str(error) or type(error).__name__


def _hint(place: Place) -> str:
    """Return a hint at the environment's proxy, if one is set: the network may require it."""
    if place.unused_proxy is None:
        return ""
    return f" (the environment's {place.unused_proxy} is not used: give a proxy with `proxy=`, `whaled tail --proxy`)"
