"""Commands as a person types them: what they print where, and their exit status."""

import argparse
import base64
import importlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from whaled import __version__
from whaled.cli.main import COMMANDS, main
from whaled.cli.unit import Unit

Output = pytest.CaptureFixture[str]


@pytest.fixture
def ring(tmp_path: Path, capsys: Output) -> Path:
    path = tmp_path / "keys.json"
    assert main(["keys", "generate", "--key-ring", str(path)]) == 0
    capsys.readouterr()
    return path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["keys", "generate"], ["token", "issue"]])
def test_every_command_has_help(command: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: whaled" in capsys.readouterr().out


def test_the_list_of_commands_has_the_summary_of_each_commands_help(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help}" in listed
        subparsers = argparse.ArgumentParser().add_subparsers()
        importlib.import_module(command.module).register(subparsers)
        assert list(subparsers.choices) == [name]
        assert [each.help for each in subparsers._choices_actions] == [command.help]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["token", "issue", "--help"], ["keys", "list", "--help"]])
def test_a_quick_command_loads_no_web_server(arguments: list[str]) -> None:
    ask = (
        "import sys; from whaled.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print('loaded', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ask, *arguments], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("loaded ")[-1].split()
    assert "whaled.cli.main" in loaded
    assert not {"aiohttp", "websockets", "rich", "sqlite3", "whaled.service"} & set(loaded)


@pytest.mark.slow
def test_the_daemon_does_not_load_the_simulator_unless_asked_to() -> None:
    ask = "import sys, whaled.cli.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "whaled.service" in loaded
    assert not [name for name in loaded if name.startswith("whaled.simulator")]


def test_a_reader_that_closes_the_pipe_is_not_an_error(ring: Path) -> None:
    command = f"{sys.executable} -m whaled keys list --key-ring {ring} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in {0, 141}
    assert done.stderr == ""


def test_the_version_is_printed(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"whaled {__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sing"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_good_configuration_is_one_line(tmp_path: Path, ring: Path, capsys: Output) -> None:
    config = write(tmp_path / "w.yaml", f"auth: {{key_ring: {ring}}}\ndetection: {{threshold_btc: 250}}\n")
    assert main(["check-config", config]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "250 BTC" in out


def test_every_address_that_clients_connect_to_is_in_the_line(tmp_path: Path, ring: Path, capsys: Output) -> None:
    hosts = "gateway: {host: ['127.0.0.1', '::1']}\n"
    config = write(tmp_path / "w.yaml", f"auth: {{key_ring: {ring}}}\n{hosts}")
    assert main(["check-config", config]) == 0
    assert "clients at ws://127.0.0.1:8765, ws://[::1]:8765." in capsys.readouterr().out


def test_problems_that_do_not_prevent_a_start_are_warnings(
    tmp_path: Path, ring: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALED_SERVICE_HOST", "10.96.3.7")
    hosts = "gateway: {host: [127.0.0.1, 203.0.113.7]}\nhttp: {host: lo}\n"
    config = write(tmp_path / "w.yaml", f"auth: {{key_ring: {ring}}}\n{hosts}")
    assert main(["check-config", config]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    links, missing, interface = captured.err.splitlines()
    assert links == (
        "whaled: warning: environment: WHALED_SERVICE_HOST: ignored, Kubernetes sets them for a Service whose name "
        "begins with `whaled`; `enableServiceLinks: false` in the pod's spec prevents them"
    )
    assert missing == (
        f"whaled: warning: {config}:2: gateway.host: nobody can connect to 203.0.113.7: "
        "this machine has no such address"
    )
    assert interface == (
        f"whaled: warning: {config}:3: http.host: nobody can connect to lo: "
        "this is a network interface: write the address that it has"
    )


def test_every_rule_is_in_the_line_about_a_good_configuration(tmp_path: Path, ring: Path, capsys: Output) -> None:
    book = write(tmp_path / "book.csv", "Mine,bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4,own\n")
    rules = "threshold_usd: 5000000, watch: [{name: own, labels: [%s]}]"
    for label, status in (("Mine", 0), ("Mnie", 78)):
        config = write(
            tmp_path / "w.yaml",
            f"auth: {{key_ring: {ring}}}\ndetection: {{address_book: {book}, {rules % label}}}\n",
        )
        assert main(["check-config", config]) == status
    captured = capsys.readouterr()
    assert (
        f"whales from 100 BTC, from $5,000,000, of 1 watch rule. address book: 1 address of 1 owner in {book}."
        in captured.out
    )
    assert "detection.watch[0].labels[0]: no label 'Mnie' in" in captured.err
    assert "did you mean 'Mine'?" in captured.err


def test_a_bad_configuration_is_78_with_every_fault(tmp_path: Path, capsys: Output) -> None:
    config = write(tmp_path / "w.yaml", "gateway: {prot: 1}\nlog: {level: loud}\n")
    assert main(["check-config", config]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert "did you mean `port`" in captured.err


def test_files_the_configuration_names_are_checked_too(
    tmp_path: Path, certificate: tuple[Path, Path, Any], capsys: Output
) -> None:
    chain, _, _ = certificate
    book = write(tmp_path / "book.csv", "label,address,type\nx,not-an-address,exchange\n")
    config = write(
        tmp_path / "w.yaml",
        f"auth: {{key_ring: {tmp_path}/none.json}}\n"
        f"detection: {{address_book: {book}}}\n"
        f"gateway: {{tls: {{certificate: {chain}, private_key: {chain}}}}}\n",
    )
    assert main(["check-config", config]) == 78
    err = capsys.readouterr().err
    for expected in ("whaled keys generate", "book.csv: line 2", "gateway.tls"):
        assert expected in err


def test_the_effective_configuration_is_printed(tmp_path: Path, ring: Path, capsys: Output) -> None:
    config = write(tmp_path / "w.yaml", f"auth: {{key_ring: {ring}}}\nhttp: {{port: 1234}}\n")
    assert main(["check-config", "--print", config]) == 0
    assert f"port: 1234  # {config}:2" in capsys.readouterr().out


def test_keys_are_listed_without_their_secrets(ring: Path, capsys: Output) -> None:
    main(["keys", "generate", "--key-ring", str(ring)])
    new = capsys.readouterr().out.strip()
    assert main(["keys", "list", "--json", "--key-ring", str(ring)]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [key["state"] for key in listed] == ["verifies", "signs"]
    assert main(["keys", "retire", listed[0]["kid"], "--key-ring", str(ring)]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--key-ring", str(ring)]) == 0
    out = capsys.readouterr().out
    assert "retired" in out
    assert new in out
    for stored in json.loads(ring.read_text())["keys"]:
        assert stored["secret"] not in out


def test_commands_for_keys_answer_programs_too(ring: Path, capsys: Output) -> None:
    def ask(*arguments: str) -> Any:
        assert main(["keys", *arguments, "--json", "--key-ring", str(ring)]) == 0
        return json.loads(capsys.readouterr().out)

    new = ask("generate")
    assert new == {**new, "alg": "HS256", "state": "signs"}
    retired = ask("retire", new["kid"])
    assert (retired["kid"], retired["state"]) == (new["kid"], "retired")


def test_a_new_key_that_the_environment_overrides_causes_a_warning(
    ring: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBSOCKET_SECRET_KEY", "x" * 32)
    assert main(["keys", "generate", "--key-ring", str(ring)]) == 0
    assert "WEBSOCKET_SECRET_KEY is set here; wherever it is set, it overrides the key ring" in capsys.readouterr().err


def test_key_commands_print_the_next_step_and_report_a_created_directory(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "etc" / "keys.json"
    # The ring is a credential of the unit only where a drop-in, or the unit of an earlier version, says so.
    for source, verb in (("/etc/whaled/keys.json", "reload"), (str(path), "restart")):
        found = Unit("", {}, {"keys.json": source}, ())
        monkeypatch.setattr("whaled.cli.unit.installed", lambda found=found: found)
        capsys.readouterr()
        assert main(["keys", "generate", "--key-ring", str(path)]) == 0
        out, err = capsys.readouterr()
        assert (f"created the directory {path.parent}\n" in err) is (verb == "reload")
        assert err.endswith(f"it signs once whaled is started, or after: systemctl {verb} whaled\n")
        assert main(["keys", "retire", "--key-ring", str(path), out.strip(), "--force"]) == 0
        assert capsys.readouterr().err.endswith(f"after: systemctl {verb} whaled\n")


def test_retiring_the_last_key_is_refused(ring: Path, capsys: Output) -> None:
    kid = json.loads(ring.read_text())["keys"][0]["kid"]
    assert main(["keys", "retire", kid, "--key-ring", str(ring)]) == 78
    assert "--force" in capsys.readouterr().err


def test_a_token_alone_goes_to_standard_output_and_is_accepted(
    ring: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = ["token", "issue", "--client", "c1", "--permissions", "read,write", "--ttl", "24h", "--key-ring", str(ring)]
    assert main(issue) == 0
    captured = capsys.readouterr()
    token = captured.out.strip()
    assert token.count(".") == 2
    assert "c1: read, write" in captured.err
    assert main(["token", "inspect", token, "--key-ring", str(ring)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["claims"]["client_id"] == "c1"
    assert "accepted" in captured.err
    assert json.loads(ring.read_text())["keys"][0]["kid"] in captured.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(token.encode() + b"\n")))
    assert main(["token", "inspect", "-", "--key-ring", str(ring)]) == 0


def test_a_token_of_another_ring_is_shown_and_not_accepted(tmp_path: Path, ring: Path, capsys: Output) -> None:
    other = tmp_path / "other.json"
    main(["keys", "generate", "--key-ring", str(other)])
    capsys.readouterr()
    main(["token", "issue", "--client", "c1", "--key-ring", str(other)])
    token = capsys.readouterr().out.strip()
    assert main(["token", "inspect", token, "--key-ring", str(ring)]) == 1
    assert "not accepted" in capsys.readouterr().err
    assert main(["token", "inspect", "nonsense", "--key-ring", str(ring)]) == 1


def test_a_token_is_shown_without_a_key_ring_to_verify_it(tmp_path: Path, ring: Path, capsys: Output) -> None:
    main(["token", "issue", "--client", "c1", "--key-ring", str(ring)])
    token = capsys.readouterr().out.strip()
    assert main(["token", "inspect", token, "--key-ring", str(tmp_path / "none.json")]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["claims"]["client_id"] == "c1"
    assert "not verified" in captured.err


def test_the_file_that_issue_wrote_is_inspected_and_no_signature_is_shown(
    tmp_path: Path, ring: Path, capsys: Output
) -> None:
    path = tmp_path / "c1.token"
    assert issue_to(path, ring) == 0
    capsys.readouterr()
    token = path.read_text().strip()
    assert main(["token", "inspect", str(path), "--key-ring", str(ring)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["claims"]["client_id"] == "c1"
    assert captured.err.startswith("accepted: c1: read, until ")
    assert token.rpartition(".")[2] not in captured.out + captured.err


@pytest.mark.parametrize(
    "form", ["\ufeff{}\r\n", '"{}"', "Bearer {}", "export WHALED_TOKEN='{}'\n", '{{"token": "{}"}}']
)
def test_a_token_is_inspected_in_every_form_in_which_it_is_kept(
    tmp_path: Path, ring: Path, capsys: Output, form: str
) -> None:
    main(["token", "issue", "--client", "c1", "--key-ring", str(ring)])
    path = tmp_path / "t"
    path.write_text(form.format(capsys.readouterr().out.strip()))
    path.chmod(0o644)
    assert main(["token", "inspect", str(path), "--key-ring", str(ring)]) == 0
    assert f"warning: {path} can be read by every user of this machine (mode 0644)" in capsys.readouterr().err


def test_an_inspected_argument_that_is_not_a_token_is_named_and_not_quoted(
    tmp_path: Path, ring: Path, capsys: Output
) -> None:
    main(["token", "issue", "--client", "c1", "--key-ring", str(ring)])
    token = capsys.readouterr().out.strip()
    cases = {
        str(ring): f"whaled: {ring} is a key ring, which signs tokens and belongs to the server only",
        str(tmp_path / "none"): f"whaled: {tmp_path / 'none'}: No such file or directory",
        str(tmp_path): f"whaled: {tmp_path}: Is a directory",
        "s3cret" * 8: "whaled: the argument, which names no file, holds no token: expected a JWT",
        token[:-3]: "not accepted: bad_signature; it holds a damaged token: its signature has 40 characters, not 43",
    }
    for argument, message in cases.items():
        assert main(["token", "inspect", argument, "--key-ring", str(ring)]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert "s3cret" not in captured.err
        assert json.loads(ring.read_text())["keys"][0]["secret"] not in captured.out + captured.err


def test_an_expired_token_is_inspected_with_how_long_ago_it_ended(ring: Path, capsys: Output) -> None:
    secret = json.loads(ring.read_text())["keys"][0]
    key = base64.urlsafe_b64decode(secret["secret"] + "=")
    now = int(time.time())
    token = jwt.encode({"client_id": "c", "exp": now - 3600}, key, algorithm="HS256", headers={"kid": secret["kid"]})
    assert main(["token", "inspect", token, "--key-ring", str(ring)]) == 1
    assert re.search(r"not accepted: expired: `exp` was 36\d\d s ago", capsys.readouterr().err)


def hostile(claims: str) -> str:
    parts = ('{"alg":"HS256","kid":"\\u001b[31m"}', claims)
    return ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts) + ".AAAA"


@pytest.mark.parametrize("claims", ['{"client_id":"\\u001b[2J\\ud800\u202e"}', '{"exp":NaN}', '{"a":' + "[" * 3000])
def test_a_hostile_token_does_nothing_to_the_terminal(claims: str, ring: Path, capsys: Output) -> None:
    assert main(["token", "inspect", hostile(claims), "--key-ring", str(ring)]) == 1
    captured = capsys.readouterr()
    assert (captured.out + captured.err).replace("\n", " ").isprintable()
    assert (captured.out + captured.err).isascii()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--client", "c", "--permissions", "read,fly"], "found fly; allowed are read, write, admin"),
        (["--client", "c", "--ttl", "5"], "expected a duration"),
        ([], "--client"),
    ],
)
def test_a_token_that_makes_no_sense_is_a_usage_error(arguments: list[str], problem: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["token", "issue", *arguments])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def issue_to(path: Path, ring: Path, *more: str) -> int:
    return main(["token", "issue", "--client", "c1", "--key-ring", str(ring), "--output", str(path), *more])


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_token_in_a_file_is_for_its_owner_only(tmp_path: Path, ring: Path, capsys: Output, umask: int) -> None:
    path = tmp_path / "c1.token"
    old = os.umask(umask)
    try:
        assert issue_to(path, ring) == 0
    finally:
        os.umask(old)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "token for c1" in captured.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert main(["token", "inspect", path.read_text().strip(), "--key-ring", str(ring)]) == 0


@pytest.mark.parametrize("sort", ["file", "link", "dangling link", "directory", "pipe"])
def test_a_token_never_overwrites_a_file_or_follows_a_link(
    tmp_path: Path, ring: Path, capsys: Output, sort: str
) -> None:
    path, other = tmp_path / "c1.token", tmp_path / "other"
    if sort == "file":
        path.write_text("mine")
        path.chmod(0o644)
    elif sort == "directory":
        path.mkdir()
    elif sort == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    if sort == "link":
        other.write_text("mine")
    assert issue_to(path, ring) == 78
    assert "exists" in capsys.readouterr().err
    if sort in {"directory", "pipe"}:
        assert issue_to(path, ring, "--force") == 78
        return
    assert sort != "file" or path.read_text() == "mine"
    assert issue_to(path, ring, "--force") == 0
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().count(".") == 2
    assert other.exists() == (sort == "link")
    assert sort != "link" or other.read_text() == "mine"
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(
        {ring.name, "c1.token", *(["other"] if sort == "link" else [])}
    )


def test_a_token_that_cannot_be_written_is_an_error_with_its_reason(tmp_path: Path, ring: Path, capsys: Output) -> None:
    assert issue_to(tmp_path / "none" / "c1.token", ring) == 78
    assert "No such file or directory" in capsys.readouterr().err


def test_the_line_about_a_good_configuration_has_the_source_of_the_keys(
    tmp_path: Path, ring: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "w.yaml", f"auth: {{key_ring: {ring}}}\n")
    assert main(["check-config", config]) == 0
    assert f"authentication on, keys: {ring}" in capsys.readouterr().out
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    dotenv = tmp_path / "cwd" / ".env"
    dotenv.write_text("WEBSOCKET_SECRET_KEY=abcdefghijklmnopqrstuvwxyz012345\n")
    dotenv.chmod(0o600)
    assert main(["check-config", config]) == 0
    assert f"keys: WEBSOCKET_SECRET_KEY of {dotenv}" in capsys.readouterr().out
    dotenv.chmod(0o644)
    assert main(["check-config", config]) == 78
    assert "others can read" in capsys.readouterr().err


@pytest.mark.parametrize("ttl", ["91d", "0s"])
def test_a_token_that_lives_too_long_or_not_at_all_is_refused(ttl: str, ring: Path, capsys: Output) -> None:
    assert main(["token", "issue", "--client", "c", "--ttl", ttl, "--key-ring", str(ring)]) == 2
    captured = capsys.readouterr()
    assert "allowed is up to 90d (auth.max_token_ttl)" in captured.err
    assert captured.out == ""
