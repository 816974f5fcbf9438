"""Backups of the event log, and what becomes of clients' positions when one is put back."""

import asyncio
import hashlib
import os
import pty
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit import daemon
from kit.damage import edit
from kit.eventlog import open_log
from kit.gateway import ask, receive_type
from kit.paths import TESTS
from kit.whales import alert_draft, txid, update_draft
from whaled.cli.main import main
from whaled.errors import EventLogError, ExitStatus, LogFailure, OperatorError
from whaled.eventlog import files, schema
from whaled.eventlog.backup import BackedUp, back_up
from whaled.eventlog.restore import Restored, restore
from whaled.eventlog.store import EventLog
from whaled.model import Event

NOBODY = 65534
COPIED_AT = 1_790_000_000.0
ASIDE = "whaled.db.replaced-20260921T141320Z"
NO_UPSTREAM = "ws://127.0.0.1:9/api/v1/ws"


def ignore(_done: int, _of_all: int) -> None:
    pass


# Who waits for a lock that a backup holds waits for all of the busy timeout; a busy machine is slow, but not as slow.
BUSY_S, SOON_S = 60.0, 20.0


def copied(source: Path, target: Path, *, overwrite: bool = False) -> BackedUp:
    return back_up(source, target, now=COPIED_AT, overwrite=overwrite, progress=ignore)


def restored(source: Path, path: Path) -> Restored:
    return restore(source, path, now=COPIED_AT, progress=ignore)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "whaled.db"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "whaled.backup"


async def store(path: Path, *numbers: int, busy_timeout: float = 5.0) -> tuple[str, int]:
    """Append an alert for each number with a daemon's log; returns (epoch, head)."""
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


def write(path: Path, data: bytes) -> None:
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


def small_disk(directory: Path) -> list[str]:
    """Runs a command with a file system of a few MiB mounted on the directory."""
    mount = 'mount -t tmpfs -o size=3m none "$1" && shift && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(directory)]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not let users mount a small tmpfs of their own")
    return inside


# --- a backup --------------------------------------------------------------------------------------------------------


async def test_a_backup_during_appends_is_the_log_at_one_moment(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(3_000)])
        first = log.head
        copying = asyncio.create_task(asyncio.to_thread(copied, path, file))
        number = 3_000
        while not copying.done():
            await log.append([alert_draft(number), update_draft(number - 1)])
            number += 1
        done = await copying
        assert first <= done.contents.head <= log.head
        assert log.head > first
        source = await everything(log)
        assert done.contents.epoch == log.epoch
    assert done.contents.events == done.contents.head
    shutil.copy(file, path.with_name("copy.db"))
    assert await held(path.with_name("copy.db")) == source[: done.contents.head]


async def test_a_daemon_stops_and_starts_during_a_backup(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        epoch = log.epoch
        await log.append([alert_draft(n) for n in range(3_000)])
    loop, moments = asyncio.get_running_loop(), 0

    def progress(done: int, _of_all: int) -> None:
        nonlocal moments
        if not moments:
            began = time.perf_counter()
            storing = store(path, 3_000, busy_timeout=BUSY_S)
            assert asyncio.run_coroutine_threadsafe(storing, loop).result(2 * BUSY_S) == (epoch, 3_001)
            assert time.perf_counter() - began < SOON_S
        moments += 1

    done = await asyncio.to_thread(back_up, path, file, now=COPIED_AT, overwrite=False, progress=progress)
    assert moments > 1
    assert done.contents.head == 3_000
    assert await store(path) == (epoch, 3_001)


async def test_a_backup_includes_the_write_ahead_log(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1), alert_draft(2)])
        assert files.wal_bytes(path) > 0
        assert copied(path, file).contents.head == 2
    assert txids(await held(file)) == [txid(1), txid(2)]


async def test_a_log_without_events_and_a_pruned_one_can_be_copied(path: Path, file: Path) -> None:
    epoch, _ = await store(path)
    assert copied(path, file).contents.events == 0
    await store(path, 1, 2, 3)
    edit(path, "DELETE FROM events WHERE offset < 3")
    contents = copied(path, file, overwrite=True).contents
    assert (contents.epoch, contents.head, contents.events) == (epoch, 3, 1)


