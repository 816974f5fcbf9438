"""A record in the event log of how the previous run ended, which distinguishes planned restarts from crashes."""

import structlog

from whaled.bookmarks import STARTS, Keeper, StartRecord
from whaled.errors import EventLogError
from whaled.model import Ending
from whaled.registry import Registry

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class StartMeter:
    """The metric of starts of the daemon, including those of earlier runs."""

    def __init__(self, registry: Registry) -> None:
        self._starts = registry.counter(
            "starts", "Starts since the event log was created, by how the previous run ended.", "after", Ending
        )

    def started(self, ending: Ending, count: int = 1) -> None:
        """Count starts after a run that ended this way. `count` is above 1 for those of earlier runs."""
        self._starts.labels(ending).inc(count)


class Starts:
    """The count of starts in the event log; create it with `recalled`.

    A failure to store the record is logged and does not end the daemon.
    """

    def __init__(self, log: Keeper, meter: StartMeter, record: StartRecord) -> None:
        self._log = log
        self._meter = meter
        self._record = record

    @classmethod
    async def recalled(cls, log: Keeper, meter: StartMeter) -> "Starts":
        """Read the record of earlier runs, which a new log or a backup does not have. Raises EventLogError."""
        record = await log.recall(STARTS) or StartRecord()
        meter.started(Ending.CLEAN, record.clean)
        meter.started(Ending.UNCLEAN, record.unclean)
        return cls(log, meter, record)

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
            await self._log.keep(STARTS, self._record)
        except EventLogError as error:
            logger.warning("run_unrecorded", problem=str(error))
