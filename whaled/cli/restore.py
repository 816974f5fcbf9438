"""`whaled restore`: replace the event log with a backup."""

import argparse
import sys
import time
from pathlib import Path

from whaled.cli.options import Subparsers
from whaled.cli.progress import progress_line
from whaled.cli.settings import add_config_option, load_for
from whaled.errors import ExitStatus
from whaled.eventlog.restore import restore


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "restore",
        help="replace the event log with a backup",
        description="Replace the event log with a backup. Stop whaled first. The previous log is kept in the same "
        "directory. Clients' positions stay valid only if the previous log proves that no event was lost; otherwise a "
        "new epoch begins.",
        epilog="exit status: 0 done; 78 FILE does not exist; 1 whaled is running, FILE cannot be used, or the copy "
        "failed",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a copy made by `whaled backup`; it is not changed")
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Restore the backup. Raises OperatorError or EventLogError."""
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
        gone = "Each client receives recovered: false once, since its position is no longer valid"
        print(f"new epoch: {done.renewed_because}. {gone}")
    return ExitStatus.STOPPED
