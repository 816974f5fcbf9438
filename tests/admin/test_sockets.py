"""The socket of the admin API: its place, its mode, and what may be in its way."""

import socket
import stat
from pathlib import Path

import pytest

from whaled.admin.sockets import UNIT_SOCKET, beside, listening, own_path, paths_of_daemon
from whaled.config.sections import AdminSettings
from whaled.errors import OperatorError


def test_only_its_user_may_connect_and_the_socket_goes_with_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with listening(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with listening(path):
        with pytest.raises(OperatorError, match="another process listens"), listening(path):
            pass
        assert path.exists()


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("mine")
    with pytest.raises(OperatorError, match="is not a socket"), listening(path):
        pass
    assert path.read_text() == "mine"


def test_a_path_longer_than_an_address_works_and_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 150) / "admin.sock"
    with pytest.raises(OperatorError, match="cannot listen on"), listening(path):
        pass
    path.parent.mkdir()
    with listening(path):
        assert path.is_socket()


def test_the_place_follows_the_configuration_then_systemd_then_the_event_log(tmp_path: Path) -> None:
    log = tmp_path / "whaled.db"
    assert own_path(AdminSettings(socket="/x/y"), log, {"RUNTIME_DIRECTORY": "/run/a"}) == Path("/x/y")
    assert own_path(AdminSettings(), log, {"RUNTIME_DIRECTORY": "/run/a:/run/b"}) == Path("/run/a/admin.sock")
    assert own_path(AdminSettings(), log, {}) == beside(log) == tmp_path / "whaled.admin.sock"


def test_a_command_for_another_event_log_does_not_reach_the_unit(tmp_path: Path) -> None:
    log = tmp_path / "whaled.db"
    assert paths_of_daemon(AdminSettings(), log) == [beside(log)]
    assert paths_of_daemon(AdminSettings(), Path("/var/lib/whaled/whaled.db"))[0] == UNIT_SOCKET
