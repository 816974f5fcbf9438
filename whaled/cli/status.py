"""`whaled status`: the state of a running daemon on one screen."""

import argparse

from whaled.admin.views import Status
from whaled.cli.admin import add_command, door, moment, print_json
from whaled.cli.options import Subparsers
from whaled.cli.tail_lines import clean, duration
from whaled.errors import ExitStatus
from whaled.model import SAT_PER_BTC

MIB = 1024 * 1024


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "status", "show the state of a running daemon", "Show the state of a running daemon on one screen."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the state. Raises WhaledError if the daemon does not run or refuses."""
    status = door(arguments).get("/v1/status", Status)
    if arguments.json:
        print_json(status)
    else:
        for name, text in lines(status):
            print(f"{name:<12}{clean(text)}")
    return ExitStatus.STOPPED


def lines(status: Status) -> list[tuple[str, str]]:
    """Return the lines of the screen: a name and a text each."""
    clients = (
        f"{status.connections:,} of {status.connections_limit:,}, {status.authenticated:,} authenticated, "
        f"{status.replaying:,} replaying, {status.unsent_bytes:,} bytes unsent"
    )
    limit = status.memory_limit_bytes
    memory = f"{status.memory_used_bytes / MIB:,.0f} MiB" + (f" of {limit / MIB:,.0f} MiB" if limit else ", no limit")
    whale = status.last_whale
    reload = moment(status.last_reload_at)
    if status.last_reload_problem is not None:
        reload += f", refused: {status.last_reload_problem}"
    return [
        ("whaled", f"{status.version}, process {status.pid}" + (", stopping" if status.is_stopping else "")),
        ("uptime", f"{duration(max(0.0, status.now - status.started_at))}, since {moment(status.started_at)}"),
        ("upstream", status.upstream.value + (f" ({status.shortfall})" if status.shortfall is not None else "")),
        ("listen", ", ".join(status.addresses)),
        ("event log", status.event_log),
        ("epoch", status.epoch),
        ("head", f"{status.head:,}, oldest {status.oldest:,}"),
        ("clients", clients),
        ("memory", memory + (", short: load is shed" if status.is_short_of_memory else "")),
        (
            "last whale",
            "-" if whale is None else f"{moment(whale.at)}, {whale.value_sat / SAT_PER_BTC:,.2f} BTC, {whale.txid}",
        ),
        (
            "canary",
            f"{'arrives' if status.canary_arrives else 'LATE'}, last {duration(status.canary_arrived_s_ago)} ago",
        ),
        ("last reload", reload),
    ]
