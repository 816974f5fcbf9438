import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from whaled.auth import access_schema, store
from whaled.auth.store import AccessStore, beside, open_directly
from whaled.errors import AccessError

ADD = "INSERT INTO revocations (kind, name, at, until) VALUES ('jti', ?, 1, 2)"
NAMES = "SELECT name FROM revocations ORDER BY name"


def add(name: str) -> Callable[[sqlite3.Connection], None]:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute(ADD, (name,))

    return work


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute(NAMES)]


def test_the_database_lies_beside_the_event_log_under_its_name(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "whaled.db"
    log.parent.mkdir()
    link = tmp_path / "link.db"
    link.symlink_to(log)
    assert beside(log) == tmp_path / "logs" / "whaled.access.db"
    assert beside(link) == beside(log)


async def test_what_was_written_survives_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.access.db"
    async with AccessStore.open(path) as opened:
        await opened.write(add("t1"))
        assert await opened.read(names) == ["t1"]
    async with AccessStore.open(path) as opened:
        assert await opened.read(names) == ["t1"]


async def test_a_write_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def half(connection: sqlite3.Connection) -> None:
        add("t1")(connection)
        raise ValueError("no")

    async with AccessStore.open(tmp_path / "a.db") as opened:
        with pytest.raises(ValueError, match="no"):
            await opened.write(half)
        assert await opened.read(names) == []
        await opened.write(add("t2"))
        assert await opened.read(names) == ["t2"]


async def test_a_commit_is_synced_to_the_disk_and_readers_do_not_block_it(tmp_path: Path) -> None:
    def pragma(name: str) -> Callable[[sqlite3.Connection], object]:
        return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]

    async with AccessStore.open(tmp_path / "a.db") as opened:
        assert await opened.read(pragma("journal_mode")) == "wal"
        assert await opened.read(pragma("synchronous")) == 2  # FULL


async def test_every_job_runs_on_the_one_thread_of_the_store(tmp_path: Path) -> None:
    async with AccessStore.open(tmp_path / "a.db") as opened:
        seen = {await opened.read(lambda _: threading.get_ident()), await opened.write(lambda _: threading.get_ident())}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


async def test_a_write_of_another_process_is_noticed_once_and_ones_own_never(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with AccessStore.open(path) as opened:
        await opened.write(add("own"))
        assert not await opened.changed()
        with open_directly(path) as other:
            assert not await opened.changed()  # it has opened the database, and written nothing
            other.write(add("other"))
        assert await opened.changed()
        assert not await opened.changed()
        assert await opened.read(names) == ["other", "own"]


async def test_a_file_put_in_the_place_of_the_database_is_opened(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.db", tmp_path / "b.db"
    with open_directly(copy) as other:
        other.write(add("restored"))
    async with AccessStore.open(path) as opened:
        assert not await opened.changed()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        copy.replace(path)
        assert await opened.changed()
        assert await opened.read(names) == ["restored"]
        assert not await opened.changed()


async def test_jobs_beyond_the_limit_are_refused_and_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_WAITING", 2)
    release = threading.Event()

    async with AccessStore.open(tmp_path / "a.db") as opened:
        blocked = [asyncio.ensure_future(opened.read(lambda _: release.wait(30))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(AccessError, match="2 requests wait"):
            await opened.read(names)
        release.set()
        for job in blocked:
            assert await job
        assert await opened.read(names) == []


def test_no_other_user_can_read_the_files_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    before = os.umask(0)
    try:
        with open_directly(path) as opened:
            opened.write(add("t1"))
            modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"a.db": 0o600, "a.db-wal": 0o600, "a.db-shm": 0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_a_command_of_root_leaves_files_of_the_user_that_owns_the_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12346)
    with open_directly(tmp_path / "a.db") as opened:
        opened.write(add("t1"))
        owners = {file.name: (file.stat().st_uid, file.stat().st_gid) for file in tmp_path.iterdir()}
    assert owners == dict.fromkeys(["a.db", "a.db-wal", "a.db-shm"], (12345, 12346))


def test_a_database_that_others_can_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with open_directly(path):
        pass
    path.chmod(0o620)
    with pytest.raises(AccessError, match=r"mode 0620.*chmod 600"), open_directly(path):
        pass


def test_a_link_or_directory_in_the_place_of_the_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere.db")
    (tmp_path / "directory.db").mkdir()
    for name in ("link.db", "directory.db"):
        with pytest.raises(AccessError, match="not a regular file"), open_directly(tmp_path / name):
            pass
    assert not (tmp_path / "elsewhere.db").exists()


def test_a_database_of_another_program_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (a)")
    other.close()
    path.chmod(0o600)
    before = path.read_bytes()
    with pytest.raises(AccessError, match="another program"), open_directly(path):
        pass
    assert path.read_bytes() == before


def test_a_database_of_a_newer_whaled_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with open_directly(path) as opened:
        opened.write(lambda connection: connection.execute(f"PRAGMA user_version = {access_schema.VERSION + 1}"))
    before = path.read_bytes()
    with pytest.raises(AccessError, match="newer whaled"), open_directly(path):
        pass
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"not a database " * 500)
    path.chmod(0o600)
    with pytest.raises(AccessError, match=r"not a database\. Stop whaled and move this file away"), open_directly(path):
        pass


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"nowhere: No such file"), open_directly(tmp_path / "nowhere" / "a.db"):
        pass


def test_a_table_that_is_gone_is_damage_and_is_not_reported_as_a_bug(tmp_path: Path) -> None:
    with open_directly(tmp_path / "a.db") as opened:
        opened.write(lambda connection: connection.execute("DROP TABLE revocations"))
        with pytest.raises(AccessError, match="no such table"):
            opened.read(names)
