"""Open a connection to the server, and classify why one could not be opened."""

import socket
import ssl
import time
from collections.abc import Mapping

from msgspec import Struct
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus, WebSocketException

from whaled.client import probe
from whaled.client.failures import LinkLostError, UnusableServerError
from whaled.client.reasons import Place, is_passing, reason_of, retry_after
from whaled.websocket_client import Connect

# Longest wait that a server can impose: a wrong clock or unit on its side must not stop the stream for hours.
RETRY_AFTER_MAX_S = 600.0
# First bytes of a response to the handshake.
HTTP = b"HTTP/"


class Limits(Struct, frozen=True, kw_only=True):
    """The timeouts and buffer sizes of a stream.

    A message from whaled is a few KiB; `max_message_bytes` leaves room for thousands of labelled addresses. At most
    `buffered_events` wait for a busy consumer. Then the stream stops reading, and the server later continues from its
    log.
    """

    open_timeout_s: float = 10.0
    close_timeout_s: float = 3.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    max_message_bytes: int = 16 * 1024 * 1024
    buffered_events: int = 256


class Dial(Struct, frozen=True, kw_only=True):
    """The parameters of a connection. `tls` True is the verifying default context."""

    url: str
    place: Place  # for error messages: a URL may contain a password
    filters: Mapping[str, object]
    tls: ssl.SSLContext | bool | None
    proxy: str | None
    compresses: bool  # offer permessage-deflate
    limits: Limits


class _Connection(ClientConnection):
    """A connection that is aborted as soon as the peer sends anything but HTTP.

    Without this, websockets waits until the peer closes or `open_timeout_s` has passed: a peer that speaks another
    protocol may be waiting for the client to send something.
    """

    _begin = b""

    def data_received(self, data: bytes) -> None:
        """Process received bytes."""
        super().data_received(data)
        if len(self._begin) < len(HTTP):
            self._begin += data[: len(HTTP)]
            if not HTTP.startswith(self._begin[: len(HTTP)]):
                self.transport.abort()


async def call(dial: Dial, *, is_first: bool) -> ClientConnection:
    """Open the connection. Raises LinkLostError, or UnusableServerError if retrying will not help.

    An error that points to a wrong URL or certificate ends a stream that has never connected (`is_first`). A stream
    that has been connected keeps retrying, since the cause is then an outage.
    """
    limits = dial.limits
    try:
        return await Connect(
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
        found = await _diagnose(error, dial) if is_first else None
        reason = reason_of(error, dial.place, timeout_s=limits.open_timeout_s) if found is None else found.reason
        if is_first and (not is_passing(error) if found is None else found.is_mistake):
            raise UnusableServerError(reason) from error
        raise LinkLostError(reason, retry_after_s=bounded(retry_after(error, time.time()))) from error


class _Found(Struct, frozen=True):
    """The result of probing the port. With `is_mistake` the URL is wrong, and retrying will not help."""

    reason: str
    is_mistake: bool = True


async def _diagnose(error: Exception, dial: Dial) -> _Found | None:
    """Return a protocol mismatch between port and URL, or a hint for a silent port; None if there is neither.

    Through a proxy neither can be determined. A certificate error or an HTTP status proves that the protocol is the
    right one, except that some servers respond with status 400 to plain HTTP on a TLS port.
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
        return _Found(f"{place}: this port does not speak TLS: use ws://{place}")
    if isinstance(error, TimeoutError) and not greeting.received:
        waited = f"within {dial.limits.open_timeout_s:g} s"
        if greeting.is_open:
            return _Found(f"{place} accepts connections and sends nothing {waited}: is it a whaled server?", False)
        reason = reason_of(error, place, timeout_s=dial.limits.open_timeout_s)
        return _Found(f"{reason}: is the address right, does a firewall drop packets?", False)
    return None


def _is_open(error: Exception) -> bool:
    """Return whether a server may be listening on the port."""
    return not isinstance(error, OSError) or isinstance(error, ssl.SSLError | TimeoutError | ConnectionResetError)


def bounded(retry_after_s: float | None) -> float | None:
    """Return a server's `retry_after` limited to 0 ... RETRY_AFTER_MAX_S."""
    return None if retry_after_s is None else min(max(0.0, retry_after_s), RETRY_AFTER_MAX_S)
