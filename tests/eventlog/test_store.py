"""The event log: offsets, duplicates, reading, retention, schema, concurrency and cancellation."""

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import structlog
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.backups import everything
from kit.eventlog import DAY, Meter, locked, open_log, scan, settings
from kit.whales import NOW, alert_draft, txid, update_draft, whale
from whaled.bookmarks import text
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import files, notes, queries, schema
from whaled.eventlog.codec import Codec
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.rows import Rows
from whaled.eventlog.store import KEYS_AT_ONCE, PRUNE_BATCH, EventLog
from whaled.eventlog.writer import CHECKPOINT_BYTES, Committed, Writer
from whaled.model import Draft, Event, Kind, Position, Status, Whale
from whaled.registry import Registry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.db"


async def offsets(log: EventLog) -> list[int]:
    return [event.offset for event in await everything(log)]


# --- append and read -------------------------------------------------------------------------------------------------


async def test_a_new_log_is_empty_and_has_an_epoch(path: Path) -> None:
    async with open_log(path) as log:
        assert (log.head, log.oldest) == (0, 1)
        assert len(log.epoch) == 24
        assert log.epoch.isalnum()  # it is typed into command lines
        assert log.position == Position(log.epoch, 0)
        assert await log.between(0, 100, 10) == []
        assert await log.offset_before(NOW) == 0
        assert await log.append([]) == []


async def test_events_get_offsets_from_one_in_the_order_given(path: Path) -> None:
    async with open_log(path) as log:
        first = await log.append([alert_draft(1), alert_draft(2)])
        second = await log.append([update_draft(1)])
        assert [event.offset for event in first + second] == [1, 2, 3]
        assert log.position == Position(log.epoch, 3)


async def test_the_events_read_equal_those_that_append_returned(path: Path) -> None:
    async with open_log(path) as log:
        stored = await log.append(
            [
                alert_draft(1),
                alert_draft(2, addresses=3_000),
                update_draft(2),
                update_draft(1, Kind.REPLACED, ref=txid(9)),
            ]
        )
        assert await everything(log) == stored
        assert stored[2].whale == whale(2, addresses=3_000)


async def test_a_page_has_the_events_between_two_offsets_up_to_the_limit(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(10)])
        assert [event.offset for event in await log.between(2, 7, 100)] == [3, 4, 5, 6, 7]
        assert [event.offset for event in await log.between(2, 7, 2)] == [3, 4]
        assert await log.between(7, 7, 5) == []
        with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
            await log.between(0, 7, 0)


async def test_duplicates_are_skipped_without_leaving_a_hole(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1), update_draft(1)])
        stored = await log.append(
            [
                alert_draft(1),
                alert_draft(2),
                alert_draft(2),
                update_draft(1),
                update_draft(1, ref="00other"),
                alert_draft(3),
            ]
        )
        assert [(event.offset, event.kind) for event in stored] == [(3, "alert"), (4, "confirmed"), (5, "alert")]
        assert await log.append([alert_draft(1), update_draft(1)]) == []
        assert await offsets(log) == [1, 2, 3, 4, 5]


async def test_an_alert_is_stored_once_whatever_its_ref_and_content(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        again = Draft(kind=Kind.ALERT, at=NOW + 9, whale=whale(1, addresses=7), ref="other")
        assert await log.append([again]) == []
        assert (await log.read_each(queries.whales, [txid(1)]))[txid(1)] == whale(1)


async def test_an_update_goes_with_the_alert_in_the_log_not_with_the_one_in_the_draft(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1, addresses=4)])
        (event,) = await log.append([update_draft(1)])
        assert event.whale == whale(1, addresses=4)
        assert (await everything(log))[1] == event


