"""Fixtures shared by several test files."""

import ssl
from pathlib import Path

import pytest
import trustme
from hypothesis import settings

# The default limit of 200 ms per example assumes an otherwise idle machine. kit.fuzz finds inputs that are slow.
settings.register_profile("whaled", deadline=None)
settings.load_profile("whaled")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    """Return a certificate chain for localhost, its key, and a client context that trusts it."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    chain, key = directory / "chain.pem", directory / "key.pem"
    for pem in issued.cert_chain_pems:
        pem.write_to_path(str(chain), append=True)
    issued.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return chain, key, context


# --- backups of the event log, which tests/cli and tests/eventlog make ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for an event log, in a directory of its own."""
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "whaled.db"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A place for its backup, in another directory."""
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "whaled.backup"
