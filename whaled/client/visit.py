"""One connection to the server: authentication, subscription, frames, and the classification of its end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from whaled.client import events
from whaled.client.credentials import Credentials, auth_message, is_api_key
from whaled.client.cursor import Cursor
from whaled.client.dial import Dial, bounded
from whaled.client.events import (
    Connected,
    Progress,
    StreamEvent,
    TokenRenewed,
    UpstreamStatus,
    WhaleAlert,
    WhaleUpdate,
)
from whaled.client.failures import LinkLostError, ProtocolError, SubscriptionError, UnusableServerError
from whaled.client.since import Since, to_wire

# Error messages before a close 1008 when the server did not check the token: the same token may be used again.
NOT_JUDGED = {"Rate limit exceeded", "Authentication timeout"}
# A server that requires no token sends `welcome` at once; otherwise it waits for one (`gateway.auth_timeout`).
WELCOME_S = 0.5
# Descriptions of close codes, for a close without a reason.
CLOSES = {
    1000: "closed by the server",
    1001: "server is going away",
    1006: "connection lost",
    1011: "error on the server",
    1012: "server restarts",
    1013: "server is busy",
}

_encode = msgspec.json.Encoder().encode


class Visit:
    """The session on one connection."""

    def __init__(
        self,
        ws: ClientConnection,
        dial: Dial,
        *,
        credentials: Credentials,
        cursor: Cursor,
        deliver: Callable[[StreamEvent], Awaitable[None]],
    ) -> None:
        self._ws = ws
        self._dial = dial
        self._credentials = credentials
        self._cursor = cursor
        self._deliver = deliver
        self._token = credentials.token
        self._welcome: events.Welcome | None = None
        self._since: Since | None = None  # of the `subscribe` message
        self._status: UpstreamStatus | None = None  # received before `subscribed`, delivered after it
        self._last_error = ""  # the newest error message: it explains a following close 1008
        self._retry_after_s: float | None = None
        self._subscribed_at: float | None = None

    async def run(self) -> NoReturn:
        """Receive until the connection ends. Raises LinkLostError for the stream to reconnect, or a final error."""
        try:
            response = await self._enter()
            await self._report(response)
            while True:
                await self._take(await self._receive())
        except ConnectionClosed as closed:
            raise self._ended(closed) from closed

    async def _enter(self) -> events.Subscribed:
        """Authenticate and subscribe. Nothing here waits for the consumer, which would count as a slow server."""
        timeout_s = self._dial.limits.open_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if self._token is not None:
                    await self._send(auth_message(self._token))
                frame = await (self._receive() if self._token is not None else self._first())
                while True:
                    if isinstance(frame, events.Subscribed) and self._welcome is not None:
                        return frame
                    await self._prepare(frame)
                    frame = await self._receive()
        except TimeoutError as error:
            awaited = "welcome" if self._welcome is None else "subscribed"
            raise LinkLostError(
                f"no `{awaited}` from {self._dial.place} within {timeout_s:g} s: is it a whaled server?"
            ) from error

    async def _first(self) -> events.Frame | None:
        """Receive the first frame when there is no token to send.

        A server that requires a token sends nothing until it gets one; an empty `auth` makes it refuse at once.
        """
        try:
            async with asyncio.timeout(WELCOME_S):
                return await self._receive()
        except TimeoutError:
            await self._send({"type": "auth"})
            return await self._receive()

    async def _receive(self) -> events.Frame | None:
        return events.decode(await self._ws.recv(decode=False))

    async def _send(self, message: object) -> None:
        await self._ws.send(_encode(message).decode())

    # --- before `subscribed` ---

    async def _prepare(self, frame: events.Frame | None) -> None:
        match frame:
            case events.Welcome():
                await self._subscribe(frame)
            case UpstreamStatus():
                self._status = frame
            case events.ErrorFrame():
                self._last_error = frame.message
                if frame.retry_after is not None:
                    self._retry_after_s = bounded(frame.retry_after)
                if self._welcome is not None:
                    raise _refusal(frame)
                if frame.code == "rate_limited":
                    # The message does not state whether the token is valid, so use another one, if there is one.
                    self._credentials.doubted(self._token)
            case events.Closing() | events.TokenExpiring() | events.Token():
                await self._control(frame)
            case _:
                pass  # an alert before `subscribed` is unfiltered, and is replayed after it

    async def _subscribe(self, welcome: events.Welcome) -> None:
        self._welcome = welcome
        self._credentials.accepted()
        self._since = self._cursor.start(welcome.position)
        message: dict[str, object] = {"type": "subscribe", "filters": self._dial.filters}
        if self._since is not None:
            message["since"] = to_wire(self._since)
        await self._send(message)

    async def _report(self, response: events.Subscribed) -> None:
        """Deliver the state of the new connection, ahead of its first event."""
        assert self._welcome is not None
        self._subscribed_at = asyncio.get_running_loop().time()
        missed = self._cursor.subscribed(self._since, response)
        await self._deliver(
            Connected(client_id=self._welcome.client_id, head=response.position, is_recovered=missed is None)
        )
        if missed is not None:
            await self._deliver(missed)
        elif self._cursor.received is not None:
            await self._deliver(Progress(position=self._cursor.received))
        if self._status is not None:
            await self._deliver(self._status)

    # --- after `subscribed` ---

    async def _take(self, frame: events.Frame | None) -> None:
        match frame:
            case WhaleAlert() | WhaleUpdate():
                if self._cursor.take(frame.position):
                    await self._deliver(frame)
            case events.Moved():
                if self._cursor.take(frame.position):
                    await self._deliver(Progress(position=frame.position))
            case UpstreamStatus():
                await self._deliver(frame)
            case events.ErrorFrame():
                self._last_error = frame.message  # of a failed renewal: the server closes when the token expires
            case events.Closing() | events.TokenExpiring() | events.Token():
                await self._control(frame)
            case _:
                pass

    async def _control(self, frame: events.Closing | events.TokenExpiring | events.Token) -> None:
        match frame:
            case events.Closing():
                self._retry_after_s = bounded(frame.retry_after)
            case events.Token():
                self._token = frame.token
                self._credentials.refreshed(frame.token)
                await self._deliver(TokenRenewed(token=frame.token, expires_at=frame.expires_at))
            case events.TokenExpiring():
                token = await self._credentials.renewed()
                if token is None and is_api_key(self._token):
                    return  # a key has no refresh, and is valid until the server closes the connection
                if token is None:
                    await self._send({"type": "refresh"})
                else:
                    self._token = token
                    await self._send(auth_message(token))

    # --- the end of the connection ---

    def _ended(self, closed: ConnectionClosed) -> Exception:
        """Return the error for the end of the connection. May raise AuthenticationFailed."""
        received, sent = closed.rcvd, closed.sent
        if sent is not None and not closed.rcvd_then_sent:
            # This side closed the connection: a frame above the limit, or no pong in time.
            if sent.code == 1009:
                limit = self._dial.limits.max_message_bytes
                return ProtocolError(f"the server sent a message above max_message_bytes ({limit})")
            return self._lost(1006, sent.reason)
        code = received.code if received is not None else 1006
        reason = received.reason if received is not None else ""
        if code == 1009:
            return SubscriptionError("too_big", "the filters are larger than this server takes in one message")
        if code == 1008:
            return self._refused(reason)
        return self._lost(code, reason)

    def _refused(self, reason: str) -> Exception:
        """Return the error for a close 1008."""
        if self._welcome is None:
            message = self._last_error or reason
            if self._token is None or message not in NOT_JUDGED:
                self._credentials.refused(self._token, message)
            return self._lost(1008, message)
        if reason == "Rate limit exceeded":
            return UnusableServerError("closed by the server for sending too much (1008 Rate limit exceeded)")
        self._credentials.refused(self._token, reason)
        return self._lost(1008, reason)

    def _lost(self, code: int, reason: str) -> LinkLostError:
        up_s = 0.0 if self._subscribed_at is None else asyncio.get_running_loop().time() - self._subscribed_at
        reason = reason or CLOSES.get(code, "closed by the server")
        return LinkLostError(
            reason if code == 1006 else f"{reason} ({code})",
            code=code,
            retry_after_s=self._retry_after_s,
            was_up_s=up_s,
        )


def _refusal(frame: events.ErrorFrame) -> Exception:
    """Return the error for an `error` frame in place of `subscribed`."""
    if frame.code in {"rate_limited", "internal"}:
        return LinkLostError(f"subscribing: {frame.message}", retry_after_s=bounded(frame.retry_after))
    return SubscriptionError(frame.code, frame.message, frame.path)
