"""Clients that follow the events until they are stopped, and record what they receive."""

import asyncio
import json
from abc import ABC, abstractmethod
from contextlib import suppress

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from faults.verdict import ClientEvent, Frame
from whaled.client import Last, Limits, Missed, Position, Retry, WhaleAlert, WhaleStream, WhaleUpdate
from whaled.gateway.handshake import SUBPROTOCOL
from whaled.model import SAT_PER_BTC

RETRY_S = 0.05


class Bot(ABC):
    """A client that follows the events until it is stopped."""

    _task: asyncio.Task[None] | None = None

    @abstractmethod
    async def _follow(self) -> None:
        """Follow until cancelled."""

    def begin(self) -> None:
        """Start following."""
        self._task = asyncio.create_task(self._follow())

    async def end(self) -> None:
        """Stop the client. Raises the exception that ended it, if any."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Follower(Bot):
    """A client of whaled's library that records its events, and resumes at its position after every fault."""

    def __init__(self, url: str, min_btc: int | None = None, token: str | None = None, *, ping_s: float = 2.0) -> None:
        self._url = url
        self._token = token
        self._ping_s = ping_s
        self._filters = {} if min_btc is None else {"min_btc": min_btc}
        self.least_sat = (min_btc or 0) * SAT_PER_BTC
        self.received: list[ClientEvent] = []
        self.missed: list[str] = []
        self.news = asyncio.Condition()
        self._position: Position | None = None

    async def _follow(self) -> None:
        async with WhaleStream(
            self._url,
            token=self._token,
            filters=self._filters,
            since=self._position or Last(10**9),
            link_events=True,  # otherwise each of thousands of connections is logged
            retry=Retry(initial_s=0.02, max_s=0.1),
            limits=Limits(open_timeout_s=3.0, ping_interval_s=self._ping_s, ping_timeout_s=self._ping_s),
        ) as stream:
            async for event in stream:
                match event:
                    case WhaleAlert(position=position, data=data):
                        self.received.append(ClientEvent(position.epoch, position.offset, "alert", data.transaction_id))
                    case WhaleUpdate(position=position, data=data):
                        self.received.append(
                            ClientEvent(position.epoch, position.offset, data.status, data.transaction_id)
                        )
                    case Missed():
                        self.missed.append(str(event))
                self._position = stream.position
                async with self.news:
                    self.news.notify_all()

    async def renew(self) -> None:
        """Stop, and start again at the recorded position."""
        await self.end()
        self.begin()

    async def has(self, count: int) -> None:
        """Wait until the client has received `count` events."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.received) >= count)


class RawFollower(Bot):
    """A client that records the raw frames, without a library that might hide faults in them."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url = url
        self._token = token
        self.frames: list[Frame] = []

    async def _follow(self) -> None:
        while True:
            with suppress(OSError, WebSocketException, TimeoutError):
                async with connect(
                    self._url, proxy=None, compression=None, max_size=None, subprotocols=[Subprotocol(SUBPROTOCOL)],
                    open_timeout=3.0, close_timeout=1.0, ping_interval=2.0, ping_timeout=2.0,
                ) as ws:  # fmt: skip
                    await self._take(ws)
            await asyncio.sleep(RETRY_S)

    async def _take(self, ws: ClientConnection) -> None:
        is_subscribed = False
        if self._token is not None:
            await ws.send(json.dumps({"type": "auth", "token": self._token}))
        while True:
            message = json.loads(await ws.recv())
            match message["type"]:
                case "welcome":
                    since = msgspec.to_builtins(self.frames[-1].position) if self.frames else {"last": 10**9}
                    await ws.send(json.dumps({"type": "subscribe", "filters": {}, "since": since}))
                case "subscribed":
                    assert message["recovered"], message
                    is_subscribed = True
                case "whale_alert" | "whale_update" if is_subscribed:  # the replay repeats earlier frames
                    self.frames.append(msgspec.convert(message, Frame))
