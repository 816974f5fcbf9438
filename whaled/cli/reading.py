"""What commands share that read the event log, beside a daemon that may be writing it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.cli.settings import add_config_option, load_for
from whaled.errors import OperatorError
from whaled.eventlog.backup import require_file
from whaled.eventlog.reader import Reader

# With which every SQLite database begins; an event log that is damaged further on is told as such.
SQLITE_HEADER = b"SQLite format 3\0"


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Which log."""
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")


@contextmanager
def reading(arguments: argparse.Namespace) -> Iterator[Reader]:
    """The log, open. Raises OperatorError or EventLogError."""
    settings = load_for(arguments).config.eventlog
    path = Path(settings.path).resolve()
    require_file(path, "name the event log with --db-path or --config")
    with path.open("rb") as file:
        if file.read(len(SQLITE_HEADER)) not in {b"", SQLITE_HEADER}:
            raise OperatorError(f"{path}: this is no event log; name one with --db-path or --config")
    reader = Reader(path, settings.busy_timeout)
    try:
        reader.open()
        yield reader
    finally:
        reader.close()
