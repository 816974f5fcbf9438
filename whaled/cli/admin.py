"""The parts shared by the commands that ask a running daemon over its admin socket."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from whaled.admin.door import Door
from whaled.admin.sockets import paths_of_daemon
from whaled.cli.options import Subparsers
from whaled.cli.settings import add_config_option, load_for


def add_command(subparsers: Subparsers, name: str, text: str, description: str) -> argparse.ArgumentParser:
    """Add a command with the options that select a daemon."""
    parser = subparsers.add_parser(
        name,
        help=text,
        description=description,
        epilog="exit status: 0 done; 78 not permitted; 1 no daemon runs, or it refused",
    )
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log of the daemon (eventlog.path)")
    parser.add_argument("--socket", type=Path, metavar="FILE", help="admin socket of the daemon (admin.socket)")
    return parser


def door(arguments: argparse.Namespace) -> Door:
    """Return the way to the daemon that the options name. Raises ConfigError."""
    if arguments.socket is not None:
        return Door([arguments.socket])
    config = load_for(arguments).config
    return Door(paths_of_daemon(config.admin, Path(config.eventlog.path)))


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def moment(at: float | None) -> str:
    """Return a time for people; a dash if there is none."""
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