async def test_only_new_events_are_counted(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log:
        await log.append([alert_draft(1), alert_draft(2)])
        await log.append([alert_draft(1)])
        await log.append([alert_draft(1), alert_draft(3)])
    assert meter.commits == [2, 1]
    assert meter.size_bytes > 0
    assert meter.failures == []


async def test_the_metrics_show_the_offsets_and_the_file_system_of_the_open_log(path: Path) -> None:
    registry = Registry()
    value = registry.collectors.get_sample_value
    async with EventLog.open(settings(path, retention=10 * DAY), EventLogMeter(registry)) as log:
        await log.append([alert_draft(n, at=NOW + n * DAY) for n in range(20)])
        await log.prune(NOW + 15 * DAY)
        assert (value("whaled_eventlog_oldest_offset"), value("whaled_eventlog_head_offset")) == (6, 20)
    assert value("whaled_eventlog_disk_size_bytes") == shutil.disk_usage(path.parent).total
    assert value("whaled_eventlog_disk_free_bytes")


async def test_whales_finds_any_number_of_txids(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(50)])
        found = await log.read_each(queries.whales, map(txid, range(-KEYS_AT_ONCE, KEYS_AT_ONCE)))
        assert found == {txid(n): whale(n) for n in range(50)}
        assert await log.read_each(queries.whales, []) == {}


async def test_a_time_is_found_even_where_the_clock_was_set_back(path: Path) -> None:
    async with open_log(path) as log:
        times = [10.0, 20.0, 30.0, 25.0, 26.0, 40.0]
        await log.append([alert_draft(n, at=at) for n, at in enumerate(times)])
        assert [await log.offset_before(at) for at in (5, 10, 10.5, 25, 28, 30.5, 40, 41)] == [0, 0, 1, 2, 2, 5, 5, 6]


async def test_pending_names_the_whales_whose_outcome_is_not_known(path: Path) -> None:
    mined = whale(5)  # the stream may say so of a block that dies before it is scanned
    mined = Whale(replace(mined.alert, status=Status.CONFIRMED), mined.addresses)
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(4)] + [Draft(kind=Kind.ALERT, at=NOW, whale=mined)])
        await log.append(
            [
                update_draft(0),
                update_draft(2),
                update_draft(3, Kind.DROPPED),
                update_draft(2, Kind.PENDING, ref="00orphan"),
            ]
        )
        unknown = await log.read(queries.pending, 0, 10)
        assert [(event.offset, event.kind, event.whale) for event in unknown] == [
            (2, Kind.ALERT, whale(1)),
            (5, Kind.ALERT, mined),
            (9, Kind.PENDING, whale(2)),
        ]
        assert await log.read(queries.pending, 0, 1) == unknown[:1]
        assert await log.read(queries.pending, 2, 10) == unknown[1:]
        with pytest.raises(ValueError, match="at least 1"):
            await log.read(queries.pending, 0, -1)


async def test_the_newest_alert_is_found_behind_later_updates(path: Path) -> None:
    async with open_log(path) as log:
        assert await log.read(queries.newest_alert) is None
        await log.append([alert_draft(1), alert_draft(2), update_draft(1), update_draft(2)])
        newest = await log.read(queries.newest_alert)
        assert newest is not None
        assert (newest.offset, newest.whale) == (2, whale(2))


async def test_state_is_kept_by_key(path: Path) -> None:
    async with open_log(path) as log:
        assert await log.recall(text("height")) is None
        await log.keep(text("height"), "840000")
        await log.keep(text("height"), "840001")
        assert await log.recall(text("height")) == "840001"
    async with open_log(path) as log:
        assert await log.recall(text("height")) == "840001"


async def test_a_restart_keeps_epoch_events_and_numbering(path: Path) -> None:
    async with open_log(path) as log:
        epoch = log.epoch
        stored = await log.append([alert_draft(1), update_draft(1)])
    async with open_log(path) as log:
        assert (log.epoch, log.head, log.oldest) == (epoch, 2, 1)
        assert await everything(log) == stored
        assert [event.offset for event in await log.append([alert_draft(1), alert_draft(2)])] == [3]


