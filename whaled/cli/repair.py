"""`whaled repair`: remove damaged rows from the event log."""

import argparse
import sys
import time

from whaled.cli.check import print_findings
from whaled.cli.options import Subparsers
from whaled.cli.progress import progress_line
from whaled.cli.reading import add_log_options, log_path
from whaled.errors import ExitStatus
from whaled.eventlog.repair import Repaired, rehearse, repair
from whaled.eventlog.salvage import Outcome, Salvaged

NOTHING = "nothing to repair: every row matches its checksum"


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "repair",
        help="remove damaged rows from the event log",
        description="Write the intact rows of the event log into a new file, which then replaces the log. Stop whaled "
        "first. Rows around a damaged page are saved. The damaged log is kept in the same directory "
        "(FILE.damaged-TIME), with a list of the lost rows (FILE.damaged-TIME.jsonl). Needs as much disk space as the "
        "log; --dry-run needs it in the directory for temporary files. Epoch and offsets are kept: a client that "
        "resumes across removed rows is informed that it missed events, all others resume as before. Without damage, "
        "nothing is changed.",
        epilog="exit status: 0 repaired, or nothing to repair; 1 whaled is running, nothing can be saved, or the disk "
        "is full; with --dry-run: the log is damaged; 78 there is no event log",
    )
    add_log_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed; whaled may be running")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair the log. Raises OperatorError or EventLogError."""
    path = log_path(arguments)
    with progress_line(sys.stderr, f"reading {path}") as progress:
        do = rehearse if arguments.dry_run else repair
        done = do(path, now=time.time(), progress=progress)
    print_findings(path, done.inspected)
    if done.salvaged is None:
        print(NOTHING)
        return ExitStatus.STOPPED
    for outcome in done.salvaged.outcomes:
        print(_of_table(outcome))
    print(_summary(done, done.salvaged, is_done=not arguments.dry_run))
    if arguments.dry_run:
        return ExitStatus.FAILED
    if done.salvaged.is_renewed:
        print(
            f"new epoch {done.salvaged.epoch}, after offset {done.salvaged.head}: the old one is unknown. Clients "
            "receive recovered: false once"
        )
    else:
        print("epoch kept: clients that resume across removed events receive recovered: false, all others resume")
    return ExitStatus.STOPPED


def _of_table(outcome: Outcome) -> str:
    unverified = f" ({outcome.unverified:,} of them by an index, without checksums)" if outcome.unverified else ""
    before, more = "before", ""
    if not outcome.is_known:
        before, more = "known", "; more may be lost: which ones cannot be read"
    return (
        f"{outcome.table.value}: {outcome.saved + outcome.lost:,} rows {before}, {outcome.saved:,} saved{unverified}, "
        f"{outcome.lost:,} lost{more}"
    )


def _summary(done: Repaired, salvaged: Salvaged, *, is_done: bool) -> str:
    verb = "removed" if is_done else "would be removed"
    parts = [f"{verb}: {salvaged.lost:,} row{'s' * (salvaged.lost != 1)}"]
    if done.inspected.structure:
        parts.append(f"the structure of the file {'is' if is_done else 'would be'} rebuilt")
    if not is_done:
        return "; ".join(parts)
    is_empty = not salvaged.lost and all(each.is_known for each in salvaged.outcomes)
    listed = f"{done.taken_out} {'is empty' if is_empty else 'lists each row that is lost'}"
    return f"{'; '.join(parts)}. The damaged log is now {done.aside}, {listed}"
