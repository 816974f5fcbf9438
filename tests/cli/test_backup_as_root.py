"""`whaled backup` and `whaled restore` as root, beside a daemon that is another user."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kit.backups import names, whaled
from kit.paths import TESTS
from whaled.eventlog import files

NOBODY = 65534


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
