"""The only writer: one order of commit, publication and report, and one turn for what decides and what stores."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from kit.pipeline import Published, opened
from kit.whales import alert_draft, confirmed_draft, txid
from whaled.detection_meters import DetectionMeter
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog.rows import Rows
from whaled.eventlog.store import EventLog
from whaled.ingest.committer import Committer, K, V
from whaled.model import Alert, Draft, Event, Kind
from whaled.registry import Registry


class Journal(Published):
    """A publisher that remembers the order of what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []

    def publish(self, events: Sequence[Event]) -> None:
        super().publish(events)
        self.happened.append(f"published {[event.offset for event in events]}")

    def settled(self, settled_txid: str) -> None:
        self.happened.append(f"settled {settled_txid == txid(1)}")


class Counting(DetectionMeter):
    """The real meter, whose calls are in the journal."""

    def __init__(self, happened: list[str]) -> None:
        super().__init__(Registry())
        self._happened = happened

    def latency(self, committed_s: float, published_s: float) -> None:
        super().latency(committed_s, published_s)
        assert 0 <= committed_s <= published_s
        self._happened.append("latency")

    def whale(self, alert: Alert, at: float) -> None:
        super().whale(alert, at)
        self._happened.append("whale")

    def updated(self, kind: Kind, blocks_off: int | None) -> None:
        super().updated(kind, blocks_off)
        self._happened.append(kind.value)


class Storing:
    """An event log whose commits are in the journal."""

    def __init__(self, log: EventLog, journal: Journal) -> None:
        self.is_full = False
        self._log = log
        self._journal = journal

    async def read_each(self, query: Callable[[Rows, Sequence[K]], dict[str, V]], keys: Iterable[K]) -> dict[str, V]:
        return await self._log.read_each(query, keys)

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        if self.is_full:
            raise EventLogError("the disk is full", reason=LogFailure.DISK_FULL)
        events = await self._log.append(drafts)
        self._journal.happened.append("committed")
        return events

    async def rehearse(self, draft: Draft) -> Event:
        return await self._log.rehearse(draft)


def committer(log: EventLog, journal: Journal, *, is_full: bool = False) -> Committer:
    storing = Storing(log, journal)
    storing.is_full = is_full
    return Committer(event_log=storing, publisher=journal, meter=Counting(journal.happened), settled=journal.settled)


async def test_drafts_of_both_origins_are_committed_published_and_reported_in_one_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        journal = Journal()
        writer = committer(log, journal)

        async def decide() -> list[Draft]:
            return [confirmed_draft(1)]

        async with writer.turn():
            events = await writer.store([alert_draft(1)], received_monotonic=0.0)
        assert [event.offset for event in events] == [1]
        assert [event.offset for event in await writer.commit(decide)] == [2]
        assert await writer.commit(decide) == []
    assert journal.happened == [
        "committed", "published [1]", "latency", "whale",
        "committed", "published [2]", "settled True", "confirmed",
        "committed",
    ]  # fmt: skip
    assert writer.last_whale is not None
    assert writer.last_whale[0].transaction_id == txid(1)


async def test_what_cannot_be_committed_is_neither_published_nor_reported_and_the_turn_ends(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        journal = Journal()
        writer = committer(log, journal, is_full=True)

        async def decide() -> list[Draft]:
            return [alert_draft(1)]

        with pytest.raises(EventLogError):
            await writer.commit(decide)
        assert journal.happened == []
        async with asyncio.timeout(5):
            await writer.idle()


async def test_nothing_is_decided_while_another_has_the_turn(tmp_path: Path) -> None:
    async with opened(tmp_path) as log, asyncio.TaskGroup() as tasks:
        writer = committer(log, Journal())
        decided = asyncio.Event()

        async def decide() -> list[Draft]:
            decided.set()
            return [confirmed_draft(1)]

        async with writer.turn():
            task = tasks.create_task(writer.commit(decide))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not decided.is_set()
            await writer.store([alert_draft(1)])
        assert [event.offset for event in await task] == [2]


async def test_drafts_are_not_stored_outside_a_turn(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        with pytest.raises(AssertionError):
            await committer(log, Journal()).store([alert_draft(1)])
