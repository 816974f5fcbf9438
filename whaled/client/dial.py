"""Opening a connection to the server and closing one, and what it means when the first does not work."""

import asyncio
import email.utils
import os
import socket
import ssl
import time
from collections.abc import Mapping

from msgspec import Struct
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidMessage, InvalidProxy, InvalidStatus, WebSocketException

from whaled.client.failures import LinkLostError, UnusableServerError

# Statuses that a server or a proxy before it answers with while it cannot serve for the moment.
PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
# The longest a server may ask this client to stay away: a slip of its clock or its unit must not be for ever.
RETRY_AFTER_MAX_S = 600.0
# How much of a refusal's text an error message quotes.
QUOTED_CHARACTERS = 200


class Limits(Struct, frozen=True, kw_only=True):
    """How long a stream waits for what, and how much it holds.

    A message from whaled is a few KiB; `max_message_bytes` is for one with thousands of labelled addresses.
    `buffered_events` wait for a busy consumer, then the server is not read any further, and later goes on from its log.
    """

    open_timeout_s: float = 10.0
    close_timeout_s: float = 3.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    max_message_bytes: int = 16 * 1024 * 1024
    buffered_events: int = 256


class Dial(Struct, frozen=True, kw_only=True):
    """Whom to call, how, and for what. `tls` True is the verifying default context."""

    url: str
    place: str  # host and port, for messages: a URL may carry a password
    filters: Mapping[str, object]
    tls: ssl.SSLContext | bool | None
    proxy: str | None
    compresses: bool  # ask for permessage-deflate
    limits: Limits


class _Connect(connect):
    """A connect that follows no redirects: the token goes to the server it was meant for."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


async def call(dial: Dial, *, is_first: bool) -> ClientConnection:
    """Open the connection. Raises LinkLostError, or UnusableServerError where trying again will not help.

    What looks like a mistake in the URL or the certificate ends a stream that never worked (`is_first`); one that did
    work goes on trying, since then it is somebody's outage.
    """
    limits = dial.limits
    try:
        return await _Connect(
            dial.url,
            proxy=dial.proxy,
            compression="deflate" if dial.compresses else None,
            open_timeout=limits.open_timeout_s,
            close_timeout=limits.close_timeout_s,
            ping_interval=limits.ping_interval_s,
            ping_timeout=limits.ping_timeout_s,
            max_size=limits.max_message_bytes,
            ssl=dial.tls,
        )
    except (OSError, UnicodeError, WebSocketException) as error:
        reason = _reason(error, dial)
        if not _is_passing(error) and (is_first or isinstance(error, InvalidProxy)):
            raise UnusableServerError(reason) from error
        raise LinkLostError(reason, retry_after_s=_retry_after(error)) from error


async def hang_up(ws: ClientConnection, timeout_s: float) -> None:
    """Close politely, then for certain: a peer that stopped reading would hold a close for ever."""
    try:
        async with asyncio.timeout(timeout_s):
            await ws.close()
    except (TimeoutError, WebSocketException):
        pass
    finally:
        ws.transport.abort()


def bounded(retry_after_s: float | None) -> float | None:
    """How long to stay away, within reason."""
    return None if retry_after_s is None else min(max(0.0, retry_after_s), RETRY_AFTER_MAX_S)


def _is_passing(error: Exception) -> bool:
    """Whether trying the same again may work."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code in PASSING_STATUSES
    if isinstance(error, InvalidMessage):
        return isinstance(error.__cause__, EOFError)  # hung up before it answered
    return isinstance(error, OSError) and not isinstance(error, ssl.SSLCertVerificationError)


def _reason(error: Exception, dial: Dial) -> str:
    place = dial.place
    match error:
        case InvalidStatus(response=response):
            return f"{place} answered HTTP {response.status_code}{_quoted(response.body)}"
        case ssl.SSLCertVerificationError(verify_message=message):
            return f"the certificate of {place} is not accepted: {message}"
        case TimeoutError():
            return f"no answer from {place} within {dial.limits.open_timeout_s:g} s"
        case InvalidMessage() if _is_passing(error):
            return f"{place} hung up during the handshake"
        case socket.gaierror() | ssl.SSLError():
            return f"cannot connect to {place}: {error.strerror or error}"
        case OSError(errno=int(number)) if number > 0:
            return f"cannot connect to {place}: {os.strerror(number)}"  # asyncio words its own
        case InvalidProxy() | OSError() | UnicodeError():
            return f"cannot connect to {place}: {error}"
        case _:
            return f"{place} is no WebSocket server: {error}"


def _quoted(body: bytes | bytearray | None) -> str:
    """What the server said with its refusal, where it is short plain text."""
    text = bytes(body or b"").decode(errors="replace").strip()
    return f": {text}" if 0 < len(text) <= QUOTED_CHARACTERS and text.isprintable() else ""


def _retry_after(error: Exception) -> float | None:
    """Retry-After in seconds: a number or a date (RFC 9110, 10.2.3). None where it is neither."""
    if not isinstance(error, InvalidStatus):
        return None
    value = error.response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return bounded(float(value))
    date = email.utils.parsedate_tz(value)
    return bounded(email.utils.mktime_tz(date) - time.time()) if date is not None else None
