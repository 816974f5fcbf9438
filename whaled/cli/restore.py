"""`whaled restore`: put a backup in the event log's place."""

import argparse
import sys
import time
from pathlib import Path

from whaled.cli.progress import progress_line
from whaled.cli.settings import Subparsers, add_config_option, load_for
from whaled.errors import ExitStatus
from whaled.eventlog.restore import restore


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "restore",
        help="put a backup in the event log's place",
        description="Put a backup in the event log's place; stop whaled before. The log that was there is kept beside "
        "it. Clients' positions stay good only if that log proves that nothing was lost; otherwise a new epoch begins.",
        epilog="exit status: 0 done; 78 there is no FILE; 1 whaled runs, or FILE cannot be used, or the copy failed",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what `whaled backup` made; it stays as it is")
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Restore. Raises OperatorError or EventLogError."""
    path = Path(load_for(arguments).config.eventlog.path)
    with progress_line(sys.stderr, f"copying {arguments.file}") as progress:
        done = restore(arguments.file, path, now=time.time(), progress=progress)
    contents = done.contents
    if done.aside is not None:
        print(f"the log that was there is now {done.aside}")
    print(f"{path}: {contents.events} events, head {contents.head}, epoch {contents.epoch}")
    if done.renewed_because is None:
        print("epoch kept: the log that was there ends where the backup ends and holds the same events")
    else:
        print(f"new epoch: {done.renewed_because}. Clients are told that their position is gone (recovered: false)")
    return ExitStatus.STOPPED
