"""`whaled disconnect`: close connections of a running daemon."""

import argparse

from whaled.admin.views import Disconnected
from whaled.cli.admin import add_command, door
from whaled.cli.options import Subparsers
from whaled.errors import ExitStatus


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "disconnect",
        "close the connections of a client",
        "Close all connections of a client, or one connection. The client may connect again as long as its token is "
        "valid.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("client", nargs="?", metavar="CLIENT", help="client id, as `whaled clients` shows it")
    which.add_argument("--connection", type=int, metavar="N", help="number of one connection, likewise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Close connections. Raises WhaledError if the daemon does not run, refuses, or has no such connection."""
    wanted = {"client_id": arguments.client} if arguments.connection is None else {"connection": arguments.connection}
    count = door(arguments).post("/v1/disconnect", wanted, Disconnected).disconnected
    print(f"closed {count} connection{'s' * (count != 1)}")
    return ExitStatus.STOPPED
