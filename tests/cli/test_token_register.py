import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from whaled.auth import audit
from whaled.auth.store import open_directly
from whaled.cli.main import main

Output = pytest.CaptureFixture[str]


class Place:
    """A configuration with a key ring and a place for the event log."""

    def __init__(self, directory: Path, output: Output) -> None:
        self.directory = directory
        self.config = directory / "whaled.yaml"
        self.database = directory / "whaled.access.db"
        self.output = output
        settings = {"eventlog": {"path": str(directory / "whaled.db")}, "auth": {"key_ring": str(directory / "k.json")}}
        self.config.write_text(yaml.safe_dump(settings))
        self.kid = self.run("keys", "generate").strip()

    def run(self, *arguments: str, status: int = 0) -> str:
        assert main([*arguments, "--config", str(self.config)]) == status
        captured = self.output.readouterr()
        self.errors = captured.err
        return captured.out

    def issue(self, client_id: str) -> tuple[str, str]:
        """Return a token and its id."""
        token = self.run("token", "issue", "--client", client_id).strip()
        return token, self.listed(client_id)[-1]["jti"]

    def listed(self, *client_id: str) -> list[dict[str, Any]]:
        lines = self.run("token", "list", "--json", *(["--client", *client_id] if client_id else [])).splitlines()
        return [json.loads(line) for line in lines]

    def is_accepted(self, token: str) -> bool:
        status = main(["token", "inspect", token, "--config", str(self.config)])
        self.errors = self.output.readouterr().err
        return status == 0


@pytest.fixture
def place(tmp_path: Path, capsys: Output) -> Place:
    return Place(tmp_path, capsys)


def test_an_issued_token_is_listed_and_the_register_does_not_have_the_token(place: Place) -> None:
    token, _ = place.issue("desk-1")
    (listed,) = place.listed()
    assert listed == {
        "jti": listed["jti"], "family": listed["jti"], "client_id": "desk-1", "permissions": ["read"],
        "issued_at": listed["issued_at"], "expires_at": listed["expires_at"], "kid": place.kid,
        "issued_by": f"command line uid {os.getuid()}", "revoked": False,
    }  # fmt: skip
    contents = place.database.read_bytes()
    for part in token.split("."):
        assert part.encode() not in contents
    line = place.run("token", "list")
    assert line.startswith(f"{listed['jti']}  valid    desk-1  read  issued 20")


def test_a_token_is_revoked_by_its_id(place: Place) -> None:
    (first, jti), (second, _) = place.issue("desk-1"), place.issue("desk-1")
    assert place.is_accepted(first)
    out = json.loads(place.run("token", "revoke", jti, "--json"))
    assert (out["revoked"], out["name"], out["registered_tokens"]) == ("jti", jti, 1)
    assert place.errors.startswith(f"revoked: token {jti} and its family; a running whaled closes")
    assert not place.is_accepted(first)
    assert place.errors == "not accepted: revoked\n"
    assert place.is_accepted(second)
    assert {listed["jti"]: listed["revoked"] for listed in place.listed()}[jti]


def test_a_client_is_revoked_and_the_next_token_it_gets_is_accepted(place: Place) -> None:
    (one, _), (other, _) = place.issue("desk-1"), place.issue("desk-2")
    place.run("token", "revoke", "--client", "desk-1")
    again, _ = place.issue("desk-1")
    assert [place.is_accepted(token) for token in (one, other, again)] == [False, True, True]
    assert [listed["revoked"] for listed in place.listed("desk-1")] == [True, False]


def test_a_key_is_revoked_with_a_word_about_the_key_that_signs(place: Place) -> None:
    token, _ = place.issue("desk-1")
    place.run("token", "revoke", "--key", place.kid)
    assert "generate another one" in place.errors
    assert not place.is_accepted(token)


def test_every_act_is_in_the_audit_log_with_the_user(place: Place) -> None:
    _, jti = place.issue("desk-1")
    place.run("token", "revoke", jti)
    with open_directly(place.database) as database:
        acts = [entry.act for entry in database.read(lambda connection: audit.newest(connection, 10))]
    assert [(act.act, act.target, act.actor) for act in acts] == [
        ("token revoked", f"jti {jti}", f"command line uid {os.getuid()}"),
        ("token issued", f"jti {jti}", f"command line uid {os.getuid()}"),
    ]


def test_a_name_without_a_token_is_revoked_and_doubted(place: Place) -> None:
    place.issue("desk-1")
    for arguments in (["desk-1"], ["--client", "desk-7"], ["--key", "k"]):
        place.run("token", "revoke", *arguments)
        assert "check the name" in place.errors


def test_the_token_itself_is_not_taken_for_its_id(place: Place) -> None:
    token, _ = place.issue("desk-1")
    place.run("token", "revoke", token, status=2)
    assert place.errors == "whaled: found a token, expected its id: `whaled token inspect FILE` shows it as `jti`\n"
    assert place.is_accepted(token)


@pytest.mark.parametrize("arguments", [[], ["t1", "--client", "c1"], ["--client", "c1", "--key", "k1"]])
def test_exactly_one_thing_is_revoked_at_a_time(place: Place, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["token", "revoke", *arguments])
    assert ended.value.code == 2


def test_a_revocation_at_a_place_without_an_event_log_is_refused_and_creates_nothing(place: Place) -> None:
    elsewhere = place.directory / "elsewhere.db"
    place.run("token", "revoke", "t1", "--db-path", str(elsewhere), status=78)
    assert "there is no event log here" in place.errors
    assert list(place.directory.glob("*.access.db*")) == []


def test_a_token_is_issued_even_if_it_cannot_be_registered(place: Place, tmp_path: Path) -> None:
    place.database.mkdir()
    token = place.run("token", "issue", "--client", "c1").strip()
    assert "warning: `whaled token list` will not show this token" in place.errors
    assert place.is_accepted(token)
    assert "warning: it may be revoked" in place.errors
    place.run("token", "list", status=1)
    assert "not a regular file" in place.errors


def test_an_empty_register_is_stated(place: Place) -> None:
    place.issue("desk-1")
    assert place.run("token", "list", "--client", "desk-2") == ""
    assert place.errors == "no registered token is valid\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_a_database_that_a_command_of_root_creates_belongs_to_the_user_of_the_daemon(place: Place) -> None:
    os.chown(place.directory, 12345, 12346)
    place.issue("desk-1")
    assert {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in place.directory.glob("*.access.db*")} == {
        (12345, 0o600)
    }
