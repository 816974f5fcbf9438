"""An event log that a test opens, a meter that remembers, and programs to run and to kill."""

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

from kit.whales import alert_draft
from whaled.config.sections import EventLogSettings
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.model import Scan
from whaled.registry import Registry

DAY = 86_400.0


class Meter(EventLogMeter):
    """The metrics of one event log, with the values that tests compare."""

    def __init__(self) -> None:
        self._registry = Registry()
        super().__init__(self._registry)
        # The new events of each commit, in order.
        self.commits: list[int] = []

    def committed(self, events: int, seconds: float) -> None:
        assert seconds > 0
        super().committed(events, seconds)
        self.commits.append(events)
        assert self._value("eventlog_events_total") == sum(self.commits)
        assert self._value("eventlog_commit_seconds_count") == len(self.commits)

    def _value(self, metric: str, **labels: str) -> int:
        value = self._registry.collectors.get_sample_value(f"whaled_{metric}", labels)
        assert value is not None, metric
        return int(value)

    @property
    def failures(self) -> list[LogFailure]:
        """The reason of each failed operation, in the order of the enum."""
        found = [reason for reason in LogFailure for _ in range(self._value("eventlog_failures_total", reason=reason))]
        assert self._value("errors_total", component="eventlog") == len(found)
        return found

    @property
    def removed(self) -> int:
        return self._value("eventlog_pruned_events_total")

    @property
    def damaged_rows(self) -> int:
        return self._value("eventlog_damaged_rows")

    @property
    def size_bytes(self) -> int:
        return self._value("eventlog_size_bytes")


def settings(path: Path, *, retention: float = 90 * DAY, busy_timeout: float = 5.0) -> EventLogSettings:
    return EventLogSettings(path=str(path), retention=retention, busy_timeout=busy_timeout)


def open_log(
    path: Path, meter: Meter | None = None, *, busy_timeout: float = 5.0
) -> AbstractAsyncContextManager[EventLog]:
    return EventLog.open(settings(path, busy_timeout=busy_timeout), meter or Meter())


def scan(height: int, mined_at: float) -> Scan:
    """Return the scan of a block without whales."""
    return Scan(
        height=height, hash=f"{height:064x}", mined_at=mined_at, scanned_at=mined_at,
        seen=0, late=0, missed_down=0, missed_gap=0, missed_never_relayed=0,
    )  # fmt: skip


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold the database's write lock, as a sqlite3 shell can, until exit or a ROLLBACK."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield other
    finally:
        other.close()


# --- programs that tests run in separate processes --------------------------------------------------------------------


def append_until_killed(path: str) -> None:
    """Append 1 to 4 events at a time, and print the epoch and the offset after each append that was reported stored."""

    async def run() -> None:
        async with open_log(Path(path)) as log:
            while True:
                first = log.head
                await log.append([alert_draft(first + n) for n in range(1 + first % 4)])
                print(log.epoch, log.head, flush=True)

    asyncio.run(run())


def fill_the_disk(path: str) -> None:
    """Fill a small file system so that an append fails, make room, and append again."""
    ballast = Path(path).with_name("ballast")

    async def run() -> None:
        meter = Meter()
        async with open_log(Path(path), meter) as log:
            await log.append([alert_draft(1)])
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * 4096):
                        pass
                except OSError:
                    pass
            try:
                await log.append([alert_draft(n, addresses=2_000) for n in range(2, 12)])
            except EventLogError as error:
                print("refused:", error.reason.value, error)
            print("head", log.head, "held", len(await log.between(0, 99, 99)), "counted", meter.failures)
            ballast.unlink()
            stored = await log.append([alert_draft(n, addresses=2_000) for n in range(2, 12)])
            print("then", [event.offset for event in stored])

    asyncio.run(run())


def open_as(path: str, uid: int) -> None:
    """Open the log as an ordinary user, to whom file modes apply."""
    Path(path).as_uri()  # imports its modules while this process may still read an interpreter in a home directory
    os.setgid(uid)
    os.setuid(uid)

    async def run() -> None:
        try:
            async with open_log(Path(path)):
                print("opened")
        except EventLogError as error:
            print(error.reason.value, error)

    asyncio.run(run())
