"""The drain: at a stop or restart clients are asked to reconnect, spread over a part of `gateway.drain_window`."""

import asyncio
import random

import structlog

from whaled.errors import Close
from whaled.gateway.connection import Connection
from whaled.gateway.roster import Roster

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A drain closes clients at this interval, so that they do not all reconnect at once. It spends at most this part of the
# window on that.
SPACING_S = 0.002
SPREAD_PART = 0.5
# The number of clients that are sent away between two pauses.
AT_ONCE = 50
# A client comes back after this time at the earliest, and at random within the time over which clients are sent away.
SHORTEST_DELAY_S = 0.5


class Drain:
    """The end of all connections. Clients that connect while it runs are sent away with the others."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._spread_s = 0.0

    async def run(self, window_s: float) -> None:
        """Ask every client to reconnect and close it; cut off those that are left when the window ends."""
        clients = self._roster.all()
        self._spread_s = min(window_s * SPREAD_PART, len(clients) * SPACING_S)
        loop = asyncio.get_running_loop()
        started = loop.time()
        for number, connection in enumerate(clients, start=1):
            if connection.session is not None:
                self.send_away(connection)
            if number % AT_ONCE == 0:
                await asyncio.sleep(max(0.0, started + self._spread_s * number / len(clients) - loop.time()))
        try:
            async with asyncio.timeout_at(started + window_s):
                await self._roster.empty()
        except TimeoutError:
            stragglers = self._roster.all()
            logger.warning("drain_window_exceeded", clients=len(stragglers))
            for connection in stragglers:
                connection.abort()

    def send_away(self, connection: Connection) -> None:
        """Ask a client to reconnect after a random delay, and close the connection."""
        delay_s = SHORTEST_DELAY_S + random.random() * max(1.0, self._spread_s)  # noqa: S311 - jitter, not a secret
        connection.send_away(Close.RESTART, delay_s)
