"""The backend, event log and address book of `whaled run --simulate`."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import structlog
from msgspec import structs

from whaled.bookmarks import SIMULATED_WORLD
from whaled.config.sections import EventLogSettings
from whaled.errors import OperatorError
from whaled.eventlog import queries
from whaled.eventlog.files import DaemonLock
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.registry import Registry
from whaled.reloading import Boot
from whaled.simulator.owners import BOOKS
from whaled.simulator.server import Simulator
from whaled.simulator.settings import DEMO

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

DATABASE_FILES = ("", "-wal", "-shm")


class Simulated(NamedTuple):
    """The URL of a simulated backend, and a name that no other world has."""

    url: str
    world: str


@asynccontextmanager
async def backend() -> AsyncIterator[Simulated]:
    """Run a simulated backend with a new world, on a free port of this machine."""
    settings = structs.replace(DEMO, port=0, seed=time.time_ns())
    async with Simulator(settings) as simulator:
        logger.info("simulator_started", url=simulator.url, control=simulator.control_url)
        yield Simulated(simulator.url, str(settings.seed))


def with_owners(boot: Boot) -> Boot:
    """Return the input of a start with the address book of the invented owners, unless it already names a book."""
    config = boot.config
    if config.detection.address_book is not None:
        return boot
    detection = structs.replace(config.detection, address_book=str(BOOKS[DEMO.network]))
    return structs.replace(boot, config=structs.replace(config, detection=detection))


async def begin_log(settings: EventLogSettings, world: str) -> None:
    """Create an event log for a new simulated world, after removing the log of an earlier world.

    Every world is a different chain. In an earlier world's log every whale would become pending and then dropped, as
    after a reorganisation of the whole chain. Raises OperatorError if the log holds events from another backend, and
    EventLogError as `EventLog.open` does.
    """
    path = Path(settings.path).resolve()  # noqa: ASYNC240 - nothing else runs yet
    if path.exists():
        async with EventLog.open(settings, EventLogMeter(Registry())) as old:
            is_simulated = await old.recall(SIMULATED_WORLD) is not None
            events, is_used = (
                old.head,
                old.head > 0 or bool(await old.read(queries.newest_scans, 1, queries.ANY_HEIGHT)),
            )
        if is_used and not is_simulated:
            raise OperatorError(
                f"{path}: this event log holds events from another backend; --simulate starts a new world, which "
                "needs a separate log: name a file that does not exist yet with --db-path"
            )
        if is_simulated:
            _remove(path)
            logger.info("simulator_log_removed", path=str(path), events=events)
    async with EventLog.open(settings, EventLogMeter(Registry())) as new:
        await new.keep(SIMULATED_WORLD, world)


def _remove(path: Path) -> None:
    lock = DaemonLock(path)
    lock.take()
    try:
        for suffix in DATABASE_FILES:
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise OperatorError(f"{path}: cannot remove the log of an earlier simulated world: {error.strerror}") from error
    finally:
        lock.release()