def test_a_backup_is_one_private_file(path: Path, file: Path) -> None:
    asyncio.run(store(path, 1))
    before = os.umask(0)
    try:
        done = copied(path, file)
    finally:
        os.umask(before)
    assert names(file) == {file.name}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_size == done.size_bytes
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert schema.is_copy(db)


async def test_the_backup_excludes_the_records_of_one_machine(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        await log.set_state("canary", "1.0")
        await log.set_state("other", "stays")
    copied(path, file)
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("SELECT key, value FROM state ORDER BY key").fetchall() == [
            ("copy", str(COPIED_AT)), ("other", "stays"), ("pruned_offset", "0"),
        ]  # fmt: skip


async def test_a_file_is_replaced_only_with_force_and_only_by_a_complete_backup(path: Path, file: Path) -> None:
    await store(path, 1)
    copied(path, file)
    before = digest(file)
    await store(path, 2)
    with pytest.raises(OperatorError, match="this file exists; name another one, or replace it with --force"):
        copied(path, file)
    assert digest(file) == before
    damaged = path.with_name("damaged.db")
    await store(damaged, *range(30))
    damage(damaged)
    with pytest.raises(EventLogError):
        copied(damaged, file, overwrite=True)
    assert digest(file) == before
    assert copied(path, file, overwrite=True).contents.head == 2
    assert names(file) == {file.name}


async def test_an_invalid_target_is_refused_even_with_force(path: Path, tmp_path: Path) -> None:
    await store(path, 1)
    before = digest(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo")
    alias = tmp_path / "alias"
    alias.symlink_to(path.parent)
    for target, problem in (
        (path, "own file"),
        (path.with_name("whaled.db-wal"), "own file"),
        (path.with_name("whaled.db.lock"), "own file"),
        (alias / "whaled.db", "own file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "link", "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
    ):
        with pytest.raises(OperatorError, match=problem):
            copied(path, target, overwrite=True)
    with pytest.raises(OperatorError, match="there is no such directory; make it"):
        copied(path, tmp_path / "nowhere" / "file")
    assert digest(path) == before


async def test_an_incomplete_or_foreign_log_is_not_copied(path: Path, file: Path) -> None:
    with pytest.raises(OperatorError, match="no such file; there is no event log here"):
        copied(path, file)
    write(path, b"")
    with pytest.raises(EventLogError, match="empty, not an event log") as caught:
        copied(path, file)
    assert caught.value.reason is LogFailure.FOREIGN
    write(path, b"not a database, however long it is" * 100)
    with pytest.raises(EventLogError, match="file is not a database") as caught:
        copied(path, file)
    assert caught.value.reason is LogFailure.CORRUPT
    remove(path)
    edit(path, "CREATE TABLE theirs (a)")
    with pytest.raises(EventLogError, match="not made by whaled"):
        copied(path, file)
    remove(path)
    await store(path, *range(30))
    edit(path, "PRAGMA user_version = 99")
    with pytest.raises(EventLogError, match="made by a newer whaled"):
        copied(path, file)
    edit(path, f"PRAGMA user_version = {len(schema.MIGRATIONS)}", "DELETE FROM log WHERE head = 30")
    with pytest.raises(EventLogError, match="the row with its epoch and newest offset is missing or invalid"):
        copied(path, file)
    damage(path)
    with pytest.raises(EventLogError, match="is damaged") as caught:
        copied(path, file)
    assert str(path) in str(caught.value)
    assert str(file) not in str(caught.value)
    assert names(file) == set()


async def test_a_log_with_damaged_rows_is_copied_as_it_is_with_a_report(
    path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await store(path, *range(30))
    edit(path, "DELETE FROM events WHERE offset IN (7, 8, 30)", "UPDATE events SET ref = 'x' WHERE offset = 5")
    assert copied(path, file).contents.missing == 3
    assert main(["backup", "--db-path", str(path), "--force", str(file)]) == ExitStatus.STOPPED
    assert "3 events between are missing" in capsys.readouterr().err
    assert len(await held(file)) == 26


async def test_the_epoch_stays_where_a_row_of_the_old_log_is_damaged_and_the_backup_has_it(
    path: Path, file: Path
) -> None:
    """The repair by a backup: all that clients have seen is in it."""
    epoch, _ = await store(path, 1, 2, 3, 4)
    copied(path, file)
    edit(path, "UPDATE events SET at = at + 1 WHERE offset = 2", "DELETE FROM events WHERE offset = 3")
    assert restored(file, path).renewed_because is None
    assert (await store(path))[0] == epoch
    assert txids(await held(path)) == [txid(1), txid(2), txid(3), txid(4)]


async def test_a_new_epoch_begins_where_the_backup_lacks_an_event_that_the_old_log_has(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2, 3, 4)
    copied(path, file)
    edit(file, "DELETE FROM events WHERE offset = 2")
    assert restored(file, path).renewed_because is not None
    assert (await store(path))[0] != epoch


async def test_a_new_epoch_begins_where_the_counter_of_the_old_log_is_damaged(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2)
    copied(path, file)
    edit(path, "DELETE FROM log")
    done = restored(file, path)
    assert "newest offset is damaged" in (done.renewed_because or "")
    assert (await store(path))[0] != epoch


async def test_an_interrupted_backup_leaves_nothing(path: Path, file: Path) -> None:
    await store(path, 1)

    def interrupt(_done: int, _of_all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(path, file, now=COPIED_AT, overwrite=False, progress=interrupt)
    assert names(file) == set()
    assert copied(path, file).contents.head == 1


# --- a restore -------------------------------------------------------------------------------------------------------


async def test_the_epoch_stays_where_the_old_log_proves_that_nothing_was_lost(path: Path, file: Path) -> None:
    epoch, head = await store(path, 1, 2, 3)
    copied(path, file)
    before = digest(file)
    done = restored(file, path)
    assert done.renewed_because is None
    assert (done.contents.epoch, done.contents.head, done.contents.events) == (epoch, head, 3)
    assert done.aside == path.with_name(ASIDE)
    assert await store(path, 4) == (epoch, 4)
    assert names(path) == {"whaled.db", "whaled.db.lock", ASIDE}
    assert digest(file) == before
    assert names(file) == {file.name}


async def test_the_epoch_stays_when_retention_has_removed_events_since(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2, 3)
    copied(path, file)
    edit(path, "DELETE FROM events WHERE offset < 3")
    assert restored(file, path).renewed_because is None
    assert (await store(path))[0] == epoch


async def test_a_new_epoch_begins_where_the_old_log_has_later_events(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2)
    copied(path, file)
    await store(path, 3)
    done = restored(file, path)
    assert done.renewed_because is not None
    assert "continues to offset 3: events after 2 are not in the backup" in done.renewed_because
    after, head = await store(path)
    assert (after, head) == (done.contents.epoch, 2)
    assert after != epoch
    assert done.aside is not None
    assert txids(await held(done.aside)) == [txid(1), txid(2), txid(3)]


@dataclass(frozen=True)
class Doubt:
    """A state of the log that is replaced, which proves nothing."""

    statements: tuple[str, ...]
    says: str


@pytest.mark.slow
@pytest.mark.parametrize(
    "doubt",
    [
        Doubt(("UPDATE log SET epoch = 'another'",), "has another epoch (another)"),
        Doubt(("DELETE FROM events WHERE offset = 3", "UPDATE log SET head = 2"),
              "ends at offset 2, before the backup"),
        Doubt(("UPDATE events SET at = at + 1, checksum = NULL WHERE offset = 2",),
              "other events under the same offsets"),
        Doubt(("UPDATE whales SET txid = 'x' WHERE id = 1", "UPDATE events SET checksum = NULL"),
              "other events under the same offsets"),
        Doubt(("INSERT INTO state VALUES ('copy', '1', NULL)",), "itself a backup"),
        Doubt(("PRAGMA user_version = 99",), "cannot be compared with it (newer_schema)"),
        Doubt(("DROP TABLE events", "DROP TABLE whales", "DROP TABLE log", "DROP TABLE state", "DROP TABLE blocks",
               "DROP TABLE spends", "DROP TABLE gaps",
               "PRAGMA application_id = 0", "PRAGMA user_version = 0"), "is empty"),
    ],
    ids=["another epoch", "behind", "another time", "another whale", "a copy", "newer", "empty"],
)  # fmt: skip
async def test_a_new_epoch_begins_where_the_old_log_proves_nothing(path: Path, file: Path, doubt: Doubt) -> None:
    epoch, _ = await store(path, 1, 2, 3)
    copied(path, file)
    edit(path, "PRAGMA foreign_keys = OFF", *doubt.statements, sealed="UPDATE log" in "; ".join(doubt.statements))
    done = restored(file, path)
    assert done.renewed_because is not None
    assert doubt.says in done.renewed_because
    after, head = await store(path)
    assert (after, head) == (done.contents.epoch, 3)
    assert after not in {epoch, "another"}


async def test_a_restore_over_no_log_or_a_damaged_one_begins_a_new_epoch(path: Path, file: Path) -> None:
    epoch, _ = await store(path, *range(30))
    copied(path, file)
    damage(path)
    before = digest(path)
    done = restored(file, path)
    assert done.renewed_because is not None
    assert done.aside is not None
    assert digest(done.aside) == before
    remove(path)
    again = restored(file, path)
    assert again.renewed_because == "there is no log to compare the backup with"
    assert again.aside is None
    assert len({epoch, done.contents.epoch, again.contents.epoch}) == 3
    assert len(await held(path)) == 30


async def test_each_restore_keeps_what_it_replaces(path: Path, file: Path) -> None:
    await store(path, 1)
    copied(path, file)
    for _ in range(3):
        restored(file, path)
    assert names(path) == {"whaled.db", "whaled.db.lock", ASIDE, f"{ASIDE}-1", f"{ASIDE}-2"}


async def test_a_killed_daemons_write_ahead_log_is_moved_aside_with_its_log(
    path: Path, file: Path, tmp_path: Path
) -> None:
    await store(path, 1)
    copied(path, file)
    async with open_log(path) as log:
        await log.append([alert_draft(2), alert_draft(3)])
        left = tmp_path / "left"
        shutil.copytree(path.parent, left)  # what a kill leaves
    killed = left / "whaled.db"
    assert files.wal_bytes(killed) > 0
    done = restored(file, killed)
    assert done.renewed_because is not None
    assert "continues to offset 3" in done.renewed_because
    assert not any(name.startswith("whaled.db-") for name in names(killed))
    assert txids(await held(killed)) == [txid(1)]
    assert done.aside is not None
    assert txids(await held(done.aside)) == [txid(1), txid(2), txid(3)]


async def test_side_files_of_a_damaged_log_are_kept_and_not_applied(path: Path, file: Path) -> None:
    await store(path, *range(30))
    copied(path, file)
    write(path, b"no database" * 1000)
    path.with_name("whaled.db-wal").write_bytes(b"rest")
    restored(file, path)
    assert {"whaled.db", ASIDE, f"{ASIDE}-wal"} <= names(path)
    assert path.with_name(f"{ASIDE}-wal").read_bytes() == b"rest"
    assert len(await held(path)) == 30


async def test_no_restore_while_a_daemon_uses_the_log(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        copied(path, file)
        with pytest.raises(
            EventLogError, match=r"whaled runs \(process .*\) and has this event log open\. Stop it"
        ) as caught:
            restored(file, path)
        assert caught.value.reason is LogFailure.LOCKED
        assert await log.append([alert_draft(2)])
    assert names(path) == {"whaled.db", "whaled.db.lock"}


async def test_no_daemon_starts_while_a_restore_runs(path: Path, file: Path) -> None:
    await store(path, 1)
    copied(path, file)

    refused: list[str] = []

    def progress(_done: int, _of_all: int) -> None:
        try:
            files.DaemonLock(path).take()
        except EventLogError as error:
            refused.append(error.reason)

    restore(file, path, now=COPIED_AT, progress=progress)
    assert refused
    assert set(refused) == {LogFailure.LOCKED}


async def test_a_restore_from_an_invalid_file_changes_nothing(path: Path, file: Path) -> None:
    epoch, _ = await store(path, *range(30))
    before = digest(path)
    with pytest.raises(OperatorError, match="no such file; name a file that `whaled backup` made"):
        restored(file, path)
    with pytest.raises(OperatorError, match="the event log itself"):
        restored(path, path)
    write(file, b"no database" * 1000)
    with pytest.raises(EventLogError, match="file is not a database"):
        restored(file, path)
    remove(file)
    edit(file, "CREATE TABLE theirs (a)")
    with pytest.raises(EventLogError, match="not made by whaled"):
        restored(file, path)
    remove(file)
    copied(path, file)
    edit(file, "PRAGMA user_version = 99")
    with pytest.raises(EventLogError, match="made by a newer whaled"):
        restored(file, path)
    edit(file, "PRAGMA user_version = 1")
    damage(file)
    with pytest.raises(EventLogError, match="is damaged"):
        restored(file, path)
    assert digest(path) == before
    assert names(path) <= {"whaled.db", "whaled.db.lock", "whaled.db-wal", "whaled.db-shm"}
    assert (await store(path))[0] == epoch


async def test_another_programs_database_is_not_replaced(path: Path, file: Path, tmp_path: Path) -> None:
    await store(path, 1)
    copied(path, file)
    theirs = tmp_path / "theirs.db"
    edit(theirs, "CREATE TABLE theirs (a)")
    before = digest(theirs)
    with pytest.raises(EventLogError, match="not made by whaled"):
        restored(file, theirs)
    assert digest(theirs) == before


async def test_a_copy_made_with_other_tools_can_be_restored(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2)
    async with open_log(path) as log:
        await log.append([alert_draft(3)])
        for suffix in ("", "-wal", "-shm"):
            shutil.copy(f"{path}{suffix}", f"{file}{suffix}")
    done = restored(file, path)
    assert (done.contents.head, done.renewed_because) == (3, None)
    assert (await store(path, 4)) == (epoch, 4)


# --- a backup copied into place --------------------------------------------------------------------------------------


async def test_a_backup_copied_into_place_gets_a_new_epoch_once(path: Path, file: Path) -> None:
    epoch, _ = await store(path, 1, 2)
    copied(path, file)
    remove(path)
    shutil.copy(file, path)
    first, head = await store(path)
    assert head == 2
    assert first != epoch
    assert await store(path, 3) == (first, 3)
    shutil.copy(file, path)
    assert (await store(path))[0] not in {epoch, first}


async def test_a_backup_is_not_mixed_with_side_files_of_a_killed_daemon(path: Path, file: Path, tmp_path: Path) -> None:
    epoch, _ = await store(path, 1)
    copied(path, file)
    left = tmp_path / "left"
    async with open_log(path) as log:
        await log.append([alert_draft(2), alert_draft(3)])
        shutil.copytree(path.parent, left)  # what a kill leaves
    killed = left / "whaled.db"
    shutil.copy(file, killed)
    with pytest.raises(EventLogError, match=r"whaled\.db-wal next to it belongs to another log") as caught:
        await store(killed)
    assert caught.value.reason is LogFailure.CORRUPT
    assert digest(killed) == digest(file)
    done = restored(file, killed)
    assert done.renewed_because is not None
    assert {ASIDE, f"{ASIDE}-wal", f"{ASIDE}-shm"} <= names(killed)
    assert (await store(killed)) == (done.contents.epoch, 1)
    assert done.contents.epoch != epoch


# --- clients ---------------------------------------------------------------------------------------------------------


async def resume(config: Path, epoch: str, offset: int) -> tuple[dict[str, Any], daemon.Daemon]:
    """The answer of a daemon to a client that resumes, and the daemon as it was."""
    async with daemon.running(config) as running, running.connect() as client, asyncio.timeout(20):
        await ask(client, type="subscribe", since={"epoch": epoch, "offset": offset})
        return await receive_type(client, "subscribed"), running


@pytest.fixture
async def config(path: Path, tmp_path: Path) -> Path:
    await store(path, 1, 2, 3)
    return daemon.write_config(tmp_path, NO_UPSTREAM, eventlog={"path": str(path), "retention": "3650d"})


@pytest.mark.slow
async def test_a_client_resumes_after_a_restore_that_lost_nothing(config: Path, path: Path, file: Path) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    assert main(["restore", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    answer, _ = await resume(config, epoch, 2)
    assert answer["recovered"] is True
    assert answer["position"] == {"epoch": epoch, "offset": 3}


@pytest.mark.slow
@pytest.mark.parametrize("seen", [2, 3, 4, 5])
async def test_a_client_is_notified_after_a_restore_that_lost_events(
    config: Path, path: Path, file: Path, seen: int, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    await store(path, 4, 5)
    assert main(["restore", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    assert "new epoch: the replaced log continues to offset 5" in capsys.readouterr().out
    await store(path, 6, 7)  # the lost offsets are given again
    answer, _ = await resume(config, epoch, seen)
    assert answer["recovered"] is False
    assert answer["position"]["epoch"] != epoch
    assert answer["position"]["offset"] == 5


@pytest.mark.slow
async def test_a_client_is_notified_after_a_backup_was_copied_into_place(config: Path, path: Path, file: Path) -> None:
    epoch, _ = await store(path)
    assert main(["backup", str(file), "--config", str(config)]) == ExitStatus.STOPPED
    shutil.copy(file, path)
    answer, running = await resume(config, epoch, 3)
    assert answer["recovered"] is False
    renewed = answer["position"]["epoch"]
    warning = await running.logged("eventlog_backup_adopted")
    assert (warning["level"], warning["epoch"], warning["head"]) == ("warning", renewed, 3)
    answer, running = await resume(config, renewed, 3)
    assert answer["recovered"] is True
    assert not any(line["event"] == "eventlog_backup_adopted" for line in running.lines)


@pytest.mark.slow
async def test_a_running_daemon_is_backed_up_and_cannot_be_restored(config: Path, path: Path, file: Path) -> None:
    async with daemon.running(config):
        done = await asyncio.to_thread(whaled, "backup", file, "--config", config)
        assert (done.returncode, done.stderr) == (ExitStatus.STOPPED, "")
        refused = await asyncio.to_thread(whaled, "restore", file, "--config", config)
        assert refused.returncode == ExitStatus.FAILED
        assert "has this event log open. Stop it" in refused.stderr
    assert await store(path, 4)


# --- as commands -----------------------------------------------------------------------------------------------------


async def test_the_commands_report_their_results(path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epoch, _ = await store(path, 1, 2)
    capsys.readouterr()
    assert main(["backup", str(file), "--db-path", str(path)]) == ExitStatus.STOPPED
    said = capsys.readouterr()
    assert re.fullmatch(rf"{file}: 2 events, head 2, epoch {epoch}, \d+\.\d MiB, \d+\.\d s\n", said.out)
    assert said.err == ""
    assert main(["backup", str(file), "--db-path", str(path)]) == ExitStatus.CONFIG
    assert "with --force" in capsys.readouterr().err
    assert main(["backup", str(file), "--force", "--db-path", str(path)]) == ExitStatus.STOPPED
    capsys.readouterr()
    assert main(["restore", str(file), "--db-path", str(path)]) == ExitStatus.STOPPED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"the log that was there is now {path}.replaced-")
    assert lines[1] == f"{path}: 2 events, head 2, epoch {epoch}"
    assert lines[2].startswith("epoch kept: ")
    assert main(["restore", "/nowhere", "--db-path", str(path)]) == ExitStatus.CONFIG
    assert main(["backup", str(file), "--force", "--db-path", str(path.parent / "none")]) == ExitStatus.CONFIG
    write(file, b"x" * 5000)
    assert main(["restore", str(file), "--db-path", str(path)]) == ExitStatus.FAILED


@pytest.mark.slow
def test_a_terminal_sees_how_far_the_copy_is(path: Path, file: Path) -> None:
    asyncio.run(store(path, 1))
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        command = [sys.executable, "-m", "whaled", "backup", str(file), "--db-path", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=theirs, timeout=50)
        os.close(theirs)
        shown = screen.read(10_000).decode()
    assert re.search(r"\rcopying .*whaled\.db: +\d+ %", shown)
    assert shown.endswith("\r\x1b[K")


@pytest.mark.slow
async def test_a_backup_on_a_full_disk_leaves_nothing_and_the_log_is_unharmed(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n, addresses=300) for n in range(600)])
        command = [sys.executable, "-m", "whaled", "backup", str(file), "--db-path", str(path)]
        show = ["sh", "-c", f'"$@"; echo "status $?"; ls -A {file.parent}', "sh"]
        inside = small_disk(file.parent)
        done = await asyncio.to_thread(
            subprocess.run, [*inside, *show, *command], capture_output=True, text=True, check=False
        )
        assert "database or disk is full. Make room on its file system; the event log itself was not" in done.stderr
        assert str(file) in done.stderr
        assert done.stdout == "status 1\n"
        assert await log.append([alert_draft(601)])


@pytest.mark.slow
async def test_commits_do_not_wait_for_a_backup(path: Path, file: Path) -> None:
    async with open_log(path, busy_timeout=BUSY_S) as log:
        for start in range(0, 20_000, 1_000):
            await log.append([alert_draft(n) for n in range(start, start + 1_000)])
        copying = asyncio.create_task(asyncio.to_thread(whaled, "backup", file, "--db-path", path))
        number, slowest = 20_000, 0.0
        while not copying.done():
            began = time.perf_counter()
            await log.append([alert_draft(number)])
            slowest = max(slowest, time.perf_counter() - began)
            number += 1
        assert (await copying).returncode == ExitStatus.STOPPED
    # Measured: docs/eventlog.md.
    assert slowest < SOON_S


# --- as root, beside a daemon that is another user -------------------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work on another user's files")


@pytest.fixture
def nobodys() -> Any:
    """A log of another user's, in a directory of that user's. Not in tmp_path: another user may not even enter that."""
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        directory = Path(above) / "whaled"
        directory.mkdir(mode=0o700)
        os.chown(directory, NOBODY, NOBODY)
        yield directory / "whaled.db"


def open_as_nobody(path: Path) -> str:
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from kit import eventlog; "
        f"eventlog.open_as({str(path)!r}, {NOBODY})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def owners(path: Path) -> set[int]:
    return {entry.stat().st_uid for entry in path.parent.iterdir()}


@pytest.mark.slow
@as_root
def test_a_backup_by_root_leaves_nothing_that_the_daemon_cannot_open(nobodys: Path, file: Path) -> None:
    assert open_as_nobody(nobodys) == "opened"
    assert names(nobodys) == {"whaled.db", "whaled.db.lock"}  # no -wal, no -shm: the copying makes them
    assert whaled("backup", file, "--db-path", nobodys).returncode == 0
    assert owners(nobodys) == {NOBODY}
    assert open_as_nobody(nobodys) == "opened"
    assert file.stat().st_uid == 0


@pytest.mark.slow
@as_root
@pytest.mark.parametrize("gone", [(), ("whaled.db.lock",), ("whaled.db", "whaled.db.lock")])
def test_a_restore_by_root_gives_the_log_to_its_user(nobodys: Path, file: Path, gone: tuple[str, ...]) -> None:
    assert open_as_nobody(nobodys) == "opened"
    assert whaled("backup", file, "--db-path", nobodys).returncode == 0
    for suffix in ("-wal", "-shm"):
        nobodys.with_name(nobodys.name + suffix).unlink(missing_ok=True)
    for name in gone:
        nobodys.with_name(name).unlink()
    assert whaled("restore", file, "--db-path", nobodys).returncode == 0
    assert owners(nobodys) == {NOBODY}
    assert stat.S_IMODE(nobodys.stat().st_mode) == 0o600
    assert open_as_nobody(nobodys) == "opened"


@as_root
def test_the_lock_of_a_user_is_never_given_away_if_it_was_there(nobodys: Path) -> None:
    lock = nobodys.with_name("whaled.db.lock")
    lock.touch()
    held = files.DaemonLock(nobodys)
    held.take()
    held.release()
    assert lock.stat().st_uid == 0
