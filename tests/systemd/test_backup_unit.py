"""Backup and restore by root next to the hardened unit, whose dynamic user is created at its start."""

import pytest

from systemd.installation import UNITS, WHALED, Installation
from systemd.lab import Lab

pytestmark = pytest.mark.timeout(180)

DATA = "/var/lib/private/whaled"
BACKUP = "/root/whaled.backup"


def owners(lab: Lab) -> set[str]:
    """Return the owners of the data directory and its contents."""
    return set(lab.run("find", DATA, "-printf", "%U\n").stdout.split())


def test_root_backs_up_and_restores_and_the_unit_goes_on(installed: Lab) -> None:
    lab, whaled = installed, Installation(installed)
    whaled.reset()
    client = whaled.follow()
    client.until("alert")
    user = owners(lab)
    assert len(user) == 1
    assert user != {"0"}
    output = lab.run(WHALED, "backup", BACKUP).stdout
    assert "events, head" in output
    assert lab.run("stat", "-c", "%u %a", BACKUP).stdout.split() == ["0", "600"]
    assert owners(lab) == user
    refused = lab.run(WHALED, "restore", BACKUP, check=False)
    assert refused.returncode == 1
    assert "has this event log open" in refused.stderr
    lab.systemctl("stop", *UNITS)
    client.stop()

    # Nothing was appended after the backup, so a restore keeps the epoch.
    assert "events" in lab.run(WHALED, "backup", "--force", BACKUP).stdout
    assert owners(lab) == user
    assert "epoch kept" in lab.run(WHALED, "restore", BACKUP).stdout
    assert owners(lab) == user
    lab.run("rm", f"{DATA}/whaled.db.lock")
    assert "epoch kept" in lab.run(WHALED, "restore", BACKUP).stdout
    assert owners(lab) == user

    since = lab.moment()
    lab.systemctl("start", *UNITS)
    client = whaled.follow()
    client.until("alert")
    client.stop()
    lab.systemctl("stop", *UNITS)
    assert "new epoch" in lab.run(WHALED, "restore", BACKUP).stdout
    assert owners(lab) == user
    lab.run("cp", "--no-preserve=all", BACKUP, f"{DATA}/whaled.db")  # overwrites the file, which keeps its owner
    lab.systemctl("start", *UNITS)
    warnings = [line.get("WHALED_EVENT") for line in lab.journal("whaled", since, "--priority", "warning")]
    assert "eventlog_backup_adopted" in warnings, warnings
    client = whaled.follow()
    client.until("alert")
    client.stop()