async def test_two_databases_have_two_epochs(tmp_path: Path) -> None:
    async with open_log(tmp_path / "a.db") as one, open_log(tmp_path / "b.db") as other:
        assert one.epoch != other.epoch


# --- retention -------------------------------------------------------------------------------------------------------


async def test_pruning_removes_only_what_is_older_than_the_retention(path: Path) -> None:
    meter = Meter()
    async with EventLog.open(settings(path, retention=10 * DAY), meter) as log:
        await log.append([alert_draft(n, at=NOW + n * DAY) for n in range(20)])
        assert await log.prune(NOW + 15 * DAY) == 5
        assert (log.oldest, log.head, meter.removed) == (6, 20, 5)
        assert await offsets(log) == list(range(6, 21))
        assert await log.offset_before(NOW) == 5
        assert await log.prune(NOW + 15 * DAY) == 0
    async with EventLog.open(settings(path), meter) as log:
        assert (log.oldest, log.head) == (6, 20)


async def test_numbering_goes_on_after_everything_was_pruned(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(3)])
        assert await log.prune(NOW + 91 * DAY) == 3
        assert (log.head, log.oldest) == (3, 4)
        assert await log.offset_before(NOW) == 3
    async with open_log(path) as log:
        assert (log.head, log.oldest) == (3, 4)
        assert [event.offset for event in await log.append([alert_draft(7)])] == [4]
        assert log.oldest == 4


async def test_pruning_takes_as_many_batches_as_it_needs(path: Path) -> None:
    async with open_log(path) as log:
        many = 2 * PRUNE_BATCH + 7
        await log.append([alert_draft(n) for n in range(many)] + [alert_draft(many, at=NOW + 90 * DAY)])
        assert await log.prune(NOW + 91 * DAY) == many
        assert await offsets(log) == [many + 1]


async def test_an_update_stays_complete_when_its_alert_was_pruned(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1, addresses=5), alert_draft(2), update_draft(1, at=NOW + 50 * DAY)])
        assert await log.prune(NOW + 100 * DAY) == 2
        (event,) = await everything(log)
        assert event.whale == whale(1, addresses=5)
        # Still known, so it is not alerted a second time; the other one is forgotten.
        assert (await log.read_each(queries.whales, [txid(1), txid(2)])).keys() == {txid(1)}
        assert [event.offset for event in await log.append([alert_draft(1), alert_draft(2)])] == [4]


async def test_an_update_about_a_forgotten_whale_brings_the_whale_back(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        await log.prune(NOW + 91 * DAY)
        (event,) = await log.append([update_draft(1, at=NOW + 91 * DAY)])
        assert (event.offset, event.whale) == (2, whale(1))
        assert await everything(log) == [event]


@pytest.mark.parametrize("now", [0.0, NOW, NOW + 89 * DAY])
async def test_a_clock_that_is_behind_prunes_nothing(path: Path, now: float) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1), alert_draft(2, at=NOW + DAY)])
        assert await log.prune(now) == 0
        assert await offsets(log) == [1, 2]


async def test_a_time_from_the_future_does_not_keep_the_log_from_being_pruned(path: Path) -> None:
    async with open_log(path) as log:
        await log.append(
            [
                alert_draft(1),
                alert_draft(2, at=NOW + 9_000 * DAY),
                alert_draft(3),
                alert_draft(4, at=NOW + 50 * DAY),
            ]
        )
        assert await log.prune(NOW + 100 * DAY) == 3
        assert await offsets(log) == [4]


async def test_events_stored_with_a_wrong_clock_stay_until_later_ones_are_old(path: Path) -> None:
    async with open_log(path) as log:
        # The clock an hour ahead at the first start, corrected, and whaled restarted within that hour.
        await log.append([alert_draft(1, at=NOW + 3_600), alert_draft(2, at=NOW + 3_601), alert_draft(3, at=NOW + 60)])
        assert await log.prune(NOW + 120) == 0
        assert await offsets(log) == [1, 2, 3]
        assert await log.prune(NOW + 91 * DAY) == 3


