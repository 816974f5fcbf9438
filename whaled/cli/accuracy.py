"""`whaled accuracy`: how well urgency and predicted block matched the actual confirmation."""

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from whaled.cli import tail_lines
from whaled.cli.options import Subparsers, duration
from whaled.cli.reading import add_log_options, reading
from whaled.errors import ExitStatus
from whaled.whales.accuracy import BANDS, Band, band, bands


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "accuracy",
        help="show how accurate urgencies and predicted blocks were",
        description="Compare predictions with outcomes, by urgency, for the whales that were alerted unconfirmed and "
        "have been confirmed since: how many were confirmed in the predicted block, before it and after it; by how "
        "many blocks the prediction was off (10th to 90th percentile); and how long after the alert they were "
        "confirmed (median and 90th percentile). Unconfirmed whales are not counted. whaled may be running.",
    )
    add_log_options(parser)
    parser.add_argument(
        "--last", type=duration, metavar="TIME", help="only whales confirmed in the last 24h, 7d, ... (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per urgency band")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises OperatorError or EventLogError."""
    since = 0.0 if arguments.last is None else time.time() - arguments.last
    with reading(arguments) as reader:
        outcomes = reader.outcomes(since)
    found = bands(outcomes)
    if arguments.json:
        for each in found:
            sys.stdout.write(msgspec.json.encode(each).decode() + "\n")
    elif found:
        Console().print(_table(found, band(None, outcomes)))
    else:
        print("no whale that was alerted before its block was confirmed in this time")
    return ExitStatus.STOPPED


def _table(found: Sequence[Band], together: Band) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=True)
    rows = [(_name(each), *_cells(each)) for each in found]
    titles = ("urgency", "whales", "predicted", "on time", "early", "late", "off", "wait", "90 %")
    for title, footer in zip(titles, ("all", *_cells(together)), strict=True):
        table.add_column(title, footer, justify="left" if title == "urgency" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _name(each: Band) -> str:
    if each.urgency is None:
        return "unknown"
    place = BANDS.index(each.urgency)
    return f"{each.urgency:.2f} - {1 if place == 0 else BANDS[place - 1]:.2f}"


def _cells(each: Band) -> tuple[str, ...]:
    shares = (
        f"{part / each.predicted:.0%}" if each.predicted else "" for part in (each.on_time, each.early, each.late)
    )
    off = "" if each.off_low is None else f"{each.off_low:+d} .. {each.off_high:+d}".replace("+0", "0")
    waits = ("" if wait_s is None else tail_lines.duration(wait_s) for wait_s in (each.wait_median_s, each.wait_high_s))
    return (f"{each.whales:,}", f"{each.predicted:,}", *shares, off, *waits)
