"""Fixtures: a booted systemd, and whaled installed in it. `make test-systemd` runs what uses them."""

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from systemd.lab import Lab, LabImpossibleError, booted

INSTALL_LIMIT_S = 120


def pytest_itemcollected(item: pytest.Item) -> None:
    """Whatever boots a lab is no part of the suite that every machine can run."""
    if "lab" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.systemd)
        item.add_marker(pytest.mark.slow)


def cannot(reason: str) -> NoReturn:
    """Skip, unless this is a machine that was said to be able to."""
    if os.environ.get("REQUIRE_SYSTEMD") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A real systemd over a throw-away root, booted once."""
    try:
        with booted(tmp_path_factory.mktemp("lab")) as running:
            yield running
    except LabImpossibleError as reason:
        cannot(str(reason))


@pytest.fixture(scope="session")
def installed(lab: Lab) -> Lab:
    """The lab with whaled installed as an operator does it, and not started. The wheels are made before, out here."""
    python = os.environ.get("INSTALL_PYTHON", "/usr/bin/python3")
    asked = lab.run(python, "-c", "import ensurepip, venv", check=False)
    if asked.returncode != 0:
        cannot(f"{python} cannot make virtual environments (package python3-venv): {asked.stderr.strip()}")
    if not any((lab.project / "dist" / "wheels").glob("whaled-*.whl")):
        cannot("no wheels: run `make wheels`, or the tests by `make test-systemd`")
    lab.run(
        "make", "-C", str(lab.project), "--old-file=dist/wheels", "install", f"INSTALL_PYTHON={python}",
        timeout=INSTALL_LIMIT_S,
    )  # fmt: skip
    lab.systemctl("daemon-reload")
    return lab
