"""`check-config` of the file of whaled.service shows what the service will serve: what its units set, and listen on."""

import ssl
import stat
from pathlib import Path

import pytest

from whaled.cli import unit
from whaled.cli.main import main

CONFIG = "auth: {enabled: false}\n"
# As systemd 252 writes it.
SHOWN = """\
ExecStart={{ path=/opt/w/bin/python ; argv[]=/opt/w/bin/python -P -m whaled run --config {config} ; \
ignore_errors=no ; start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }}
Environment=PYTHONUNBUFFERED=1 {variables}
EnvironmentFiles={file} (ignore_errors=yes)
LoadState=loaded
"""
TLS = (
    "WHALED_GATEWAY_TLS_CERTIFICATE=/run/credentials/whaled.service/tls-certificate.pem "
    "WHALED_GATEWAY_TLS_PRIVATE_KEY=/run/credentials/whaled.service/tls-private-key.pem"
)
DEFAULT_SOCKET = ("127.0.0.1:8765",)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration, and a directory for programs that comes first."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    path = tmp_path / "whaled.yaml"
    path.write_text(CONFIG)
    return path


def systemd(
    config: Path,
    *,
    variables: str = "",
    credentials: str = "",
    listens: tuple[str, ...] = DEFAULT_SOCKET,
    used: Path | None = None,
) -> None:
    """A `systemctl` that tells of these units."""
    there = config.parent
    shown = SHOWN.format(config=used or config, variables=variables, file=there / "environment")
    (there / "service").write_text(shown)
    (there / "cat").write_text(f"# /etc/systemd/system/whaled.service\n[Service]\n{credentials}")
    (there / "socket").write_text("".join(f"Listen={each} (Stream)\n" for each in listens) + "LoadState=loaded\n")
    program = there / "bin" / "systemctl"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in\n*" cat "*) cat {there}/cat ;;\n*whaled.service*) cat {there}/service ;;\n'
        f"*whaled.socket*) cat {there}/socket ;;\nesac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def said(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["check-config", *options, str(config)]) == 0
    return capsys.readouterr().out


def credentials(certificate: str, key: str) -> str:
    return f"LoadCredential=tls-certificate.pem:{certificate}\nLoadCredential=tls-private-key.pem:{key}\n"


def test_units_that_change_nothing_are_not_mentioned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systemd(config)
    assert "clients at ws://127.0.0.1:8765. authentication OFF" in said(config, capsys)


def test_tls_from_the_units_credentials_is_reported(
    config: Path, capsys: pytest.CaptureFixture[str], certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    chain, key, _ = certificate
    systemd(config, variables=TLS, credentials=credentials(str(chain), str(key)))
    expected = (
        "as whaled.service clients at wss://127.0.0.1:8765 (set by the unit: gateway.tls.certificate, "
        "gateway.tls.private_key)"
    )
    assert f"clients at ws://127.0.0.1:8765. {expected}. authentication OFF" in said(config, capsys)
    assert said(config, capsys, "--print").endswith(f"# {expected}\n")


def test_a_certificate_that_is_not_there_is_a_fault(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systemd(config, variables=TLS, credentials=credentials("/nowhere/a.pem", "/nowhere/b.pem"))
    assert main(["check-config", str(config)]) == 78
    assert "whaled.service: gateway.tls: cannot use /nowhere/a.pem with /nowhere/b.pem" in capsys.readouterr().err


def test_the_sockets_addresses_count(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systemd(config, listens=("0.0.0.0:8443", "[::]:8443", "/run/whaled.sock"))
    assert (
        "as whaled.service clients at ws://0.0.0.0:8443, ws://[::]:8443, ws:///run/whaled.sock (whaled.socket listens)"
        in said(config, capsys)
    )


def test_a_variable_of_an_environment_file_counts_and_a_wrong_one_is_a_fault(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systemd(config)
    (config.parent / "environment").write_text("WHALED_DETECTION_THRESHOLD_BTC=50\nOTHER=1\n")
    assert "(set by the unit: detection.threshold_btc)" in said(config, capsys)
    (config.parent / "environment").write_text("WHALED_DETECTION_THRESHOLDS_BTC=50\n")
    assert main(["check-config", str(config)]) == 78
    assert "WHALED_DETECTION_THRESHOLDS_BTC" in capsys.readouterr().err


def test_another_file_than_the_services_is_judged_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = config.with_name("other.yaml")
    other.write_text(CONFIG)
    systemd(config, variables=TLS, used=other)
    assert "whaled.service" not in said(config, capsys)


@pytest.mark.parametrize(
    "program", ["exit 1", "echo LoadState=not-found", "echo 'Environment=\"'; echo LoadState=loaded"]
)
def test_without_units_the_configuration_is_judged_alone(
    config: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    systemd(config)
    (config.parent / "bin" / "systemctl").write_text(f"#!/bin/sh\n{program}\n")
    assert "whaled.service" not in said(config, capsys)


def test_a_systemd_that_does_not_answer_does_not_delay_the_check(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd(config)
    (config.parent / "bin" / "systemctl").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(unit, "LIMIT_S", 0.05)
    assert "whaled.service" not in said(config, capsys)
