"""`whaled backup`: copy the event log while whaled runs."""

import argparse
import sys
import time
from pathlib import Path

from whaled.cli.options import Subparsers
from whaled.cli.progress import progress_line
from whaled.cli.settings import add_config_option, load_for
from whaled.errors import ExitStatus
from whaled.eventlog.backup import back_up


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "backup",
        help="copy the event log while whaled runs",
        description="Copy the event log as it is at this moment. whaled may be running and is not delayed. FILE "
        "appears once the copy is complete, checked and on the disk. `whaled restore` puts it back.",
        epilog="exit status: 0 done; 78 FILE exists, or there is no event log; 1 the log is damaged or cannot be "
        "copied",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the copy, on a file system with enough space")
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists, once the new copy is complete")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy the log. Raises OperatorError or EventLogError."""
    source = Path(load_for(arguments).config.eventlog.path)
    with progress_line(sys.stderr, f"copying {source}") as progress:
        done = back_up(source, arguments.file, now=time.time(), overwrite=arguments.force, progress=progress)
    contents = done.contents
    print(
        f"{arguments.file}: {contents.events} events, head {contents.head}, epoch {contents.epoch}, "
        f"{done.size_bytes / 2**20:.1f} MiB, {done.seconds:.1f} s"
    )
    if contents.missing:
        print(
            f"whaled: {source}: {contents.missing:,} events between are missing: the log is damaged. The copy is as "
            "good as the log; `whaled check --deep` lists what is damaged",
            file=sys.stderr,
        )
    return ExitStatus.STOPPED
