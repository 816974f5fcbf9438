"""How the run before ended, noted in the event log: it tells a planned restart from one after a crash."""

from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from whaled.errors import EventLogError
from whaled.eventlog.schema import STARTS_MARK
from whaled.model import Ending

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class State(Protocol):
    """The small texts that the event log keeps by key."""

    async def state(self, key: str) -> str | None:
        """The text stored under a key."""
        ...

    async def set_state(self, key: str, value: str) -> None:
        """Store a text under a key."""
        ...


class StartMeter(Protocol):
    """Counts starts."""

    def started(self, ending: Ending, count: int = 1) -> None:
        """A start after a run that ended so; more than one are those of earlier runs."""
        ...


class _Record(Struct):
    """Starts by how the run before had ended, since the log was made. `is_running` from a start to a clean end."""

    clean: int = 0
    unclean: int = 0
    is_running: bool = False


class Starts:
    """Made by `recalled`. What cannot be stored is logged, and never the end of the daemon."""

    def __init__(self, state: State, meter: StartMeter, record: _Record) -> None:
        self._state = state
        self._meter = meter
        self._record = record

    @classmethod
    async def recalled(cls, state: State, meter: StartMeter) -> "Starts":
        """The record of earlier runs; none in a new log, nor in a backup. Raises EventLogError."""
        stored = await state.state(STARTS_MARK)
        try:
            record = _Record() if stored is None else msgspec.json.decode(stored, type=_Record)
        except msgspec.MsgspecError:
            record = _Record()
        meter.started(Ending.CLEAN, record.clean)
        meter.started(Ending.UNCLEAN, record.unclean)
        return cls(state, meter, record)

    async def began(self) -> None:
        """This run is ready: count it by how the run before ended."""
        record = self._record
        ending = Ending.UNCLEAN if record.is_running else Ending.CLEAN
        if ending is Ending.UNCLEAN:
            record.unclean += 1
            logger.warning(
                "the run before did not end by a stop: it crashed or was killed", unclean_starts=record.unclean
            )
        else:
            record.clean += 1
        self._meter.started(ending)
        record.is_running = True
        await self._store()

    async def ended(self) -> None:
        """This run ends because it was asked to."""
        self._record.is_running = False
        await self._store()

    async def _store(self) -> None:
        try:
            await self._state.set_state(STARTS_MARK, msgspec.json.encode(self._record).decode())
        except EventLogError as error:
            logger.warning("cannot note in the event log how this run ends", problem=str(error))
