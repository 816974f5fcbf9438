"""Backups of the event log: of a running daemon, complete or not there at all."""

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from kit.backups import (
    COPIED_AT,
    copied,
    damage,
    digest,
    everything,
    held,
    names,
    remove,
    store,
    txids,
    whaled,
    write,
)
from kit.damage import edit
from kit.eventlog import open_log
from kit.whales import alert_draft, txid, update_draft
from whaled.bookmarks import text
from whaled.cli.main import main
from whaled.errors import EventLogError, ExitStatus, LogFailure, OperatorError
from whaled.eventlog import files, notes, schema
from whaled.eventlog.backup import back_up

# Who waits for a lock that a backup holds waits for all of the busy timeout; a busy machine is slow, but not as slow.
BUSY_S, SOON_S = 60.0, 20.0


def small_disk(directory: Path) -> list[str]:
    """Runs a command with a file system of a few MiB mounted on the directory."""
    mount = 'mount -t tmpfs -o size=3m none "$1" && shift && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(directory)]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not let users mount a small tmpfs of their own")
    return inside


# --- a backup ---


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
        assert notes.is_copy(db)


async def test_the_backup_excludes_the_records_of_one_machine(path: Path, file: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        await log.keep(text("canary"), "1.0")
        await log.keep(text("other"), "stays")
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


async def test_an_interrupted_backup_leaves_nothing(path: Path, file: Path) -> None:
    await store(path, 1)

    def interrupt(_done: int, _of_all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(path, file, now=COPIED_AT, overwrite=False, progress=interrupt)
    assert names(file) == set()
    assert copied(path, file).contents.head == 1


# --- as commands ---


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
