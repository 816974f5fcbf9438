"""`whaled tail`: show alerts in a terminal, or write them as JSON lines for another program."""

import argparse
import asyncio
import contextlib
import math
import os
import signal
import ssl
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TextIO

import msgspec
from rich.console import Console
from rich.text import Text

from whaled import times
from whaled.auth import tokenfile
from whaled.auth.tokentext import token_in
from whaled.cli import tail_lines as lines
from whaled.cli.options import Subparsers
from whaled.cli.tail_screens import JsonLines, Screen, Table, Terminal
from whaled.client import (
    AuthenticationFailed,
    Connected,
    Disconnected,
    Last,
    Missed,
    Since,
    StreamError,
    StreamEvent,
    TokenRenewed,
    UpstreamStatus,
    WhaleStream,
    parse_since,
)
from whaled.client.credentials import TokenProvider
from whaled.client.since import NoStartError
from whaled.errors import ExitStatus
from whaled.model import MAX_BTC

DEFAULT_URL = "ws://127.0.0.1:8765"
URL_VARIABLE = "WHALED_URL"
TOKEN_VARIABLE = "WHALED_TOKEN"  # noqa: S105 - the name of a variable
# A terminal starts with these events, so that it is not empty until the next whale.
TERMINAL_SINCE = Last(10)


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "tail",
        help="watch the alerts of a running whaled",
        description="Watch the alerts of a running whaled. On a terminal, print a line for each alert; otherwise, or "
        "with --json, only JSON objects, one per line. Messages about the connection go to standard error. After a "
        "lost connection, reconnect and resume without missing or repeating an alert. Ends on SIGINT or SIGTERM.",
        epilog=f"The token is read from --token-file, else from the environment variable {TOKEN_VARIABLE}. "
        "It is not an option, since every user of the machine can see the options of a process.",
        allow_abbrev=False,  # `--token` must not be taken for `--token-file`
    )
    add = parser.add_argument
    add("--url", help=f"server, ws:// or wss:// (default: environment variable {URL_VARIABLE}, else {DEFAULT_URL})")
    add("--token-file", type=Path, metavar="FILE", help="file with a token or an API key")
    add("--ca-file", type=Path, metavar="FILE", help="certificates (PEM) to trust instead of the system's, for wss://")
    add("--proxy", metavar="URL", help="HTTP proxy to connect through, http://[user:password@]host:port")
    add("--min-btc", type=_amount, metavar="X", help="only whales of at least X BTC")
    add("--min-flow-btc", type=_amount, metavar="X", help="only whales with a flow of at least X BTC")
    add(
        "--updates",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the outcomes of the whales too (default: yes)",
    )
    add(
        "--since",
        type=_since,
        metavar="WHEN",
        help="start at `last:20`, an ISO 8601 time (UTC without a zone), a position `epoch:offset`, or `now` "
        "(default: last:10 on a terminal, else now)",
    )
    add(
        "--compression",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask the server to compress alerts (default: yes, unless it is on this machine)",
    )
    add("--count", type=_count, metavar="N", help="exit after N alerts and updates")
    add("--json", action="store_true", help="write JSON lines on a terminal too")
    add("--no-retry", action="store_true", help="exit with status 1 when the connection fails or is lost")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show alerts until a signal. Status 2: an invalid option; 1: the server refused this client."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    is_terminal = sys.stdout.isatty() and not arguments.json
    try:
        stream = open_stream(arguments, os.environ, is_terminal=is_terminal)
    except OSError as error:
        # An error from OpenSSL has no file name.
        print(f"whaled tail: {error.filename or arguments.ca_file}: {error.strerror}", file=sys.stderr)
        return ExitStatus.USAGE
    except ValueError as error:
        print(f"whaled tail: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    if arguments.since is not None and arguments.since.note is not None:
        print(arguments.since.note, file=sys.stderr)
    screen: Screen = Table(sys.stdout) if is_terminal else JsonLines(sys.stdout.buffer)
    with _stopping(stream):
        return await follow(stream, screen, sys.stderr, count=arguments.count)


def open_stream(arguments: argparse.Namespace, environ: Mapping[str, str], *, is_terminal: bool) -> WhaleStream:
    """Return a stream for the options. Raises ValueError or OSError for an invalid one."""
    filters: dict[str, object] = {}
    if arguments.min_btc is not None:
        filters["min_btc"] = arguments.min_btc
    if arguments.min_flow_btc is not None:
        filters["min_flow_btc"] = arguments.min_flow_btc
    if not arguments.updates:
        filters["kinds"] = ["alert"]
    since: Since | None = TERMINAL_SINCE if is_terminal else None
    if arguments.since is not None:
        since = arguments.since.since
    token, provider = _credentials(arguments.token_file, environ)
    return WhaleStream(
        arguments.url or environ.get(URL_VARIABLE) or DEFAULT_URL,
        token=token,
        token_provider=provider,
        filters=filters,
        since=since,
        link_events=True,
        reconnect=not arguments.no_retry,
        compression=arguments.compression,
        ssl=None if arguments.ca_file is None else _trust(arguments.ca_file),
        proxy=arguments.proxy,
    )


def _credentials(path: Path | None, environ: Mapping[str, str]) -> tuple[str | None, TokenProvider | None]:
    """Return a token, or a provider that reads it from a file each time. Raises ValueError or OSError."""
    if path is None:
        text = environ.get(TOKEN_VARIABLE, "").strip()
        try:
            return (token_in(text) if text else None), None
        except ValueError as error:
            raise ValueError(f"{TOKEN_VARIABLE} {error}") from None
    found = tokenfile.read(path)
    if found.warning is not None:
        print(f"whaled tail: warning: {found.warning}", file=sys.stderr)
    if not found.is_lasting:
        return found.token, None

    async def provide() -> str:
        """Read the file again: another program may have renewed the token.

        The file may be empty while it is written, so an invalid file is an OSError, which the stream retries.
        """
        try:
            return tokenfile.read(path).token
        except ValueError as error:
            raise OSError(str(error)) from error

    return None, provide


def _trust(path: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(path))
    except ssl.SSLError as error:
        raise ValueError(f"{path} contains no certificates in PEM format: {error.reason or error}") from error


async def follow(stream: WhaleStream, screen: Screen, errors: TextIO, *, count: int | None) -> int:
    """Show at most `count` events, until the stream ends or the output's reader is gone. Returns the exit status."""
    notes = Terminal(file=errors, highlight=False)
    left = math.inf if count is None else count
    try:
        async with stream:
            async for event in stream:
                left -= screen.show(event)
                note = _note(event)
                if note is not None:
                    notes.print(Text(note, style="dim" if isinstance(event, Connected) else "yellow"), soft_wrap=True)
                if left <= 0:
                    break
    except BrokenPipeError:
        # The reader of standard output is gone, so drop what Python would still flush at exit.
        screen.discard()
        return ExitStatus.STOPPED
    except AuthenticationFailed as error:
        _print_problem(
            notes,
            f"{error}. Give a valid token with --token-file or {TOKEN_VARIABLE}; on the server, "
            "`whaled token issue` makes one",
        )
        return ExitStatus.FAILED
    except StreamError as error:
        _print_problem(notes, str(error))
        return ExitStatus.FAILED
    return ExitStatus.STOPPED


def _print_problem(notes: Console, problem: str) -> None:
    notes.print(Text(f"whaled tail: {lines.clean(problem)}", style="red"), soft_wrap=True)


def _note(event: StreamEvent) -> str | None:
    """Return the line for standard error about an event, if any."""
    match event:
        case Connected(head=head, client_id=client_id):
            who = f" as {lines.clean(client_id)}" if client_id is not None else ""
            return f"connected{who}" + (f", newest event {lines.at(head)}" if head is not None else "")
        case Disconnected(reason=reason, retry_in_s=retry_in_s):
            return f"{lines.clean(reason)}; trying again in {retry_in_s:.1f} s"
        case UpstreamStatus():
            return lines.upstream_line(event)
        case Missed():
            return lines.missed_line(event)
        case TokenRenewed():
            return lines.renewed_line(event)
        case _:
            return None


@contextlib.contextmanager
def _stopping(stream: WhaleStream) -> Iterator[None]:
    """Stop the stream on a signal, or when the reader of standard output is gone.

    Without the latter, a gone reader would go unnoticed until the next whale.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stream.stop)
    out = sys.stdout.fileno()
    is_pipe = stat.S_ISFIFO(os.fstat(out).st_mode)
    if is_pipe:
        # The write end of a pipe is never readable. epoll reports it as ready when the read end was closed.
        loop.add_reader(out, stream.stop)
    try:
        yield
    finally:
        if is_pipe:
            loop.remove_reader(out)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


# --- options ----------------------------------------------------------------------------------------------------------


class _Start(msgspec.Struct, frozen=True):
    """The value of --since. `since` is None for `now`. `note` states how an ambiguous time was read."""

    since: Since | None
    note: str | None = None


def _since(text: str) -> _Start:
    if text == "now":
        return _Start(None)
    try:
        since = parse_since(text)
    except NoStartError as error:
        raise argparse.ArgumentTypeError(f"{error}, or `now`") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(since, datetime) and not times.names_zone(text):
        return _Start(since, f"starting at {since.isoformat()}: --since has no time zone and is read as UTC")
    return _Start(since)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 <= amount <= MAX_BTC:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of BTC; give a number from 0 to {MAX_BTC}")
    return amount


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; give an integer of at least 1")
    return int(text)