@pytest.mark.parametrize("ahead_days", [40, 100])
async def test_a_clock_that_jumped_ahead_of_the_chain_does_not_empty_the_log(path: Path, ahead_days: int) -> None:
    async with EventLog.open(settings(path, retention=30 * DAY), Meter()) as log:
        await log.append([alert_draft(n, at=NOW + n * DAY) for n in range(40)])
        await log.write(notes.put_scan, scan(800_000, NOW + 39 * DAY))
        with structlog.testing.capture_logs() as lines:
            # A day is believed without a block: those of the 40 that are older than that go, and no others.
            assert await log.prune(NOW + (39 + ahead_days) * DAY) == 10
        assert await offsets(log) == list(range(11, 41))
        (line,) = lines
        assert (line["log_level"], line["height"], line["ahead_s"]) == ("warning", 800_000, ahead_days * DAY)


async def test_a_clock_that_agrees_with_the_chain_is_believed(path: Path) -> None:
    async with EventLog.open(settings(path, retention=30 * DAY), Meter()) as log:
        await log.append([alert_draft(n, at=NOW + n * DAY) for n in range(40)])
        await log.write(notes.put_scan, scan(4_000_000, NOW))  # of the chain that was followed before
        await log.write(notes.put_scan, scan(800_000, NOW + 39 * DAY))
        with structlog.testing.capture_logs() as lines:
            assert await log.prune(NOW + 39.9 * DAY) == 10
            # A header may be ahead of its time: that moves nothing.
            await log.write(notes.put_scan, scan(800_001, NOW + 60 * DAY))
            assert await log.prune(NOW + 39.9 * DAY) == 0
        assert lines == []


