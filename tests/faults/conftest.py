"""Hooks of the fault scenarios: their counts are printed at the end of a run."""

import time

import msgspec
import pytest

from faults.rig import COUNTS, Counts

_begun_at = time.time()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each scenario of this run, including those of other worker processes."""
    files = [path for path in sorted(COUNTS.glob("*.json")) if path.stat().st_mtime >= _begun_at]
    if files:
        terminalreporter.section("fault scenarios: what was sent and what came of it")
        for path in files:
            terminalreporter.write_line(msgspec.json.decode(path.read_bytes(), type=Counts).line())
