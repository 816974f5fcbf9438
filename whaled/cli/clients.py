"""`whaled clients`: the connections of a running daemon."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from whaled.admin.door import Door
from whaled.admin.views import Client, Clients
from whaled.cli.admin import add_command, door, moment, print_json
from whaled.cli.options import Subparsers
from whaled.cli.tail_lines import clean
from whaled.errors import ExitStatus

WATCH_S = 2.0
# Moves the cursor to the top and clears the terminal.
CLEAR = "\x1b[H\x1b[2J"
PAGE = 500
# A daemon has at most as many connections as descriptors; a server that sends pages forever is not whaled's.
MOST_PAGES = 10_000
COLUMNS = ("connection", "client", "address", "since", "delivery", "position", "lag", "unsent", "budget", "filter")


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "clients",
        "list the connections of a running daemon",
        "List the connections of a running daemon: client, address, since when, delivery, position, lag in events, "
        "unsent bytes, messages left before the rate limit, and filter.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per connection")
    parser.add_argument("--watch", action="store_true", help=f"list again every {WATCH_S:g} s, until interrupted")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list. Raises WhaledError if the daemon does not run or refuses."""
    way = door(arguments)
    while True:
        found = list(all_clients(way))
        if arguments.json:
            for client in found:
                print_json(client)
        else:
            print(CLEAR if arguments.watch and sys.stdout.isatty() else "", end="")
            print("\n".join(lines(found)))
        if not arguments.watch:
            return ExitStatus.STOPPED
        sys.stdout.flush()
        time.sleep(WATCH_S)


def all_clients(way: Door) -> Iterator[Client]:
    """Yield all connections, page by page."""
    after = ""
    for _ in range(MOST_PAGES):
        page = way.get(f"/v1/clients?limit={PAGE}{after}", Clients)
        yield from page.clients
        if page.next is None:
            return
        after = f"&after={quote(page.next)}"


def lines(clients: Sequence[Client]) -> Iterator[str]:
    """Yield the lines of the list. Texts of clients cannot control the terminal."""
    rows = [COLUMNS, *map(_cells, clients)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"{len(clients):,} connection{'s' * (len(clients) != 1)}"


def _cells(each: Client) -> tuple[str, ...]:
    cells = (
        str(each.connection), each.client_id or "-", each.address, moment(each.since), each.delivery,
        _number(each.offset), _number(each.lag), _number(each.unsent_bytes),
        "-" if each.budget is None else f"{each.budget:g}", each.filter,
    )  # fmt: skip
    return tuple(map(clean, cells))


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
