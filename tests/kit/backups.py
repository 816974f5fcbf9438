"""Event logs that are copied and restored, and what is compared of them."""

import hashlib
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from kit.eventlog import open_log
from kit.whales import alert_draft
from whaled.eventlog.backup import BackedUp, back_up
from whaled.eventlog.store import EventLog
from whaled.model import Event

COPIED_AT = 1_790_000_000.0


def ignore(_done: int, _of_all: int) -> None:
    pass


def copied(source: Path, target: Path, *, overwrite: bool = False) -> BackedUp:
    """Back a log up at COPIED_AT."""
    return back_up(source, target, now=COPIED_AT, overwrite=overwrite, progress=ignore)


async def store(path: Path, *numbers: int, busy_timeout: float = 5.0) -> tuple[str, int]:
    """Append an alert for each number, and return the epoch and the head."""
    async with open_log(path, busy_timeout=busy_timeout) as log:
        for number in numbers:
            await log.append([alert_draft(number)])
        return log.epoch, log.head


async def held(path: Path) -> list[Event]:
    async with open_log(path) as log:
        return await everything(log)


async def everything(log: EventLog) -> list[Event]:
    return await log.between(0, log.head, 1_000_000)


def txids(events: list[Event]) -> list[str]:
    return [event.whale.alert.transaction_id for event in events]


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, data: bytes | bytearray) -> None:
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    """Overwrite the page where the events begin."""
    with closing(sqlite3.connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
    with path.open("r+b") as raw:
        raw.seek((page - 1) * 4096)
        raw.write(b"\xff" * 4096)


def whaled(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "whaled", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
