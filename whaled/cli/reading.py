"""What commands share that read the event log, beside a daemon that may be writing it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.cli.settings import add_config_option, load_for
from whaled.errors import OperatorError
from whaled.eventlog.reader import Reader


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Which log."""
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")


@contextmanager
def reading(arguments: argparse.Namespace) -> Iterator[Reader]:
    """The log, open. Raises OperatorError or EventLogError."""
    settings = load_for(arguments).config.eventlog
    path = Path(settings.path).resolve()
    if not path.exists():
        raise OperatorError(f"{path}: there is no event log; name another with --db-path or --config")
    reader = Reader(path, settings.busy_timeout)
    try:
        reader.open()
        yield reader
    finally:
        reader.close()
