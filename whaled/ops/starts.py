"""A record in the event log of how the previous run ended, which distinguishes planned restarts from crashes."""

from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from whaled.errors import EventLogError
from whaled.eventlog.schema import STARTS_MARK
from whaled.model import Ending
from whaled.registry import Registry

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class State(Protocol):
    """The small texts that the event log stores by key."""

    async def state(self, key: str) -> str | None:
        """Return the text stored under a key, None if there is none."""
        ...

    async def set_state(self, key: str, value: str) -> None:
        """Store a text under a key."""
        ...


class StartMeter:
    """The metric of starts of the daemon, including those of earlier runs."""

    def __init__(self, registry: Registry) -> None:
        self._starts = registry.counter(
            "starts", "Starts since the event log was created, by how the previous run ended.", "after", Ending
        )

    def started(self, ending: Ending, count: int = 1) -> None:
        """Count starts after a run that ended this way. `count` is above 1 for those of earlier runs."""
        self._starts.labels(ending).inc(count)


class _Record(Struct):
    """The starts since the log was created, by how the previous run ended. `is_running` until a clean end."""

    clean: int = 0
    unclean: int = 0
    is_running: bool = False


class Starts:
    """The count of starts in the event log; create it with `recalled`.

    A failure to store the record is logged and does not end the daemon.
    """

    def __init__(self, state: State, meter: StartMeter, record: _Record) -> None:
        self._state = state
        self._meter = meter
        self._record = record

    @classmethod
    async def recalled(cls, state: State, meter: StartMeter) -> "Starts":
        """Read the record of earlier runs, which a new log or a backup does not have. Raises EventLogError."""
        stored = await state.state(STARTS_MARK)
        try:
            record = _Record() if stored is None else msgspec.json.decode(stored, type=_Record)
        except msgspec.MsgspecError:
            record = _Record()
        meter.started(Ending.CLEAN, record.clean)
        meter.started(Ending.UNCLEAN, record.unclean)
        return cls(state, meter, record)

    async def began(self) -> None:
        """Count this start by how the previous run ended. Called when the daemon is ready."""
        record = self._record
        ending = Ending.UNCLEAN if record.is_running else Ending.CLEAN
        if ending is Ending.UNCLEAN:
            record.unclean += 1
            logger.warning("previous_run_unclean", unclean_starts=record.unclean)
        else:
            record.clean += 1
        self._meter.started(ending)
        record.is_running = True
        await self._store()

    async def ended(self) -> None:
        """Record that this run ends by a stop."""
        self._record.is_running = False
        await self._store()

    async def _store(self) -> None:
        try:
            await self._state.set_state(STARTS_MARK, msgspec.json.encode(self._record).decode())
        except EventLogError as error:
            logger.warning("run_unrecorded", problem=str(error))
