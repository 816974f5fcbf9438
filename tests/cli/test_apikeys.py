import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest
import yaml

from whaled.auth import audit
from whaled.auth.apikeydesk import MAX_COMMENT
from whaled.auth.apikeytext import is_key
from whaled.auth.store import open_directly
from whaled.cli.main import main

Output = pytest.CaptureFixture[str]


class Place:
    """A configuration with an access database."""

    def __init__(self, directory: Path, output: Output) -> None:
        self.directory = directory
        self.config = directory / "whaled.yaml"
        self.database = directory / "whaled.access.db"
        self.output = output
        self.config.write_text(yaml.safe_dump({"eventlog": {"path": str(directory / "whaled.db")}}))
        with open_directly(self.database):
            pass

    def run(self, *arguments: str, status: int = 0) -> str:
        assert main(["apikey", *arguments, "--config", str(self.config)]) == status
        captured = self.output.readouterr()
        self.errors = captured.err
        return captured.out

    def listed(self, *options: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.run("list", "--json", *options).splitlines()]


@pytest.fixture
def place(tmp_path: Path, capsys: Output) -> Place:
    return Place(tmp_path, capsys)


def test_a_key_is_printed_once_and_stored_as_a_hash(place: Place) -> None:
    text = place.run("create", "--client", "desk-1").strip()
    assert is_key(text)
    assert text not in place.errors
    assert text not in place.run("list", "--all") + place.run("list", "--all", "--json")
    kept = b"".join(path.read_bytes() for path in place.directory.glob("whaled.access.db*"))
    assert text.encode() not in kept
    assert text[4:47].encode() not in kept


def test_what_a_key_permits_is_listed(place: Place) -> None:
    place.run(
        "create", "--client", "desk-1", "--permission", "read", "--permission", "write", "--filter", '{"min_btc": 500}',
        "--rate", "2.5", "--network", "10.1.0.0/16", "--network", "2001:db8::/48", "--network", "10.1.0.0/16",
        "--expires", "2100-01-01T00:00:00Z", "--comment", "the desk",
    )  # fmt: skip
    (key,) = place.listed("--client", "desk-1")
    assert key["permissions"] == ["read", "write"]
    assert key["filter"] == {"min_btc": 500.0}
    assert (key["rate"], key["networks"]) == (2.5, ["10.1.0.0/16", "2001:db8::/48"])
    assert (key["expires_at"], key["comment"], key["state"]) == ("2100-01-01T00:00:00+00:00", "the desk", "active")
    assert key["created_by"] == f"command line uid {os.getuid()}"
    assert place.listed("--client", "desk-2") == []
    line = place.run("list")
    assert all(part in line for part in ("whkid_", "desk-1", "read,write", "10.1.0.0/16", "2.5 messages/s", "the desk"))


def test_a_file_with_a_key_is_private_and_not_replaced_unasked(place: Place) -> None:
    path = place.directory / "desk.key"
    assert place.run("create", "--client", "c", "--output", str(path)) == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_text()
    assert is_key(first.strip())
    place.run("create", "--client", "c", "--output", str(path), status=78)
    assert "this file exists" in place.errors
    assert path.read_text() == first
    assert len(place.listed()) == 1  # a key that nobody has got does not exist
    place.run("create", "--client", "c", "--output", str(path), "--force")
    assert path.read_text() != first
    assert len(place.listed()) == 2


def test_a_revoked_key_is_listed_on_request_only_and_both_acts_are_recorded(place: Place) -> None:
    place.run("create", "--client", "c")
    (key,) = place.listed()
    name = str(key["id"])
    place.run("revoke", name)
    assert "within a second" in place.errors
    place.run("revoke", name)
    assert "revoked before" in place.errors
    assert place.listed() == []
    assert [key["state"] for key in place.listed("--all")] == ["revoked"]
    with open_directly(place.database) as database:
        acts = [entry.act for entry in database.read(lambda connection: audit.newest(connection, 10))]
    assert [(act.act, act.target, act.outcome) for act in reversed(acts)] == [
        ("api key created", name, "done"),
        ("api key revoked", name, "done"),
        ("api key revoked", name, "revoked before"),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--permission", "root"], "found 'root'; allowed are read, write, admin"),
        (["--filter", "{"], "the filter is not JSON"),
        (["--filter", '{"min_btcc": 1}'], "did you mean 'min_btc'"),
        (["--network", "10.1.0.1/16"], "has host bits set; expected a network such as"),
        (["--network", "home"], "expected a network such as 10.1.0.0/16"),
        (["--expires", "soon"], "or a duration such as 90d"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_with_what_is_allowed(
    place: Place, arguments: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["apikey", "create", "--client", "c", *arguments, "--config", str(place.config)])
    assert caught.value.code == 2
    assert text in " ".join(place.output.readouterr().err.split())
    assert place.listed("--all") == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--client", ""], "allowed are 1 to 256 printable characters"),
        (["--client", "a\nb"], "allowed are 1 to 256 printable characters"),
        (["--client", "c", "--rate", "0"], "allowed is 0.1 to 10,000"),
        (["--client", "c", "--rate", "nan"], "allowed is 0.1 to 10,000"),
        (["--client", "c", "--comment", "x" * (MAX_COMMENT + 1)], "allowed are 200 printable ones"),
        (["--client", "c", "--expires", "2020-01-01"], "the expiry is in the past"),
        (["--client", "c", *(f"--network=10.0.{n}.0/24" for n in range(65))], "found 65 networks; allowed are 64"),
    ],
)
def test_an_order_that_cannot_be_met_is_refused(place: Place, arguments: list[str], text: str) -> None:
    place.run("create", *arguments, status=2)
    assert text in place.errors
    assert place.listed("--all") == []


def test_an_unknown_id_is_an_error(place: Place) -> None:
    place.run("revoke", "whkid_none", status=1)
    assert "there is no API key with the id 'whkid_none'" in place.errors


def test_a_wrong_place_is_not_filled_with_keys(place: Place) -> None:
    place.database.unlink()
    place.run("create", "--client", "c", status=78)
    assert "there is no event log here" in place.errors
    assert not place.database.exists()


def test_a_permission_of_a_newer_whaled_grants_nothing(place: Place) -> None:
    place.run("create", "--client", "c")
    with sqlite3.connect(place.database) as connection:
        connection.execute("UPDATE api_keys SET permissions = 'read root'")
    connection.close()
    assert [key["permissions"] for key in place.listed()] == [["read"]]
