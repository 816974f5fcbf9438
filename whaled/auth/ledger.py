"""The notes of refreshes and ended families that wait for the access database. The event loop never waits for it."""

import asyncio
import sqlite3
from collections import deque
from functools import partial

import structlog

from whaled.auth import register
from whaled.auth.meters import AccessMeter
from whaled.auth.revocations import Revocation
from whaled.auth.store import Access
from whaled.model import Grant

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# At most this many notes wait, about 5 MB. With 10,000 clients whose tokens live a day, a refresh comes every 9 s.
MAX_NOTES = 10_000
# One transaction holds at most this many notes, a few milliseconds. More come together only after a failure.
BATCH = 500


class NoteQueue:
    """The notes that wait for a transaction. Beyond their limit new ones are lost, and counted."""

    def __init__(self, meter: AccessMeter, limit: int = MAX_NOTES) -> None:
        self._meter = meter
        self._limit = limit
        self._notes: deque[Grant | Revocation] = deque()
        self._added = asyncio.Event()
        self._is_full = False

    def refreshed(self, grant: Grant) -> None:
        """Note a token that a refresh has issued."""
        self._add(grant)

    def ended(self, revocation: Revocation) -> None:
        """Note a family that has ended."""
        self._add(revocation)

    @property
    def waiting(self) -> int:
        """The number of notes that wait."""
        return len(self._notes)

    async def added(self) -> None:
        """Wait until there is a note."""
        if not self._notes:
            self._added.clear()
            await self._added.wait()

    async def store(self, access: Access) -> None:
        """Store all notes. Those of a failed transaction wait for the next call. Raises AccessError."""
        while self._notes:
            batch = [self._notes.popleft() for _ in range(min(BATCH, len(self._notes)))]
            try:
                await access.write(partial(_write, batch))
            except BaseException:  # also a cancellation; a batch that is stored twice does no harm
                self._notes.extendleft(reversed(batch))
                raise
            self._is_full = False

    def _add(self, note: Grant | Revocation) -> None:
        if len(self._notes) < self._limit:
            self._notes.append(note)
            self._added.set()
            return
        self._meter.lost()
        if not self._is_full:
            self._is_full = True
            logger.warning("token_register_full", waiting=len(self._notes))


def _write(notes: list[Grant | Revocation], connection: sqlite3.Connection) -> None:
    for note in notes:
        if isinstance(note, Grant):
            register.add(connection, note, register.BY_REFRESH)
        else:
            register.revoke(connection, note)
