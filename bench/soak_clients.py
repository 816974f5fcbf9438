"""The clients of the soak: fast, slow, filtered, and killed ones."""

import asyncio
import time
from dataclasses import dataclass

from faults.verdict import ClientEvent
from whaled.client import Last, Limits, Missed, Position, Retry, WhaleAlert, WhaleStream, WhaleUpdate
from whaled.model import Source


@dataclass(frozen=True, slots=True)
class Manner:
    """The behaviour of a client."""

    name: str
    min_btc: int | None = None
    pause_s: float = 0.0
    is_killed: bool = False


MANNERS = (
    Manner("plain"),
    Manner("plain"),
    Manner("filtered", min_btc=250),
    Manner("filtered", min_btc=1_000),
    Manner("slow", pause_s=0.25),
    Manner("slow and filtered", min_btc=250, pause_s=1.0),
    Manner("killed", is_killed=True),
    Manner("killed and filtered", min_btc=250, is_killed=True),
    Manner("killed and slow", pause_s=0.25, is_killed=True),
)


class Client:
    """A bot that records its events, and resumes at its position after every failure."""

    def __init__(self, manner: Manner, url: str) -> None:
        self.manner = manner
        self.events: list[ClientEvent] = []
        self.missed: list[str] = []
        self.received: list[tuple[float, str]] = []
        self.hurry = False
        self._url = url

    async def run(self) -> None:
        """Receive events until cancelled."""
        async with WhaleStream(
            self._url,
            filters={} if self.manner.min_btc is None else {"min_btc": self.manner.min_btc},
            since=Last(10**9),
            link_events=True,
            retry=Retry(initial_s=0.1, max_s=1.0),
            limits=Limits(buffered_events=16),
        ) as stream:
            async for event in stream:
                match event:
                    case WhaleAlert(position=position, data=data):
                        self._keep(position, "alert", data.transaction_id)
                        if data.source == Source.LIVE:
                            self.received.append((time.monotonic(), data.transaction_id))
                    case WhaleUpdate(position=position, data=data):
                        self._keep(position, data.status, data.transaction_id)
                    case Missed():
                        self.missed.append(str(event))
                    case _:
                        continue
                if self.manner.pause_s and not self.hurry:
                    await asyncio.sleep(self.manner.pause_s)

    def _keep(self, position: Position, kind: str, txid: str) -> None:
        self.events.append(ClientEvent(position.epoch, position.offset, kind, txid))
