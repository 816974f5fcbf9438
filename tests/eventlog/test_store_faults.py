"""The event log in trouble: full, locked, damaged, foreign, gone, killed. Real files, locks, limits and processes."""

import asyncio
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kit.backups import digest
from kit.eventlog import Meter, locked, open_log
from kit.paths import TESTS
from kit.whales import alert_draft, txid, update_draft
from whaled.bookmarks import text
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import queries, schema
from whaled.eventlog.store import EventLog

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.db"


async def offsets(log: EventLog) -> list[int]:
    return [event.offset for event in await log.between(0, log.head, 100_000)]


async def refusal(path: Path) -> EventLogError:
    """The error that opening ends in; it is counted."""
    meter = Meter()
    with pytest.raises(EventLogError) as caught:
        async with open_log(path, meter):
            pass
    assert meter.failures == [caught.value.reason]
    assert str(path) in str(caught.value)
    return caught.value


def overwrite(path: Path, start: int, content: bytes) -> None:
    """Put bytes into a file, made if it is not there; what lies behind them stays."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.seek(start)
        file.write(content)


def program(call: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from kit import eventlog; eventlog.{call}",
    ]


# --- files that cannot be the event log ------------------------------------------------------------------------------


async def test_a_newer_database_is_refused_and_not_touched(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    before = digest(path)
    error = await refusal(path)
    assert error.reason is LogFailure.NEWER_SCHEMA
    assert f"schema version 99, made by a newer whaled; this one knows versions up to {len(schema.MIGRATIONS)}" in str(
        error
    )
    assert digest(path) == before


async def test_a_newer_database_is_not_touched_either_when_its_daemon_was_killed(path: Path, tmp_path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
        # What a kill would leave: a database and a write-ahead log that holds the version.
        (tmp_path / "killed").mkdir()
        killed = tmp_path / "killed" / "whaled.db"
        names = ("whaled.db", "whaled.db-wal")
        for name in names:
            (killed.parent / name).write_bytes((tmp_path / name).read_bytes())
    before = [digest(killed.parent / name) for name in names]
    assert (await refusal(killed)).reason is LogFailure.NEWER_SCHEMA
    assert [digest(killed.parent / name) for name in names] == before


async def test_another_program_s_database_is_refused_and_not_touched(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE precious (thing TEXT)")
        db.execute("PRAGMA user_version = 1")
    before = digest(path)
    error = await refusal(path)
    assert error.reason is LogFailure.FOREIGN
    assert "was not made by whaled (application id 0x00000000" in str(error)
    assert digest(path) == before


@pytest.mark.parametrize("content", [b"gateway:\n  port: 8765\n", b"not a database " * 1_000], ids=["short", "long"])
async def test_a_file_that_is_not_a_database_is_refused_and_not_touched(path: Path, content: bytes) -> None:
    overwrite(path, 0, content)
    before = digest(path)
    error = await refusal(path)
    assert error.reason is LogFailure.CORRUPT
    assert "cannot open the event log: file is not a database" in str(error)
    assert digest(path) == before


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "missing" / "whaled.db")
    assert error.reason is LogFailure.IO
    assert f"the directory {tmp_path / 'missing'} does not exist. Create it" in str(error)


async def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert (await refusal(tmp_path)).reason is LogFailure.IO


async def test_a_lock_file_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("keep me")
    path.with_name("whaled.db.lock").symlink_to(target)
    assert "cannot create or lock" in str(await refusal(path))
    assert target.read_text() == "keep me"


@pytest.mark.parametrize("kind", ["hard link", "fifo", "large", "other owner"])
async def test_a_planted_lock_file_is_refused_and_left_alone(path: Path, kind: str) -> None:
    lock = path.with_name("whaled.db.lock")
    target = path.with_name("precious")
    content = "keep me " * 10 if kind == "large" else "keep me"
    target.write_text(content)
    if kind == "hard link":
        lock.hardlink_to(target)
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.write_text(content)
    if kind == "other owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(lock, 12345, 12345)
    mode = lock.stat().st_mode
    refused = await refusal(path)
    assert refused.reason is LogFailure.IO
    assert f"{lock}: expected the lock file of this event log, found" in str(refused)
    assert lock.stat().st_mode == mode
    assert target.read_text() == content
    if kind != "fifo":
        assert lock.read_text() == content


async def test_a_second_daemon_is_refused_with_the_process_that_has_the_log(path: Path, tmp_path: Path) -> None:
    other_name = tmp_path / "link.db"
    async with open_log(path) as log:
        other_name.symlink_to(path)
        for name in (path, other_name):
            with pytest.raises(EventLogError, match=f"another whaled \\(process {os.getpid()}\\)") as caught:
                async with open_log(name):
                    pass
            assert caught.value.reason is LogFailure.LOCKED
        assert [event.offset for event in await log.append([alert_draft(1)])] == [1]
    async with open_log(path) as log:
        assert log.head == 1


# --- while it runs ---------------------------------------------------------------------------------------------------


async def test_a_lock_held_too_long_fails_the_append_and_leaves_no_hole(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter, busy_timeout=0.02) as log:
        await log.append([alert_draft(1)])
        with locked(path):
            with pytest.raises(EventLogError, match="cannot store events: database is locked") as caught:
                await log.append([alert_draft(2), alert_draft(3)])
            with pytest.raises(EventLogError, match="cannot store state"):
                await log.keep(text("height"), "1")
        assert caught.value.reason is LogFailure.LOCKED
        assert meter.failures == [LogFailure.LOCKED] * 2
        assert log.head == 1
        assert [event.offset for event in await log.append([alert_draft(4)])] == [2]
        assert await offsets(log) == [1, 2]
        assert await log.read_each(queries.whales, [txid(2), txid(3)]) == {}


async def test_a_lock_at_the_start_is_reported(path: Path) -> None:
    async with open_log(path):
        pass
    with locked(path), pytest.raises(EventLogError, match="locked") as caught:
        async with open_log(path, busy_timeout=0.02):
            pass
    assert caught.value.reason is LogFailure.LOCKED
    async with open_log(path) as log:
        assert log.head == 0


async def test_calls_that_waited_for_a_lock_too_long_store_nothing(path: Path) -> None:
    async with open_log(path, busy_timeout=0.02) as log:
        with locked(path):
            calls = [asyncio.create_task(log.append([alert_draft(n)])) for n in range(3)]
            await asyncio.wait(calls)
        assert [type(call.exception()) for call in calls] == [EventLogError] * 3
        assert [event.offset for event in await log.append([alert_draft(n) for n in range(3)])] == [1, 2, 3]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond the limit: the kernel fails the write (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_write_the_kernel_refuses_stores_nothing_and_the_next_one_works(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log:
        await log.append([alert_draft(1)])
        with (
            file_size_limit(1024 * 1024),
            pytest.raises(EventLogError, match="disk quota or a file size limit") as caught,
        ):
            # Larger than the page cache, so that pages are written before the commit, too.
            await log.append([alert_draft(n, addresses=2_000) for n in range(2, 62)])
        assert caught.value.reason is LogFailure.IO
        assert meter.failures == [LogFailure.IO]
        assert await offsets(log) == [1]
        assert [event.offset for event in await log.append([update_draft(1), alert_draft(2)])] == [2, 3]
        await log.read(queries.check)
    async with open_log(path) as log:
        assert await offsets(log) == [1, 2, 3]


async def test_a_deleted_database_is_noticed_at_the_next_append(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(1)])
        hidden = path.with_name("hidden.db")
        shutil.move(path, hidden)
        with pytest.raises(EventLogError, match="was deleted, moved or replaced") as caught:
            await log.append([alert_draft(2)])
        assert caught.value.reason is LogFailure.IO
        shutil.move(hidden, path)
        assert [event.offset for event in await log.append([alert_draft(3)])] == [2]


async def test_damage_found_at_the_start_is_refused(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n) for n in range(300)])
    overwrite(path, 8 * 4096, os.urandom(8 * 4096))
    error = await refusal(path)
    assert error.reason is LogFailure.CORRUPT
    assert "`whaled repair` saves what can be read of it" in str(error)


async def test_a_bug_stays_a_bug_and_stores_nothing(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log:
        with pytest.raises(sqlite3.IntegrityError):
            await log.append([alert_draft(1), alert_draft(2, at=float("nan"))])
        assert (meter.failures, await offsets(log)) == ([], [])
        assert [event.offset for event in await log.append([alert_draft(1)])] == [1]


# --- in processes of their own ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_stores_nothing_and_the_log_goes_on_once_there_is_room(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(tmp_path)]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not let users mount a small tmpfs of their own")
    command = [*inside, *program(f"fill_the_disk({str(tmp_path / 'whaled.db')!r})")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"refused: disk_full {tmp_path}/whaled.db: cannot store events: database or disk is full. Make room" in said
    assert "head 1 held 1 counted [<LogFailure.DISK_FULL: 'disk_full'>]" in said
    assert f"then {list(range(2, 12))}" in said


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, for whom file modes count")
@pytest.mark.parametrize(
    ("directory_mode", "file_mode", "expected"),
    [
        (0o777, 0o666, "opened"),
        (0o777, 0o444, "read_only {path}: cannot open the event log: attempt to write a readonly database. Allow the"),
        (
            0o555,
            0o666,
            "read_only {path}.lock: cannot create or lock this file: Permission denied. The user whaled runs",
        ),
    ],
    ids=["writable", "read-only file", "read-only directory"],
)
def test_a_log_that_may_not_be_written_is_refused_with_a_remedy(
    directory_mode: int, file_mode: int, expected: str
) -> None:
    # Not in tmp_path: another user may not even enter that.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "whaled.db"
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = WAL")
        path.chmod(file_mode)
        path.parent.chmod(directory_mode)
        said = subprocess.run(
            program(f"open_as({str(path)!r}, {NOBODY})"), check=True, capture_output=True, text=True
        ).stdout
    assert expected.format(path=path) in said


@pytest.mark.slow
async def test_nothing_reported_is_lost_when_the_daemon_is_killed(path: Path) -> None:
    epochs: set[str] = set()
    for round_ in range(8):
        daemon = await asyncio.create_subprocess_exec(
            *program(f"append_until_killed({str(path)!r})"), stdout=asyncio.subprocess.PIPE, limit=1 << 20
        )
        assert daemon.stdout is not None
        reports = [line async for line in first(daemon.stdout, 20 + 37 * round_)]
        daemon.kill()
        reports += [line async for line in daemon.stdout]
        await daemon.wait()
        complete = [line.split() for line in reports if line.endswith(b"\n") and b"eventlog_" not in line]
        reported = int(complete[-1][1])
        epochs.update(words[0].decode() for words in complete)
        async with open_log(path) as log:
            assert log.head >= reported
            events = await log.between(0, log.head, 1_000_000)
            assert [event.offset for event in events] == list(range(1, log.head + 1))
            assert [event.whale.alert.transaction_id for event in events] == [txid(n) for n in range(log.head)]
            epochs.add(log.epoch)
            await log.read(queries.check)
    assert len(epochs) == 1


async def first(stream: asyncio.StreamReader, lines: int) -> AsyncIterator[bytes]:
    for _ in range(lines):
        yield await stream.readline()
