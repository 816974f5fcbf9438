"""Keeps the API keys in memory in step with the access database: loads them, and stores when they were used."""

import time
from collections.abc import Callable

import structlog

from whaled.auth import apikeyrows
from whaled.auth.apikeys import ApiKeys
from whaled.auth.meters import ApiKeyMeter
from whaled.auth.store import Access
from whaled.errors import AccessError

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The uses of all keys are stored in one transaction, at most this often.
STORE_USES_S = 60.0


class ApiKeyKeeper:
    """Moves API keys between the database and memory. `AccessKeeper` calls it; only the database's thread does I/O."""

    def __init__(self, meter: ApiKeyMeter, keys: ApiKeys | None = None, clock: Callable[[], float] = time.time) -> None:
        self.keys = keys if keys is not None else ApiKeys()
        self._meter = meter
        self._clock = clock
        self._stored_at = clock()

    async def load(self, access: Access) -> None:
        """Take the keys from the database: at the start, and whenever it has changed. Raises AccessError."""
        self.keys.replace(await access.read(apikeyrows.load))
        self._meter.loaded(self.keys.count(self._clock()))

    async def look(self, access: Access) -> None:
        """Store the last uses if STORE_USES_S have passed. It is called about every second."""
        now = self._clock()
        if abs(now - self._stored_at) >= STORE_USES_S:  # the clock may have been set back
            self._stored_at = now
            await self.store_uses(access)
            self._meter.loaded(self.keys.count(now))  # some may have expired

    async def store_uses(self, access: Access) -> None:
        """Store the last uses since the previous call. If that fails, the next call tries again."""
        uses = self.keys.take_uses()
        if not uses:
            return
        try:
            await access.write(lambda connection: apikeyrows.used(connection, uses))
        except AccessError as error:
            self.keys.give_back(uses)
            logger.warning("api_key_uses_unstored", error=str(error))
