"""The reasons why a link to the mempool backend ended or could not be made, each with advice for the operator."""

import errno
import socket
import ssl
import time
from enum import StrEnum

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    WebSocketException,
)
from websockets.frames import CloseCode

from whaled.config.sections import UpstreamSettings
from whaled.errors import UpstreamError
from whaled.retry_after import retry_after_s
from whaled.sources.mempool_space.address import through
from whaled.sources.mempool_space.proxy import ProxyError
from whaled.urls import without_secrets


class LossReason(StrEnum):
    """The reason there is no link (a metric label)."""

    REFUSED = "refused"
    DNS = "dns"
    TIMEOUT = "timeout"
    HANDSHAKE = "handshake"
    TLS = "tls"
    CLOSED = "closed"
    STALE = "stale"
    TOO_BIG = "too_big"
    PROTOCOL = "protocol"
    PROXY = "proxy"
    NOT_MEMPOOL = "not_mempool"
    BUSY = "busy"
    WRONG_NETWORK = "wrong_network"
    OTHER = "other"


class LinkLostError(UpstreamError):
    """The loss of the link, or the failure to make one.

    `wait_s` is the least delay until the next attempt: the server requested it, or it suits a fault which only an
    operator can fix.
    """

    def __init__(self, reason: LossReason, detail: str, *, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.wait_s = wait_s


# Upper limit for a server's Retry-After. A wrong header could otherwise cost hours without a single whale.
RETRY_AFTER_LIMIT_S = 300.0

# Every error that the network, a proxy, TLS or a server that is not a WebSocket server can cause.
LINK_ERRORS = (OSError, EOFError, WebSocketException, ProxyError)


def diagnose(error: Exception, settings: UpstreamSettings) -> LinkLostError:
    """Return the reason for one of LINK_ERRORS, with a text for the operator."""
    if isinstance(error, ProxyError):
        return LinkLostError(LossReason.PROXY, str(error))
    way = settings.unix_socket
    if way is not None and isinstance(error, FileNotFoundError | PermissionError | ConnectionRefusedError):
        return LinkLostError(
            LossReason.REFUSED, f"cannot connect through {way} (upstream.unix_socket): {error.strerror}; is it served?"
        )
    if way is not None and _is_unanswered(error):
        return LinkLostError(
            LossReason.REFUSED,
            f"connected to {way} (upstream.unix_socket), and the connection ended without an answer: what serves the "
            "socket did not reach the mempool backend. Is the backend running? In the egress split, "
            "`journalctl -u whaled-egress` has the reason, and `systemctl cat whaled-egress` the host and port",
        )
    return _diagnosed(error, settings)


def _is_unanswered(error: Exception) -> bool:
    """Return whether a connection ended before any response: the socket is served, but its target did not respond."""
    if isinstance(error, InvalidMessage):
        return isinstance(error.__cause__, EOFError)
    return isinstance(error, ConnectionError | ssl.SSLEOFError)


def _diagnosed(error: Exception, settings: UpstreamSettings) -> LinkLostError:
    match error:
        case ConnectionClosed():
            return _closed(error, settings)
        case InvalidStatus():
            return _busy(error) or LinkLostError(LossReason.HANDSHAKE, _status(error, settings))
        case InvalidHandshake():
            return LinkLostError(LossReason.HANDSHAKE, f"not a WebSocket server: {_chain(error)}; {_EXPECTED}")
        case ssl.SSLCertVerificationError():
            return LinkLostError(
                LossReason.TLS,
                f"the certificate is not accepted: {error.verify_message}; for a private CA, set SSL_CERT_FILE",
            )
        case ssl.SSLError():
            return LinkLostError(LossReason.TLS, f"TLS failed: {error}; does the server speak TLS (wss:// or ws://)?")
        case socket.gaierror():
            return LinkLostError(LossReason.DNS, f"the host name cannot be resolved: {error.strerror}")
        case TimeoutError():
            return LinkLostError(
                LossReason.TIMEOUT,
                f"no connection within upstream.connect_timeout ({settings.connect_timeout:g} s){through(settings)}",
            )
        case OSError() if _is_refusal(error):
            return LinkLostError(LossReason.REFUSED, "nothing listens there; is the mempool backend running?")
        case ConnectionError():
            return LinkLostError(LossReason.CLOSED, f"the connection broke: {error}")
        case _:
            return LinkLostError(LossReason.OTHER, f"{type(error).__name__}: {_chain(error)}")


def not_mempool(text: str | None, settings: UpstreamSettings) -> LinkLostError:
    """Return the error for a server that accepted the subscription but did not respond as a backend does.

    `text` is the beginning of its first message, None if it sent none.
    """
    found = f"it sent {text!r}" if text is not None else "it sent nothing"
    return LinkLostError(
        LossReason.NOT_MEMPOOL,
        f"not a mempool backend: within {settings.connect_timeout:g} s no response to init, {found}; {_EXPECTED}",
    )


def stale(settings: UpstreamSettings) -> LinkLostError:
    """Return the error for a link on which nothing was received and a ping stayed unanswered."""
    return LinkLostError(
        LossReason.STALE, f"nothing received for {settings.stale_after:g} s (upstream.stale_after), pings unanswered"
    )


_EXPECTED = "is upstream.url a mempool backend? Expected ws://host:8999/api/v1/ws or wss://host/api/v1/ws"


def _closed(error: ConnectionClosed, settings: UpstreamSettings) -> LinkLostError:
    by_us = error.sent is not None and not error.rcvd_then_sent
    code = error.sent.code if by_us and error.sent is not None else None
    if code == CloseCode.MESSAGE_TOO_BIG:
        return LinkLostError(
            LossReason.TOO_BIG,
            f"a message exceeds upstream.max_message ({settings.max_message} bytes); raise it to read such messages",
        )
    if code in {CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_DATA}:
        return LinkLostError(LossReason.PROTOCOL, f"the server broke the WebSocket protocol: {error.sent}")
    if error.rcvd is None:
        # A cause that is not a network error only repeats that the stream ended.
        cause = f": {error.__cause__}" if isinstance(error.__cause__, OSError) else ""
        return LinkLostError(LossReason.CLOSED, f"the connection ended without a close frame{cause}")
    return LinkLostError(LossReason.CLOSED, f"closed by the server: {error.rcvd}")


def _busy(error: InvalidStatus) -> LinkLostError | None:
    """Return the error for a server that limits requests or names a time to retry after; None if it does neither."""
    status = error.response.status_code
    asked_s = retry_after_s(error.response.headers.get_all("Retry-After"), time.time())
    if status != 429 and (status != 503 or asked_s is None):
        return None
    limited = "too many requests or connections from here" if status == 429 else "not at the moment"
    if asked_s is None:
        return LinkLostError(LossReason.BUSY, f"HTTP {status}: {limited}; no Retry-After, so the usual delays apply")
    wait_s = min(asked_s, RETRY_AFTER_LIMIT_S)
    capped = "" if wait_s == asked_s else f", of which whaled waits {wait_s:g} s"
    return LinkLostError(
        LossReason.BUSY, f"HTTP {status}: {limited}; Retry-After of {asked_s:g} s{capped}", wait_s=wait_s
    )


def _status(error: InvalidStatus, settings: UpstreamSettings) -> str:
    status = error.response.status_code
    # `get` would raise if a header occurs twice.
    location = next(filter(None, error.response.headers.get_all("Location")), None)
    if 300 <= status < 400 and location is not None:
        to = without_secrets(location).replace("https://", "wss://", 1).replace("http://", "ws://", 1)
        return (
            f"HTTP {status}, redirected to {without_secrets(location)}; set upstream.url to {to} if that is the backend"
        )
    if status in {401, 403}:
        return f"HTTP {status}: the server, or a proxy in front of it, refuses access"
    if status in {502, 503, 504}:
        return f"HTTP {status}: a proxy answered, the mempool backend behind it did not; is it running?"
    return f"HTTP {status} for {without_secrets(settings.url)}; {_EXPECTED}"


def _is_refusal(error: OSError) -> bool:
    # For a name with several addresses there is one OSError, which only quotes the errors of each.
    return error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in str(error)


def _chain(error: BaseException) -> str:
    cause = error.__cause__
    return f"{error} ({cause})" if cause is not None else str(error)
