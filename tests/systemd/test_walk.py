"""whaled's life under systemd, walked through in a booted one."""

import pytest

from systemd.lab import Lab

pytestmark = pytest.mark.timeout(180)


def test_start_returns_when_it_listens(installed: Lab) -> None:
    installed.systemctl("start", "whaled")
    assert installed.show("whaled", "ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}
