"""Fixtures: a booted systemd, and whaled installed in it. `make test-systemd` runs the tests that use them."""

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from systemd.lab import Lab, LabImpossibleError, booted

INSTALL_LIMIT_S = 120


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test that boots a lab, so that the suite that every machine can run excludes it."""
    if "lab" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.systemd)
        item.add_marker(pytest.mark.slow)


def cannot(reason: str) -> NoReturn:
    """Skip the test, or fail it where REQUIRE_SYSTEMD=1 states that the machine can run it."""
    if os.environ.get("REQUIRE_SYSTEMD") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Boot a real systemd on a temporary root, once per session."""
    try:
        with booted(tmp_path_factory.mktemp("lab")) as running:
            yield running
    except LabImpossibleError as reason:
        cannot(str(reason))


@pytest.fixture(scope="session")
def installed(lab: Lab) -> Lab:
    """Install whaled in the lab as an operator does, without starting it. The wheels must have been built outside."""
    python = os.environ.get("INSTALL_PYTHON", "/usr/bin/python3")
    found = lab.run(python, "-c", "import ensurepip, venv", check=False)
    if found.returncode != 0:
        cannot(f"{python} cannot make virtual environments (package python3-venv): {found.stderr.strip()}")
    if not any((lab.project / "dist" / "wheels").glob("whaled-*.whl")):
        cannot("no wheels: run `make wheels`, or the tests by `make test-systemd`")
    lab.run(
        "make", "-C", str(lab.project), "--old-file=dist/wheels", "install", f"INSTALL_PYTHON={python}",
        timeout=INSTALL_LIMIT_S,
    )  # fmt: skip
    lab.systemctl("daemon-reload")
    return lab
