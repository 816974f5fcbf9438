"""`whaled check`: look for damage in the event log."""

import argparse
import sys
import time
from pathlib import Path

import msgspec

from whaled.cli.options import Subparsers
from whaled.cli.progress import progress_line
from whaled.cli.reading import add_log_options, log_path
from whaled.errors import ExitStatus
from whaled.eventlog import files
from whaled.eventlog.damage import Table
from whaled.eventlog.inspection import Inspected, inspect

SHOWN = 20


class Finding(msgspec.Struct, frozen=True):
    """Damaged rows, for --json. `first` and `through` are offsets, 0 for rows that are not events."""

    table: Table
    row: str
    problem: str
    first: int
    through: int


class Report(msgspec.Struct, frozen=True):
    """The output of --json. `rows_read` is 0 without --deep."""

    path: str
    is_whole: bool
    is_deep: bool
    schema_version: int
    epoch: str | None
    oldest: int
    head: int
    size_bytes: int
    rows_read: int
    events_without_checksum: int
    damaged_rows: int
    damages: list[Finding]
    file_faults: list[str]
    gaps: list[tuple[int, int]]
    seconds: float


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check",
        help="look for damage in the event log",
        description="Look for damage in the event log, or in a backup of it (--db-path FILE). Changes nothing, and "
        "whaled may be running. Without --deep, checks the structure of the file and that no event is missing, which "
        "takes seconds for a million events, or minutes from a cold disk. `whaled repair` removes the damaged rows.",
        epilog="exit status: 0 no damage found; 1 the log is damaged or cannot be read; 78 there is no event log",
    )
    add_log_options(parser)
    parser.add_argument(
        "--deep", action="store_true", help="also verify the checksum of every row, and every index entry"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all findings")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the log and print the findings. Raises OperatorError or EventLogError."""
    path = log_path(arguments)
    began = time.perf_counter()
    with progress_line(sys.stderr, f"reading {path}") as progress:
        found = inspect(path, progress, is_deep=arguments.deep)
    seconds = time.perf_counter() - began
    if arguments.json:
        report = _report(path, found, is_deep=arguments.deep, seconds=seconds)
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        print_findings(path, found)
        print(_verdict(found, is_deep=arguments.deep, seconds=seconds))
    return ExitStatus.STOPPED if found.is_whole else ExitStatus.FAILED


def print_findings(path: Path, found: Inspected) -> None:
    """Print the contents of the log, and one line for each of the first SHOWN findings."""
    counter = found.counter
    held = f"offsets {found.oldest} to {counter.head}"
    if found.oldest > counter.head:
        held = f"no events, newest offset {counter.head}"
    print(f"{path}: {held}, epoch {counter.epoch or 'unknown'}, {files.size_bytes(path) / 2**20:.1f} MiB")
    for first, through in found.gaps:
        removed = f"offset {first} was" if first == through else f"offsets {first} to {through} were"
        print(f"gap: {removed} removed by an earlier repair")
    for fault in found.structure:
        for line in fault.splitlines():
            print(f"file: {line}")
    for damage in found.damages[:SHOWN]:
        print(f"{damage.table.value}: {damage.text}")
    if len(found.damages) > SHOWN:
        print(f"... and {len(found.damages) - SHOWN:,} more findings; --json lists them")


def _verdict(found: Inspected, *, is_deep: bool, seconds: float) -> str:
    if not found.is_whole:
        return (
            f"damaged: {damaged(found)}. Stop whaled; `whaled repair` removes what is damaged, saves the rest and "
            "keeps the damaged file"
        )
    if not is_deep:
        return f"no damage found in the structure, no event is missing ({seconds:.1f} s); --deep reads every row"
    unverified = (
        f", {found.unverified:,} events have none (written before schema version 4)" if found.unverified else ""
    )
    return f"no damage: {found.rows:,} rows match their checksums{unverified} ({seconds:.1f} s)"


def damaged(found: Inspected) -> str:
    """Describe how much is damaged."""
    parts = [f"{found.damaged:,} row{'s' * (found.damaged != 1)}"] if found.damaged else []
    if found.structure:
        parts.append("the structure of the file")
    return " and ".join(parts)


def _report(path: Path, found: Inspected, *, is_deep: bool, seconds: float) -> Report:
    return Report(
        path=str(path),
        is_whole=found.is_whole,
        is_deep=is_deep,
        schema_version=found.version,
        epoch=found.counter.epoch or None,
        oldest=found.oldest,
        head=found.counter.head,
        size_bytes=files.size_bytes(path),
        rows_read=found.rows,
        events_without_checksum=found.unverified,
        damaged_rows=found.damaged,
        damages=[Finding(each.table, each.row, each.problem, each.first, each.through) for each in found.damages],
        file_faults=found.structure,
        gaps=list(found.gaps),
        seconds=round(seconds, 3),
    )
