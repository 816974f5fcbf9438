"""`whaled coverage`: how many whales of each block were alerted before it."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Table

from whaled.cli.options import Subparsers
from whaled.cli.reading import add_log_options, reading
from whaled.errors import ExitStatus, OperatorError
from whaled.model import Scan

BLOCKS_SHOWN = 20
BLOCKS_LIMIT = 1_000_000


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "coverage",
        help="show how many whales of each block were known before it",
        description="Show for each scanned block, newest first: its number of whales, how many of them were alerted "
        "before it, and the median lead time; how many alerts were late; and how many whales were missed until the "
        "block was scanned, because whaled or its link was down, because of a gap in the stream, or because the "
        "backend never published them (unrelayed). Blocks that are not scanned yet or were skipped "
        "(backfill.max_blocks) are counted. whaled may be running.",
    )
    add_log_options(parser)
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS_SHOWN, metavar="N", help="number of blocks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per block")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises OperatorError or EventLogError."""
    if not 1 <= arguments.blocks <= BLOCKS_LIMIT:
        raise OperatorError(f"--blocks: found {arguments.blocks}, expected a number from 1 to {BLOCKS_LIMIT}")
    with reading(arguments) as reader:
        scans = reader.newest_scans(arguments.blocks)
        unscanned = reader.unscanned()
    if arguments.json:
        for scan in scans:
            sys.stdout.write(msgspec.json.encode(scan).decode() + "\n")
    elif scans:
        Console().print(_table(scans, *unscanned))
    else:
        print("no block scanned yet: whaled begins with the first block after its first start")
    return ExitStatus.STOPPED


def _table(scans: Sequence[Scan], unscanned: int, oldest: int) -> Table:
    """Return the table of scans. `unscanned` counts the blocks since the oldest scanned one that were not scanned."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("block", "mined (UTC)", "whales", "seen", "lead", "late", "down", "gap", "unrelayed"):
        table.add_column(title, justify="left" if title.startswith("mined") else "right", no_wrap=True)
    above: int | None = None
    for scan in scans:
        hole = 0 if above is None else above - scan.height - 1
        if hole:
            table.add_row("...", f"{hole:,} not scanned")
        above = scan.height
        table.add_row(
            f"{scan.height:,}",
            datetime.fromtimestamp(scan.mined_at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            *map(str, (_whales(scan), scan.seen)),
            "" if scan.lead_s is None else f"{scan.lead_s:.0f} s",
            *map(str, (scan.late, scan.missed_down, scan.missed_gap, scan.missed_never_relayed)),
        )
    whales = sum(map(_whales, scans))
    seen = sum(scan.seen for scan in scans)
    table.caption = (
        f"{_count(len(scans), 'block')}, {_count(whales, 'whale')}, {seen:,} known before their block"
        + (f" ({seen / whales:.1%})" if whales else "")
        + (f"; {unscanned:,} not scanned since block {oldest:,}" if unscanned else "")
    )
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _whales(scan: Scan) -> int:
    return scan.seen + scan.late + scan.missed_down + scan.missed_gap + scan.missed_never_relayed
