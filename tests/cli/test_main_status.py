"""A command that fails under systemd says why in the unit's status line."""

import socket
from pathlib import Path

import pytest

from whaled.cli.main import main


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """The other end of NOTIFY_SOCKET."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return sock


def check(tmp_path: Path, text: str) -> int:
    file = tmp_path / "whaled.yaml"
    file.write_text(text)
    return main(["check-config", str(file)])


def test_the_first_fault_is_the_status_line(manager: socket.socket, tmp_path: Path) -> None:
    with manager:
        assert check(tmp_path, "auth: {enabled: false}\ngateway: {prot: 1}\nhttp: {prot: 1}\n") == 78
        said = manager.recv(4096).decode()
    assert said.startswith(f"STATUS={tmp_path}/whaled.yaml:2: gateway.prot: ")
    assert said.endswith(" (and 1 more)")
    assert "\n" not in said


def test_a_valid_configuration_leaves_the_status_line_alone(manager: socket.socket, tmp_path: Path) -> None:
    with manager:
        assert check(tmp_path, "auth: {enabled: false}\n") == 0
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


def test_a_long_fault_is_cut(manager: socket.socket, tmp_path: Path) -> None:
    path = "\u00fc" * 3000
    with manager:
        assert check(tmp_path, f"auth: {{enabled: false}}\ndetection: {{address_book: /{path}}}\n") == 78
        assert 500 < len(manager.recv(65536).decode()) < 600
