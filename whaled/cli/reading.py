"""The parts shared by the commands that read the event log, which a daemon may be writing at the same time."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whaled.cli.settings import add_config_option, load_for
from whaled.errors import OperatorError
from whaled.eventlog import firstpage
from whaled.eventlog.backup import require_file
from whaled.eventlog.damage import Damage
from whaled.eventlog.rawfile import MAGIC
from whaled.eventlog.rows import Rows


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the event log."""
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")


def log_path(arguments: argparse.Namespace) -> Path:
    """Return the path of the event log.

    Raises OperatorError if the file does not exist or is not an event log, EventLogError if its first page is damaged.
    """
    path = Path(load_for(arguments).config.eventlog.path).resolve()
    require_file(path, "name the event log with --db-path or --config")
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin not in {b"", MAGIC} and not firstpage.is_sound(path):
        if firstpage.is_damaged(path):
            raise firstpage.damaged(path)
        raise OperatorError(f"{path}: this is not an event log; name one with --db-path or --config")
    return path


@contextmanager
def reading(arguments: argparse.Namespace) -> Iterator[Rows]:
    """Open the log for reading, and report damaged rows on exit. Raises OperatorError or EventLogError."""
    path = log_path(arguments)
    found: list[Damage] = []
    rows = Rows(path, load_for(arguments).config.eventlog.busy_timeout, found.append)
    try:
        with firstpage.named(path):
            rows.open()
            rows.require_tables()
        yield rows
    finally:
        rows.close()
    if found:
        count = sum(damage.rows for damage in found)
        print(
            f"whaled: {path}: {count} damaged row{'s' * (count > 1)} skipped, the first: {found[0].text}. "
            "`whaled check --deep` lists them all",
            file=sys.stderr,
        )
