"""Fixtures that several test files use."""

import ssl
from pathlib import Path

import pytest
import trustme
from hypothesis import settings

# The default of 200 ms an example is a bound on a machine that does nothing else; what is slow is found by fuzz_kit.
settings.register_profile("whaled", deadline=None)
settings.load_profile("whaled")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    """A certificate chain for localhost, its key, and a client context that trusts it."""
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
