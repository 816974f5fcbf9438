"""`whaled keys rotate`, `public` and `list`; tests/cli/test_main.py has the other commands."""

import asyncio
import json
from pathlib import Path

import pytest

from kit import daemon
from whaled.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    ring = tmp_path / "keys.json"
    assert main(["keys", "generate", "--key-ring", str(ring)]) == 0
    auth = {"enabled": True, "key_ring": str(ring), "max_token_ttl": "2h", "token_ttl": "1h"}
    return daemon.write_config(tmp_path, "ws://127.0.0.1:1", auth=auth)


def spoiled(config: Path) -> Path:
    """Make the daemon's configuration invalid; return a copy from before."""
    before = config.read_text()
    config.write_text(before.replace("max_token_ttl: 2h", "max_token_ttl: 2h\n  leeway: 1d"))
    fine = config.with_name("fine.yaml")
    fine.write_text(before)
    return fine


def listed(config: Path, capsys: Output) -> list[dict[str, str | None]]:
    capsys.readouterr()
    assert main(["keys", "list", "--json", "--config", str(config)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_rotation_without_a_daemon_changes_the_file_and_reports_both_keys(config: Path, capsys: Output) -> None:
    old = listed(config, capsys)[0]["kid"]
    assert main(["keys", "rotate", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert f"key {out.strip()} added to" in err
    assert f"key {old} verifies until " in err
    assert "auth.max_token_ttl is 2h" in err
    assert err.endswith("the key is in force from its next start\n")
    assert [(key["kid"], key["state"]) for key in listed(config, capsys)] == [(old, "verifies"), (out.strip(), "signs")]
    assert main(["keys", "list", "--config", str(config)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert ", until 2" in first
    assert "until" not in second


def test_a_rotation_of_a_missing_or_malformed_ring_is_one_error(config: Path, capsys: Output) -> None:
    ring = config.parent / "keys.json"
    for body in (None, "{}", '{"version": 2}', '{"version":1,"keys":[{"kid":"k"}]}'):
        ring.unlink()
        if body is not None:
            ring.write_text(body)
            ring.chmod(0o600)
        capsys.readouterr()
        assert main(["keys", "rotate", "--config", str(config)]) == 78
        out, err = capsys.readouterr()
        assert out == ""
        assert str(ring) in err
        assert err.count("\n") == 1
        ring.write_text("")


def test_public_keys_are_printed_and_a_ring_without_any_is_noted(config: Path, capsys: Output) -> None:
    capsys.readouterr()
    assert main(["keys", "public", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"keys": []}
    assert "has no EdDSA key" in err
    assert main(["keys", "rotate", "--algorithm", "EdDSA", "--no-reload", "--config", str(config)]) == 0
    kid = capsys.readouterr().out.strip()
    assert main(["keys", "public", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    (key,) = json.loads(out)["keys"]
    assert (key["kid"], key["crv"], err) == (kid, "Ed25519", "")
    for stored in json.loads((config.parent / "keys.json").read_text())["keys"]:
        assert stored["secret"] not in out


async def test_a_rotation_reaches_a_running_daemon_and_reports_one_that_does_not_use_it(
    config: Path, tmp_path: Path, capsys: Output
) -> None:
    async with daemon.running(config) as whaled:
        pid = whaled.process.pid
        capsys.readouterr()
        assert await asyncio.to_thread(main, ["keys", "rotate", "--algorithm", "EdDSA", "--config", str(config)]) == 0
        out, err = capsys.readouterr()
        assert err.endswith(f"process {pid} signs with key {out.strip()}; nobody was disconnected\n")
        assert await daemon.metric(whaled.http, "whaled_signing_keys") == 2

        other = ["--key-ring", str(tmp_path / "another.json")]
        assert main(["keys", "generate", *other]) == 0
        capsys.readouterr()
        assert await asyncio.to_thread(main, ["keys", "rotate", *other, "--config", str(config)]) == 78
        assert f"process {pid} has reloaded, but does not sign with key" in capsys.readouterr().err

        fine = spoiled(config)
        assert await asyncio.to_thread(main, ["keys", "rotate", "--config", str(fine)]) == 78
        err = capsys.readouterr().err
        assert f"process {pid} refused the reload and still has its old keys" in err
        assert "auth.leeway" in err
