"""The access database for commands, which work whether whaled runs or not."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.auth.store import Direct, beside, open_directly
from whaled.cli.settings import load_for
from whaled.errors import OperatorError

# The origin of an act, for the audit log.
ORIGIN = "this machine"


def actor() -> str:
    """Return who runs this command, for the audit log."""
    return f"command line uid {os.getuid()}"


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Direct]:
    """Open the database beside the configured event log. Raises OperatorError if there is neither."""
    event_log = Path(load_for(arguments).config.eventlog.path)
    path = beside(event_log)
    if not (os.path.lexists(path) or os.path.lexists(event_log)):
        # A new database at a wrong place would take revocations and keys that no daemon ever reads.
        raise OperatorError(f"{event_log}: there is no event log here; name it with --config or --db-path")
    with open_directly(path) as database:
        yield Direct(database)
