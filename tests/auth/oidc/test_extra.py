from pathlib import Path

import pytest

from kit.issuers import issuer_settings
from whaled.auth.oidc import extra
from whaled.auth.oidc.extra import check_package
from whaled.cli.main import main
from whaled.config.sections import AuthSettings
from whaled.errors import ConfigError


def test_an_issuer_without_the_package_for_public_keys_is_a_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extra, "has_crypto", False)
    check_package(AuthSettings(), {})
    with pytest.raises(ConfigError, match=r"w.yaml:3: auth.issuers: needs the package cryptography: install `whaled"):
        check_package(AuthSettings(issuers=(issuer_settings(),)), {"auth.issuers": "w.yaml:3"})


@pytest.mark.parametrize("has_crypto", [True, False])
def test_check_config_finds_the_missing_package(
    has_crypto: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extra, "has_crypto", has_crypto)
    file = tmp_path / "whaled.yaml"
    issuer = "{name: corp, issuer: 'https://login.example.org', audience: whaled, read: [scope=r]}"
    file.write_text(f"auth:\n  enabled: false\n  issuers:\n    - {issuer}\n")
    assert main(["check-config", str(file)]) == (0 if has_crypto else 78)
    fault = f"{file}:4: auth.issuers: needs the package cryptography"
    assert (fault in capsys.readouterr().err) is not has_crypto