async def test_an_old_block_does_not_stop_pruning_without_a_backfill(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        await log.write(notes.put_scan, scan(800_000, NOW))
        assert await log.prune(NOW + 100 * DAY) == 0
        assert await log.prune(NOW + 100 * DAY, follows_blocks=False) == 1


# --- concurrency and cancellation ------------------------------------------------------------------------------------


async def test_calls_that_wait_for_the_disk_are_committed_in_their_order(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log, asyncio.TaskGroup() as tasks:
        with locked(path) as other:
            calls = [tasks.create_task(log.append([alert_draft(n), alert_draft(n + 100)])) for n in range(4)]
            await log.recall(text("a turn of the loop"))
            other.execute("ROLLBACK")
            stored = [[event.offset for event in await call] for call in calls]
    assert stored == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert meter.commits == [2, 2, 2, 2]


async def test_readers_go_on_while_the_writer_waits(path: Path) -> None:
    async with open_log(path) as log, asyncio.TaskGroup() as tasks:
        await log.append([alert_draft(1)])
        with locked(path) as other:
            call = tasks.create_task(log.append([alert_draft(2)]))
            assert await offsets(log) == [1]
            assert not call.done()
            other.execute("ROLLBACK")
            await call
            assert await offsets(log) == [1, 2]


async def test_a_caller_cancelled_during_its_commit_does_not_leave_head_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    loop, begun, append = asyncio.get_running_loop(), asyncio.Event(), Writer.append

    def announced(writer: Writer, drafts: Sequence[Draft]) -> Committed:
        loop.call_soon_threadsafe(begun.set)
        return append(writer, drafts)

    monkeypatch.setattr(Writer, "append", announced)
    async with open_log(path, meter) as log:
        with locked(path) as other:
            call = asyncio.create_task(log.append([alert_draft(1)]))
            await begun.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            other.execute("ROLLBACK")
            await log.keep(text("behind"), "the commit")
        assert (log.head, meter.commits) == (1, [1])
        assert [event.offset for event in await log.append([alert_draft(1), alert_draft(2)])] == [2]
        assert await offsets(log) == [1, 2]


async def test_a_caller_cancelled_before_its_commit_stores_nothing(path: Path) -> None:
    async with open_log(path) as log:
        with locked(path) as other:
            first, second, third = (asyncio.create_task(log.append([alert_draft(n)])) for n in range(3))
            await log.recall(text("a turn of the loop"))
            second.cancel()
            other.execute("ROLLBACK")
            assert [event.whale for event in await first + await third] == [whale(0), whale(2)]
        assert second.cancelled()
        assert await offsets(log) == [1, 2]


async def test_a_cancelled_prune_does_not_leave_oldest_behind(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(2 * PRUNE_BATCH)])
        with locked(path) as other:
            pruning = asyncio.create_task(log.prune(NOW + 91 * DAY))
            # Searches are answered in order: with the third answer the pruning has its boundary, a batch is under way.
            for _ in range(3):
                await log.read(queries.confirmed_in, "of no block")
            pruning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pruning
            other.execute("ROLLBACK")
            await log.keep(text("behind"), "the batch")
        assert log.oldest == PRUNE_BATCH + 1
        assert (await offsets(log))[0] == log.oldest


async def test_leaving_stores_what_still_waits(path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        async with open_log(path) as log:
            with locked(path) as other:
                calls = [tasks.create_task(log.append([alert_draft(n)])) for n in range(3)]
                await log.recall(text("a turn of the loop"))
                other.execute("ROLLBACK")
        assert [[event.offset for event in await call] for call in calls] == [[1], [2], [3]]
    async with open_log(path) as log:
        assert log.head == 3


async def test_a_closed_log_refuses(path: Path) -> None:
    async with open_log(path) as log:
        pass
    for call in (
        log.append([alert_draft(1)]),
        log.between(0, 1, 1),
        log.keep(text("a"), "b"),
        log.prune(0.0),
        log.read(queries.check),
    ):
        with pytest.raises(EventLogError, match="closed") as caught:
            await call
        assert caught.value.reason is LogFailure.CLOSED


async def test_leaving_leaves_nothing_but_the_database_and_the_lock_file(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["whaled.db", "whaled.db.lock"]


async def test_an_opening_that_was_cancelled_lets_the_next_one_in(path: Path) -> None:
    async with open_log(path):
        pass
    async with AsyncExitStack() as stack:
        with locked(path) as other:
            opening = asyncio.create_task(stack.enter_async_context(open_log(path)))
            # The thread of the writer waits for the lock; nothing tells when, and any moment must do.
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
            opening.cancel()
            other.execute("ROLLBACK")
            with pytest.raises(asyncio.CancelledError):
                await opening
    async with open_log(path) as log:
        assert log.head == 0


async def test_the_write_ahead_log_is_copied_back_before_it_grows_far(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log:
        for round_ in range(12):
            await log.append([alert_draft(100 * round_ + n, addresses=500) for n in range(50)])
            await log.keep(text("behind"), "the checkpoint")
        await log.append([alert_draft(-1)])
        assert 0 < files.wal_bytes(path) <= CHECKPOINT_BYTES
        assert meter.size_bytes > 10 * 1024 * 1024


# --- files and schema ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o027, 0o277], ids=oct)
async def test_the_files_are_private_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        async with open_log(path) as log:
            await log.append([alert_draft(1)])
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["whaled.db", "whaled.db-shm", "whaled.db-wal", "whaled.db.lock"], 0o600)


async def test_every_commit_is_synced(path: Path) -> None:
    async with open_log(path) as log:
        threads = log._threads
        pragmas = await asyncio.wrap_future(
            threads.write_thread.submit(
                lambda: [
                    threads.writer._db.execute(f"PRAGMA {name}").fetchone()[0]
                    for name in ("journal_mode", "synchronous")
                ]
            )
        )
    assert pragmas == [b"wal", 2]


async def test_a_name_with_odd_characters_is_just_a_name(tmp_path: Path) -> None:
    path = tmp_path / "wh ale?mode=ro#%41ü.db"
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
    assert path.stat().st_size > 0


async def test_a_file_made_but_never_filled_becomes_a_log(path: Path) -> None:
    files.ensure_exists(path)
    async with open_log(path) as log:
        assert [event.offset for event in await log.append([alert_draft(1)])] == [1]


async def test_the_database_has_an_application_id_and_a_schema_version(path: Path) -> None:
    async with open_log(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
        assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)


def add_note(db: sqlite3.Connection, now: float) -> None:
    db.execute("CREATE TABLE note (made_at REAL NOT NULL) STRICT")
    db.execute("INSERT INTO note VALUES (?)", (now,))


def stumble(db: sqlite3.Connection, now: float) -> None:
    db.execute("CREATE TABLE half (done INTEGER) STRICT")
    db.execute("INSERT INTO nowhere VALUES (1)")


async def test_an_older_database_is_brought_forward_with_its_events(path: Path) -> None:
    async with open_log(path) as log:
        epoch = log.epoch
        stored = await log.append([alert_draft(1)])
    steps = (*schema.MIGRATIONS, add_note)
    with closing(files.open_to_write(path, 1.0)) as db:
        assert schema.migrate(db, path, now=7.0, steps=steps) == (len(steps) - 1, len(steps))
        assert schema.migrate(db, path, now=8.0, steps=steps) == (len(steps), len(steps))
        assert db.execute("SELECT made_at FROM note").fetchall() == [(7.0,)]
        assert db.execute("SELECT epoch, head FROM log").fetchall() == [(epoch, len(stored))]


def test_a_new_database_takes_all_steps_at_once(path: Path) -> None:
    files.ensure_exists(path)
    with closing(files.open_to_write(path, 1.0)) as db:
        assert schema.migrate(db, path, now=7.0, steps=(*schema.MIGRATIONS, add_note)) == (
            0,
            len(schema.MIGRATIONS) + 1,
        )


async def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    async with open_log(path) as log:
        stored = await log.append([alert_draft(1)])
    with closing(files.open_to_write(path, 1.0)) as db:
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            schema.migrate(db, path, now=7.0, steps=(*schema.MIGRATIONS, add_note, stumble))
        assert not db.in_transaction
    async with open_log(path) as log:
        assert await everything(log) == stored
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_schema WHERE name IN ('note', 'half')").fetchone() == (0,)


async def test_a_check_that_was_interrupted_does_not_claim_to_be_complete(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n, addresses=0) for n in range(3_000)])
        await log.read(queries.check)
    reader = Rows(path, 1.0, print)
    reader.open()
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.is_set():
            reader.interrupt()

    with closing(reader), ThreadPoolExecutor() as pool:
        assert queries.check(reader)
        pool.submit(interrupt)
        while queries.check(reader):
            pass
        ended.set()


# --- against a model -------------------------------------------------------------------------------------------------

APPENDED = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([Kind.ALERT, Kind.CONFIRMED, Kind.PENDING]), st.integers(0, 40)),
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("append"), APPENDED),
    st.tuples(st.just("prune"), st.integers(0, 70)),
    st.tuples(st.just("time"), st.integers(0, 45)),
)
RETENTION = 20


