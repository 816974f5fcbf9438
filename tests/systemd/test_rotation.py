"""A rotation of the signing key under systemd: nobody is disconnected, and the new key counts at once."""

import json
from collections.abc import Iterator

import pytest

from systemd.installation import CONFIG, KEY_RING, OWN, URL, WHALED, Installation, Program
from systemd.lab import Lab

pytestmark = pytest.mark.timeout(180)

OLD_UNIT = f"""[Service]
SupplementaryGroups=
LoadCredential=keys.json:{KEY_RING}
"""


@pytest.fixture
def whaled(installed: Lab) -> Iterator[Installation]:
    """Run whaled with the shared configuration, connected to a backend with frequent whales."""
    installation = Installation(installed)
    installation.reset()
    yield installation
    installation.undo_drop_in()


def signs_in_the_file(lab: Lab) -> str:
    shown = lab.run(WHALED, "keys", "list", "--json", "--key-ring", KEY_RING).stdout
    (kid,) = [line["kid"] for line in map(json.loads, shown.splitlines()) if line["state"] == "signs"]
    return str(kid)


def test_a_rotation_disconnects_nobody_and_tokens_of_the_new_key_are_accepted(whaled: Installation, lab: Lab) -> None:
    old, pid = signs_in_the_file(lab), whaled.main_pid()
    client = whaled.follow()
    client.until("alert")

    rotated = lab.run("whaled", "keys", "rotate", "--config", CONFIG)
    new = rotated.stdout.strip()
    assert new == signs_in_the_file(lab) != old
    assert f"process {pid} signs with key {new}; nobody was disconnected" in rotated.stderr
    listed = lab.run("whaled", "keys", "list").stdout.splitlines()
    assert [line.split()[2].strip(",") for line in listed if old in line] == ["verifies"]
    assert all(", until 2" in line for line in listed if old in line)
    assert lab.run("stat", "--format", "%a %U %G", KEY_RING).stdout.split() == ["640", "root", "whaled-keys"]

    issued = lab.run("whaled", "token", "issue", "--client", "later")
    assert new in issued.stderr
    lab.write(f"{OWN}/later", issued.stdout.strip(), 0o600)
    later = Program(lab, "follow", URL, f"{OWN}/later", called="later")
    later.until("connected")
    seen = len(client.lines("alert"))
    client.until("alert", count=seen + 3)
    later.until("alert")
    later.stop()
    # A client that connects now with a token of the old key is let in too.
    assert {line["kind"] for line in client.stop()} <= {"connected", "upstream", "alert", "update"}
    again = whaled.follow()
    again.until("alert")
    again.stop()
    assert (whaled.main_pid(), whaled.restarts()) == (pid, 0)
    assert whaled.metrics()["whaled_signing_keys"] >= 2


def test_a_reload_takes_the_ring_of_the_file_with_every_systemd(whaled: Installation, lab: Lab) -> None:
    new = lab.run("whaled", "keys", "rotate", "--no-reload").stdout.strip()
    before = whaled.metrics()["whaled_signing_keys"]
    lab.systemctl("reload", "whaled")
    assert whaled.metrics()["whaled_signing_keys"] == before + 1
    outcome = json.loads(lab.run("cat", "/var/lib/private/whaled/last-reload.json").stdout)
    assert outcome["signing_key"] == new


def test_a_unit_that_still_passes_the_ring_as_a_credential_goes_on(whaled: Installation, lab: Lab) -> None:
    lab.run("chown", "root:root", KEY_RING)
    lab.run("chmod", "0600", KEY_RING)
    try:
        whaled.drop_in(OLD_UNIT)
        lab.systemctl("restart", "whaled")
        client = whaled.follow()
        client.until("alert")
        client.stop()
        made = lab.run("whaled", "keys", "generate")
        assert "systemctl restart whaled" in made.stderr
        assert lab.run("stat", "--format", "%a %G", KEY_RING).stdout.split() == ["600", "root"]
    finally:
        lab.run("chown", "root:whaled-keys", KEY_RING)
        lab.run("chmod", "0640", KEY_RING)


def test_a_ring_that_the_service_may_not_read_is_named_with_the_remedy(whaled: Installation, lab: Lab) -> None:
    lab.run("chmod", "0600", KEY_RING)
    try:
        done = lab.run("whaled", "keys", "rotate", check=False)
        assert done.returncode == 78
        assert "refused the reload and still has its old keys" in done.stderr
        assert f"chgrp whaled-keys {KEY_RING} && chmod 640 {KEY_RING}" in done.stderr
    finally:
        lab.run("chgrp", "whaled-keys", KEY_RING)
        lab.run("chmod", "640", KEY_RING)
    lab.systemctl("reload", "whaled")


def test_the_daemon_leaves_no_core_dump(whaled: Installation, lab: Lab) -> None:
    limits = lab.run("cat", f"/proc/{whaled.main_pid()}/limits").stdout
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
    # The kernel gives the files of a process that is not dumpable to root.
    assert lab.run("stat", "--format", "%u", f"/proc/{whaled.main_pid()}/environ").stdout.strip() == "0"
