"""`whaled repair`: take damaged rows out of the event log."""

import argparse
import sys
import time
from pathlib import Path

from whaled.cli.check import damaged, print_findings
from whaled.cli.progress import progress_line
from whaled.cli.reading import add_log_options, log_path
from whaled.cli.settings import Subparsers
from whaled.errors import ExitStatus
from whaled.eventlog.inspection import Inspected, inspect
from whaled.eventlog.repair import repair

NOTHING = "nothing to repair: every row is what was written"


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "repair",
        help="take damaged rows out of the event log",
        description="Read every row of the event log, write those that are intact into a new file, and put that in "
        "its place; stop whaled before. The damaged log is kept beside it (FILE.damaged-TIME), and what was taken out "
        "is listed (FILE.damaged-TIME.jsonl). It needs as much room as the log. Epoch and offsets stay: a client that "
        "resumes across what was taken out is answered that it missed something, all others resume as before. If "
        "nothing is damaged, nothing is changed.",
        epilog="exit status: 0 repaired, or nothing to repair; 1 whaled runs, nothing can be saved, or the disk is "
        "full; with --dry-run: something is damaged; 78 there is no event log",
    )
    add_log_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would be taken out; whaled may run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair. Raises OperatorError or EventLogError."""
    path = log_path(arguments)
    with progress_line(sys.stderr, f"reading {path}") as progress:
        if arguments.dry_run:
            return _print_plan(path, inspect(path, progress, is_deep=True))
        done = repair(path, now=time.time(), progress=progress)
    found = done.inspected
    print_findings(path, found)
    if found.is_whole:
        print(NOTHING)
        return ExitStatus.STOPPED
    print(f"repaired: {damaged(found)}. The damaged log is now {done.aside}, what was taken out {done.taken_out}")
    if done.is_renewed:
        print(f"new epoch {done.epoch}: the old one is not known. Clients are answered recovered: false once")
    else:
        print("epoch kept: clients that resume across what was taken out are answered recovered: false, others resume")
    return ExitStatus.STOPPED


def _print_plan(path: Path, found: Inspected) -> int:
    print_findings(path, found)
    print(NOTHING if found.is_whole else f"would be repaired: {damaged(found)}")
    return ExitStatus.STOPPED if found.is_whole else ExitStatus.FAILED
