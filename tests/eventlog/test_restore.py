"""Restores: in which epoch the log goes on, and what becomes of the files that it replaces."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.backups import COPIED_AT, copied, damage, digest, held, ignore, names, remove, store, txids, write
from kit.damage import edit
from kit.eventlog import open_log
from kit.whales import alert_draft, txid
from whaled.errors import EventLogError, LogFailure, OperatorError
from whaled.eventlog import files
from whaled.eventlog.restore import Restored, restore

ASIDE = "whaled.db.replaced-20260921T141320Z"


def restored(source: Path, path: Path) -> Restored:
    return restore(source, path, now=COPIED_AT, progress=ignore)


# --- a backup ---


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


# --- a restore ---


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


# --- a backup copied into place ---


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
