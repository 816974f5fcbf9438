"""One connection to the server: authentication, subscription, frames, and what its end means."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from whaled.client import events
from whaled.client.credentials import Credentials, auth_message
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

# What is said before a close 1008 when the token was not even looked at: the same one may come again.
NOT_JUDGED = {"Rate limit exceeded", "Authentication timeout"}
# A server that wants no token sends `welcome` at once; one that wants a token waits for it (`gateway.auth_timeout`).
WELCOME_S = 0.5
# What a close means where the server gives no reason.
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
    """The conversation over one connection."""

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
        self._asked: Since | None = None
        self._status: UpstreamStatus | None = None  # what came before `subscribed`; told after it
        self._last_error = ""  # the newest error message: a close 1008 follows some of them
        self._retry_after_s: float | None = None
        self._subscribed_at: float | None = None

    async def run(self) -> NoReturn:
        """Talk until the connection ends. Raises LinkLostError where the stream should come back, else what ends it."""
        try:
            answer = await self._enter()
            await self._report(answer)
            while True:
                await self._take(await self._receive())
        except ConnectionClosed as closed:
            raise self._ended(closed) from closed

    async def _enter(self) -> events.Subscribed:
        """Authenticate and subscribe. No delivery here waits for the consumer: a slow one is not a slow server."""
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
        """The first frame of a server that was sent no token. One that wants a token waits for it: ask, it refuses."""
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
                    # Whether the token is any good was not said: bring another one, if there is one.
                    self._credentials.doubted(self._token)
            case events.Closing() | events.TokenExpiring() | events.Token():
                await self._control(frame)
            case _:
                pass  # an alert before `subscribed` is unfiltered, and comes again after it

    async def _subscribe(self, welcome: events.Welcome) -> None:
        self._welcome = welcome
        self._credentials.accepted()
        self._asked = self._cursor.ask(welcome.position)
        message: dict[str, object] = {"type": "subscribe", "filters": self._dial.filters}
        if self._asked is not None:
            message["since"] = to_wire(self._asked)
        await self._send(message)

    async def _report(self, answer: events.Subscribed) -> None:
        """Deliver what the consumer must know before the first event."""
        assert self._welcome is not None
        self._subscribed_at = asyncio.get_running_loop().time()
        missed = self._cursor.answered(self._asked, answer)
        await self._deliver(
            Connected(client_id=self._welcome.client_id, head=answer.position, is_recovered=missed is None)
        )
        if missed is not None:
            await self._deliver(missed)
        elif self._cursor.received is not None:
            await self._deliver(Progress(position=self._cursor.received))
        if self._status is not None:
            await self._deliver(self._status)

    # --- after it ---

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
                self._last_error = frame.message  # about a renewal: the token's end will tell
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
                if token is None:
                    await self._send({"type": "refresh"})
                else:
                    self._token = token
                    await self._send(auth_message(token))

    # --- the end ---

    def _ended(self, closed: ConnectionClosed) -> Exception:
        """What the end of the connection means. May raise AuthenticationFailed."""
        received, sent = closed.rcvd, closed.sent
        if sent is not None and not closed.rcvd_then_sent:
            # This side closed: a frame over the bound, or no pong in time.
            if sent.code == 1009:
                limit = self._dial.limits.max_message_bytes
                return ProtocolError(f"the server sent a message above max_message_bytes ({limit})")
            return self._lost(1006, sent.reason)
        code = received.code if received is not None else 1006
        reason = received.reason if received is not None else ""
        if code == 1009:
            return SubscriptionError("too_big", "the filters are larger than this server takes in one message")
        if code == 1008:
            return self._turned_away(reason)
        return self._lost(code, reason)

    def _turned_away(self, reason: str) -> Exception:
        """What a close 1008 means."""
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
    """What an error instead of `subscribed` means."""
    if frame.code in {"rate_limited", "internal"}:
        return LinkLostError(f"subscribing: {frame.message}", retry_after_s=bounded(frame.retry_after))
    return SubscriptionError(frame.code, frame.message, frame.path)