@dataclass(frozen=True)
class Row:
    """What the model knows of an event. `high_at` is the highest time among the events held when it was stored."""

    offset: int
    whale: int
    kind: Kind
    at: float
    high_at: float


class Model:
    """The log as a list: what DESIGN.md promises, without a disk."""

    def __init__(self) -> None:
        self.head = 0
        self.held: list[Row] = []

    @property
    def oldest(self) -> int:
        return self.held[0].offset if self.held else self.head + 1

    def append(self, drafts: list[tuple[int, Kind, int]]) -> list[int]:
        before = self.head
        for number, kind, at in drafts:
            said = [row.kind for row in self.held if row.whale == number]
            if kind in said or (kind is Kind.ALERT and said):
                continue
            self.head += 1
            high_at = max([float(at)] + [row.high_at for row in self.held])
            self.held.append(Row(self.head, number, kind, float(at), high_at))
        return list(range(before + 1, self.head + 1))

    def prune(self, now: int) -> int:
        before = self.oldest
        young = [row for row in self.held if row.at >= now - RETENTION]
        stop = ([row.offset for row in young if row.at <= now] + [row.offset for row in young] + [self.head + 1])[0]
        keep = max([0] + [row.offset + 1 for row in self.held if row.offset < stop and row.at < now - RETENTION])
        self.held = [row for row in self.held if row.offset >= keep]
        return self.oldest - before

    def offset_before(self, at: int) -> int:
        return max([self.oldest - 1] + [row.offset for row in self.held if row.high_at < at])


