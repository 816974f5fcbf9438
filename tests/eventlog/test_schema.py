"""Databases that older versions made: opened, checked, repaired, restored, and migrated whatever happens meanwhile."""

import asyncio
import gzip
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from kit.backups import everything, ignore
from kit.damage import edit
from kit.eventlog import Meter, open_log
from kit.paths import DATA
from kit.whales import NOW, txid, update_draft, whale
from whaled.bookmarks import text
from whaled.cli.main import main
from whaled.eventlog import checksums, files, queries, schema
from whaled.eventlog.backup import back_up
from whaled.eventlog.inspection import inspect
from whaled.eventlog.repair import repair
from whaled.eventlog.restore import restore
from whaled.model import Draft, Kind
from whaled.whales.lifecycle import Origin, Step, next_event

OLD = DATA / "eventlog"
# When the recorded logs began.
BEGAN_AT = 1_760_000_000.0
VERSIONS = range(1, schema.NEWEST_VERSION)
A, B = "aa" * 32, "bb" * 32
REPEATED = {
    1: [
        Step(Kind.ALERT),
        Step(Kind.CONFIRMED, A),
        Step(Kind.PENDING, A),
        Step(Kind.CONFIRMED, B),
        Step(Kind.PENDING, B),
        Step(Kind.CONFIRMED, A, 2),
        Step(Kind.PENDING, A, 2),
        Step(Kind.CONFIRMED, A, 3),
    ],
    2: [
        Step(Kind.ALERT),
        Step(Kind.DROPPED),
        Step(Kind.PENDING),
        Step(Kind.DROPPED, "", 2),
        Step(Kind.PENDING, "", 2),
    ],
}
FIRST = {1: [Step(Kind.ALERT), Step(Kind.CONFIRMED, A)], 2: [Step(Kind.ALERT), Step(Kind.DROPPED)]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.db"


def put(path: Path, version: int) -> None:
    """Write the database of a schema version."""
    path.write_bytes(gzip.decompress((OLD / f"schema-{version}.db.gz").read_bytes()))


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return schema.version_of(db)


def epoch_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        return str(db.execute("SELECT epoch FROM log").fetchone()[0])


async def require_complete(path: Path, version: int, *, lost: frozenset[int] = frozenset()) -> None:
    """Open the log and compare it with what the old code stored."""
    epoch = epoch_of(path)
    head = 9 if version == 1 else 18
    async with open_log(path) as log:
        assert (log.epoch, log.head, log.oldest) == (epoch, head, 2)
        events = await everything(log)
        assert [event.offset for event in events] == [offset for offset in range(2, head + 1) if offset not in lost]
        if not lost:
            expected = FIRST if version == 1 else REPEATED
            assert await log.read_each(queries.histories, [txid(1), txid(2)]) == {
                txid(n): steps for n, steps in expected.items()
            }
        for event in events:
            assert "#" not in event.ref
            assert event.update is None or event.kind is Kind.REPLACED or event.update.block_hash == event.ref
        assert await log.recall(text("began_at")) == str(BEGAN_AT)
        assert len(await log.read(queries.scans, 0, 900_000)) == (0 if version == 1 else 2)
        spent = {} if version < 3 else {txid(4): {f"{txid(104)}:0", f"{txid(200)}:4"}}
        assert {
            each: set(outpoints) for each, outpoints in (await log.read_each(queries.outpoints, [txid(4)])).items()
        } == spent


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_database_of_every_older_version_is_migrated_with_all_its_events(path: Path, version: int) -> None:
    put(path, version)
    await require_complete(path, version)
    assert version_of(path) == schema.NEWEST_VERSION
    found = inspect(path, ignore, is_deep=True)
    assert (found.is_whole, found.version) == (True, schema.NEWEST_VERSION)
    assert found.unverified == (0 if version >= schema.CHECKSUMS_VERSION else len(range(2, found.counter.head + 1)))
    await require_complete(path, version)  # once more: nothing is left to migrate


async def test_a_repetition_goes_on_counting_after_the_migration(path: Path) -> None:
    put(path, 4)
    async with open_log(path) as log:
        assert [each.alert.transaction_id for each in await log.read(queries.confirmed_in, A)] == [txid(1)]
        again = Draft(
            kind=Kind.PENDING, at=NOW + 99, whale=whale(1), ref=A, update=update_draft(1, Kind.PENDING).update
        )
        for kind in (Kind.PENDING, Kind.CONFIRMED):
            draft = Draft(kind=kind, at=NOW + 99, whale=again.whale, ref=A, update=again.update)
            event = next_event(draft, (await log.read_each(queries.histories, [txid(1)]))[txid(1)], Origin.POLLED)
            assert event is not None
            assert len(await log.append([event])) == 1
            assert await log.append([event]) == []  # as unique as ever
        assert (await log.read_each(queries.histories, [txid(1)]))[txid(1)][-2:] == [
            Step(Kind.PENDING, A, 3),
            Step(Kind.CONFIRMED, A, 4),
        ]


async def test_checksums_of_repeated_events_stay_valid_and_cover_the_number(path: Path) -> None:
    put(path, 4)
    async with open_log(path) as log:
        before = await everything(log)
    edit(path, "UPDATE events SET repeat = 4 WHERE kind = 'confirmed' AND repeat = 3")
    async with open_log(path, meter := Meter()) as log:
        assert await everything(log) == [event for event in before if event.repeat != 3]
        assert meter.damaged_rows == 1
    assert checksums.of_event(1, b"x", A.encode(), 2, 0.0, 0.0, None, b"") == checksums.of_event(
        1, b"x", f"{A}#2".encode(), 1, 0.0, 0.0, None, b""
    )


@pytest.mark.parametrize("value", ["0", "-1", "9223372036854775807"])
async def test_a_repeat_number_that_nobody_stored_is_damage(path: Path, value: str) -> None:
    put(path, 4)
    async with open_log(path):
        pass
    edit(path, f"UPDATE events SET repeat = {value} WHERE offset = 9")
    await require_complete(path, 4, lost=frozenset({9}))


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_read_an_older_database_as_it_is(path: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    put(path, version)
    before = path.read_bytes()
    for command in (["check"], ["check", "--deep"], ["repair", "--dry-run"], ["accuracy"]):
        assert main([*command, "--db-path", str(path)]) == 0
    assert "no damage" in capsys.readouterr().out
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_repair_of_an_older_database_makes_one_of_the_newest_version(path: Path, version: int) -> None:
    put(path, version)
    edit(path, "UPDATE events SET kind = 'eaten' WHERE offset = 4")
    salvaged = repair(path, now=NOW, progress=ignore).salvaged
    assert salvaged is not None
    assert salvaged.lost == 1
    assert version_of(path) == schema.NEWEST_VERSION
    async with open_log(path) as log:
        assert [event.offset for event in await everything(log)] == [2, 3, *range(5, log.head + 1)]
        expected = FIRST if version == 1 else REPEATED
        assert await log.read_each(queries.histories, [txid(1), txid(2)]) == {
            txid(n): steps for n, steps in expected.items()
        }


async def test_a_backup_made_before_the_migration_keeps_the_epoch_at_its_restore(path: Path, tmp_path: Path) -> None:
    put(path, 4)
    epoch = epoch_of(path)
    file = tmp_path / "backup.db"
    back_up(path, file, now=NOW, overwrite=False, progress=ignore)
    async with open_log(path):
        pass
    assert (version_of(file), version_of(path)) == (4, schema.NEWEST_VERSION)
    assert restore(file, path, now=NOW, progress=ignore).renewed_because is None
    assert (version_of(path), epoch_of(path)) == (4, epoch)
    await require_complete(path, 4)


async def test_damaged_events_do_not_prevent_the_migration(path: Path) -> None:
    """Values of a wrong type are left out, others stay damaged, and an event whose whale is lost is no obstacle."""
    put(path, 4)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        (sql,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'events'").fetchone()
        db.execute("PRAGMA writable_schema = ON")
        loose = sql.replace("kind TEXT NOT NULL", "kind ANY").replace("STRICT", "")
        db.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'events'", (loose,))
        db.execute("PRAGMA writable_schema = RESET")
        db.execute("UPDATE events SET kind = x'00' WHERE offset = 3")
        db.execute("UPDATE events SET kind = NULL WHERE offset = 4")
        db.execute("UPDATE events SET ref = ref || '#z' WHERE offset = 5")
        db.execute("DELETE FROM whales WHERE txid = ?", (txid(5),))
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'events'", (sql,))
        db.execute("PRAGMA writable_schema = RESET")
    await require_complete(path, 4, lost=frozenset({3, 4, 5, 6}))
    found = inspect(path, ignore, is_deep=True)
    assert [(damage.first, damage.through) for damage in found.damages if damage.first] == [(3, 4), (5, 5), (6, 6)]
    with closing(files.open_to_write(path, 1.0)) as db:
        assert db.execute("SELECT ref FROM events WHERE offset = 5").fetchone() == ("#z",)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


KILLED = """
import os, signal, sqlite3, sys
from contextlib import closing
from pathlib import Path
from whaled.eventlog import files, schema
path, left = Path(sys.argv[1]), int(sys.argv[2])
def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0
with closing(files.open_to_write(path, 1.0)) as db:
    db.execute("PRAGMA cache_size = 2")  # uncommitted pages are written to the write-ahead log meanwhile
    db.execute("PRAGMA cache_spill = 1")
    total = left
    db.set_progress_handler(count, 10)
    schema.migrate(db, path, now=1.0)
    db.set_progress_handler(None, 0)
print(total - left)
"""


async def killed(path: Path, steps: int) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(path), str(steps), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out


@pytest.mark.slow
async def test_a_migration_that_is_killed_at_any_moment_changes_nothing(path: Path, tmp_path: Path) -> None:
    put(path, 4)
    status, out = await killed(path, -1)
    assert status == 0
    total = int(out.splitlines()[-1])  # after the log line of the migration
    assert total > 20
    for moment in range(1, total + 1, max(1, total // 12)):
        file = tmp_path / str(moment) / "whaled.db"
        file.parent.mkdir()
        put(file, 4)
        assert (await killed(file, moment))[0] == -9
        assert version_of(file) == 4
        assert inspect(file, ignore, is_deep=True).is_whole
        await require_complete(file, 4)
        assert version_of(file) == schema.NEWEST_VERSION
