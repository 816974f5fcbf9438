"""The access database in the daemon: it keeps the revocations in memory up to date and stores what the gate notes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from whaled.auth import audit, register
from whaled.auth.apikeykeeper import ApiKeyKeeper
from whaled.auth.ledger import NoteQueue
from whaled.auth.meters import AccessMeter
from whaled.auth.revocations import Revocations
from whaled.auth.store import AccessStore
from whaled.config.sections import AuthSettings
from whaled.errors import AccessError

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# How often the daemon looks for writes of other processes: a revocation acts within a second. One look takes the thread
# about 20 us.
LOOK_S = 0.5
# How long a failed write of notes waits before it is tried again.
RETRY_S = 5.0
PRUNE_S = 3_600.0
# Revocations that one step of the loop adds or examines, below 1 ms.
SLICE = 500
# The longest time that the end of the daemon waits for notes that are not stored yet.
LAST_NOTES_S = 3.0


class AccessKeeper:
    """Keeps what the gate uses in step with the access database.

    `settings` is asked anew each time, because a reload changes it. `revoked` is called after new revocations were
    added.
    """

    def __init__(
        self,
        store: AccessStore,
        revocations: Revocations,
        notes: NoteQueue,
        meter: AccessMeter,
        *,
        settings: Callable[[], AuthSettings],
        api_keys: ApiKeyKeeper | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._revocations = revocations
        self._notes = notes
        self._meter = meter
        self._settings = settings
        self._api_keys = api_keys
        self._clock = clock
        self._seq = 0
        self._generation = 0
        self._has_failed = False

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        path: Path,
        revocations: Revocations,
        notes: NoteQueue,
        meter: AccessMeter,
        *,
        settings: Callable[[], AuthSettings],
        api_keys: ApiKeyKeeper | None = None,
    ) -> AsyncIterator["AccessKeeper"]:
        """Open the database and load the revocations. At the end, store the notes that wait. Raises AccessError."""
        async with AccessStore.open(path) as store:
            keeper = cls(store, revocations, notes, meter, settings=settings, api_keys=api_keys)
            await keeper.load()
            try:
                yield keeper
            finally:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_NOTES_S):
                        await keeper.keep_notes()
                        if api_keys is not None:
                            await api_keys.store_uses(store)
                meter.lost(notes.waiting)

    async def load(self) -> bool:
        """Add the revocations that were stored since the last call, and take the API keys. Raises AccessError.

        Return whether open sessions may have to end.

        Those in memory stay in force, even if another file was put in the place of the database.
        """
        if self.store.generation != self._generation:
            self._generation, self._seq = self.store.generation, 0
        seq = self._seq
        found, records = await self.store.read(
            lambda connection: (register.revocations_after(connection, seq), audit.count(connection))
        )
        self._seq, revocations = found
        for start in range(0, len(revocations), SLICE):
            for revocation in revocations[start : start + SLICE]:
                self._revocations.add(revocation)
            await asyncio.sleep(0)
        self._meter.held(self._revocations.size)
        self._meter.recorded(records)
        if self._api_keys is not None:
            await self._api_keys.load(self.store)
        return bool(revocations) or self._api_keys is not None

    async def watch(self, revoked: Callable[[], None]) -> None:
        """Look for writes of other processes, and remove what has expired, until cancelled.

        `revoked` is called after revocations were added.
        """
        pruned_at, limits, is_behind = -PRUNE_S, None, False
        while True:
            try:
                # A write is reported once: if the load after it fails, the next look has to load.
                is_behind = await self.store.changed() or is_behind
                if is_behind and await self.load():
                    revoked()
                is_behind = False
                if self._api_keys is not None:
                    await self._api_keys.look(self.store)
                settings = self._settings()
                wanted = (settings.audit_retention, settings.audit_limit)
                if time.monotonic() - pruned_at >= PRUNE_S or wanted != limits:
                    await self.prune()
                    pruned_at, limits = time.monotonic(), wanted
                self._recovered()
            except AccessError as error:
                self._failed(error)
            self._revocations.prune(self._clock(), SLICE)
            self._meter.held(self._revocations.size)
            await asyncio.sleep(LOOK_S)

    async def prune(self) -> None:
        """Remove expired rows, and old records of the audit log. Raises AccessError."""
        now, settings = self._clock(), self._settings()
        self._meter.lost(await self.store.write(lambda connection: register.prune(connection, now)))
        await self.store.write(
            lambda connection: audit.prune(
                connection, now, retention_s=settings.audit_retention, limit=settings.audit_limit
            )
        )
        self._meter.recorded(await self.store.read(audit.count))

    async def store_notes(self) -> None:
        """Store the notes of the gate as they come, until cancelled."""
        while True:
            await self._notes.added()
            if not await self.keep_notes():
                await asyncio.sleep(RETRY_S)

    async def keep_notes(self) -> bool:
        """Store the notes that wait. Return whether that succeeded."""
        try:
            await self._notes.store(self.store)
        except AccessError as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: AccessError) -> None:
        self._meter.failed()
        if not self._has_failed:
            self._has_failed = True
            logger.error("access_database_failed", error=str(error))

    def _recovered(self) -> None:
        if self._has_failed:
            self._has_failed = False
            logger.info("access_database_recovered")