def draft(number: int, kind: Kind, at: int) -> Draft:
    return alert_draft(number, at=float(at)) if kind is Kind.ALERT else update_draft(number, kind, at=float(at))


def model_event(row: Row) -> Event:
    said = draft(row.whale, row.kind, int(row.at))
    return Event(offset=row.offset, kind=row.kind, at=row.at, whale=whale(row.whale), ref=said.ref, update=said.update)


async def compare(path: Path, lives: list[list[tuple[str, object]]]) -> None:
    model = Model()
    for steps in lives:
        async with EventLog.open(settings(path, retention=float(RETENTION)), Meter()) as log:
            for step in steps:
                match step:
                    case "append", list(drafts):
                        stored = await log.append([draft(*each) for each in drafts])
                        assert [event.offset for event in stored] == model.append(drafts)
                    case "prune", int(now):
                        assert await log.prune(now) == model.prune(now)
                    case "time", int(at):
                        assert await log.offset_before(at) == model.offset_before(at)
                assert (log.head, log.oldest) == (model.head, model.oldest)
            assert await everything(log) == [model_event(row) for row in model.held]
            assert (await log.read_each(queries.whales, map(txid, range(6)))).keys() == {
                txid(row.whale) for row in model.held
            }


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(STEPS, max_size=8), min_size=1, max_size=3))
@pytest.mark.slow
@pytest.mark.long
def test_any_history_of_appends_prunes_and_restarts_agrees_with_the_model(
    lives: list[list[tuple[str, object]]],
) -> None:
    with TemporaryDirectory() as directory:
        asyncio.run(compare(Path(directory) / "whaled.db", lives))


def test_an_alert_of_an_older_version_is_read_without_newer_fields() -> None:
    codec = Codec()
    stored = json.loads(codec.json(whale(1).alert))
    for newer in ("price_timestamp", "matched_rules"):
        del stored[newer]
    alert = codec.whale(txid(1).encode(), json.dumps(stored).encode(), b"[]", None).alert
    assert alert == whale(1).alert
    assert (alert.price_timestamp, alert.matched_rules) == (None, ())


async def test_no_look_up_of_the_live_path_scans_the_events(path: Path) -> None:
    """A scan of a million events takes a second, before every commit."""
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(3)])
    reader, asked = Rows(path, 1.0, lambda _: None), list[str]()
    reader.open()
    try:
        db = reader._connection
        assert db is not None
        db.set_trace_callback(asked.append)
        found = [
            queries.whales(reader, [txid(1)]),
            queries.spenders(reader, ["a:0"]),
            queries.outpoints(reader, [txid(1)]),
            queries.histories(reader, [txid(1)]),
            queries.rivals(reader, [(txid(1), ["a:0"])]),
            queries.scans(reader, 0, 1),
            queries.newest_scans(reader, 1, queries.ANY_HEIGHT),
            queries.note(reader, "network"),
        ]
        db.set_trace_callback(None)
        assert len(found) == 8
        plans = {
            statement: [row[3].decode() for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            for statement in asked
            if statement.startswith("SELECT")
        }
    finally:
        reader.close()
    assert len(plans) >= 7
    scans = {"SCAN e", "SCAN events", "SCAN w", "SCAN whales", "SCAN s"}
    assert {statement: plan for statement, plan in plans.items() if scans & set(plan)} == {}
