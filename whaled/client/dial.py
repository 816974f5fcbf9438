"""Opening a connection to the server and closing one, and what it means when the first does not work."""

import asyncio
import socket
import ssl
import time
from collections.abc import Mapping

from msgspec import Struct
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from whaled.client import probe
from whaled.client.failures import LinkLostError, UnusableServerError
from whaled.client.reasons import Place, is_passing, reason_of, retry_after

# The longest a server may ask this client to stay away: a slip of its clock or its unit must not be for ever.
RETRY_AFTER_MAX_S = 600.0
# How the answer to a handshake begins.
HTTP = b"HTTP/"


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
    place: Place  # for messages: a URL may carry a password
    filters: Mapping[str, object]
    tls: ssl.SSLContext | bool | None
    proxy: str | None
    compresses: bool  # ask for permessage-deflate
    limits: Limits


class _Connect(connect):
    """A connect that follows no redirects: the token goes to the server it was meant for."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class _Connection(ClientConnection):
    """A connection that is cut as soon as the other side speaks anything but HTTP: it may wait for a client of its own.

    websockets would wait for the end of the connection, or of `open_timeout_s`.
    """

    _begin = b""

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        super().data_received(data)
        if len(self._begin) < len(HTTP):
            self._begin += data[: len(HTTP)]
            if not HTTP.startswith(self._begin[: len(HTTP)]):
                self.transport.abort()


async def call(dial: Dial, *, is_first: bool) -> ClientConnection:
    """Open the connection. Raises LinkLostError, or UnusableServerError where trying again will not help.

    What looks like a mistake in the URL or the certificate ends a stream that never worked (`is_first`); one that did
    work goes on trying, since then it is somebody's outage.
    """
    limits = dial.limits
    try:
        return await _Connect(
            dial.url,
            create_connection=_Connection,
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
        found = await _look(error, dial) if is_first else None
        reason = reason_of(error, dial.place, timeout_s=limits.open_timeout_s) if found is None else found.reason
        if is_first and (not is_passing(error) if found is None else found.is_mistake):
            raise UnusableServerError(reason) from error
        raise LinkLostError(reason, retry_after_s=bounded(retry_after(error, time.time()))) from error


class _Found(Struct, frozen=True):
    """What a second look at the port found, and whether it is a mistake in the URL, which no waiting mends."""

    reason: str
    is_mistake: bool = True


async def _look(error: Exception, dial: Dial) -> _Found | None:
    """Whether the port speaks something else than the URL says; None if that is not so, or cannot be found out.

    A proxy is in the way of finding it out, and what has a certificate or a status speaks what it should. But a status
    400 is also how some servers answer plain HTTP on a port that speaks TLS.
    """
    place = dial.place
    is_clear = isinstance(error, ssl.SSLCertVerificationError | socket.gaierror)
    if isinstance(error, InvalidStatus):
        is_clear = place.is_secure or error.response.status_code != 400
    if dial.proxy is not None or is_clear or not _is_open(error):
        return None
    if not place.is_secure and await probe.speaks_tls(place.host, place.port):
        return _Found(f"{place}: this port speaks TLS: use wss://{place}")
    if isinstance(error, InvalidStatus):
        return None
    greeting = await probe.listen(place.host, place.port)
    if greeting.service is not None:
        return _Found(f"{place} speaks {greeting.service}, not WebSocket: is the port right?")
    if greeting.is_http and place.is_secure:
        return _Found(f"{place}: this port speaks no TLS: use ws://{place}")
    if isinstance(error, TimeoutError) and not greeting.received:
        waited = f"within {dial.limits.open_timeout_s:g} s"
        if greeting.is_open:
            return _Found(f"{place} accepts connections and answers nothing {waited}: is it a whaled server?", False)
        reason = reason_of(error, place, timeout_s=dial.limits.open_timeout_s)
        return _Found(f"{reason}: is the address right, does a firewall drop packets?", False)
    return None


def _is_open(error: Exception) -> bool:
    """Whether something may listen at the port, or did."""
    return not isinstance(error, OSError) or isinstance(error, ssl.SSLError | TimeoutError | ConnectionResetError)


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
