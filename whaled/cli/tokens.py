"""`whaled token`: credentials for clients."""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import jwt
import msgspec

from whaled.auth import tokens
from whaled.auth.keys import load_ring
from whaled.cli.settings import Subparsers, add_config_option, load_for
from whaled.config import units
from whaled.config.sections import Auth
from whaled.errors import ExitStatus, KeyRingError, TokenError
from whaled.model import Permission


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "token", help="issue and inspect tokens", description="Tokens that clients authenticate with (JWT)."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    issue = commands.add_parser(
        "issue",
        help="make a token; it alone goes to standard output",
        description="Make a token for a client. Only the token goes to standard output.",
        epilog="example: whaled token issue --client desk-1 --permissions read --ttl 30d > desk-1.token",
    )
    issue.add_argument("--client", required=True, metavar="ID", help="who it is for; shown in logs")
    issue.add_argument(
        "--permissions", type=_permissions, default=[Permission.READ], metavar="LIST",
        help="of read, write, admin, separated by commas (default: read)",
    )  # fmt: skip
    issue.add_argument("--ttl", type=_duration, metavar="TIME", help="like 24h or 30d (default: auth.token_ttl)")
    issue.set_defaults(run=_issue)
    inspect = commands.add_parser(
        "inspect",
        help="show what a token says and whether it is accepted",
        description="Show what a token says, and whether this configuration's keys accept it: exit status 0 or 1.",
    )
    inspect.add_argument("token", nargs="?", default="-", help="the token, or - to read it from standard input")
    inspect.set_defaults(run=_inspect)
    for command in (issue, inspect):
        add_config_option(command)
        command.add_argument("--key-ring", type=Path, metavar="FILE", help="default: auth.key_ring")


def _permissions(text: str) -> list[Permission]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(Permission))
    if unknown:
        raise argparse.ArgumentTypeError(f"found {', '.join(unknown)}; allowed are {', '.join(Permission)}")
    return [Permission(name) for name in names]


def _duration(text: str) -> float:
    try:
        return units.duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, {error}") from None


def _settings(arguments: argparse.Namespace) -> Auth:
    settings = load_for(arguments).config.auth
    if arguments.key_ring is not None:
        settings = msgspec.structs.replace(settings, key_ring=str(arguments.key_ring))
    return settings


def _ring(arguments: argparse.Namespace, settings: Auth) -> tokens.KeyRing:
    # A ring that is named on the command line is meant, whatever the environment holds.
    environ = {} if arguments.key_ring is not None else os.environ
    return load_ring(settings, environ, Path(os.devnull) if arguments.key_ring is not None else Path.cwd())


def _shown(permissions: Iterable[Permission]) -> str:
    return ", ".join(sorted(permissions)) or "no permissions"


def _iso(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat() if at is not None else "for ever"


def _issue(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    try:
        token, grant = tokens.issue(
            _ring(arguments, settings),
            client_id=arguments.client,
            permissions=arguments.permissions,
            ttl_s=arguments.ttl or settings.token_ttl,
            now=time.time(),
            token_id=secrets.token_urlsafe(16),
            settings=settings,
        )
    except ValueError as error:
        print(f"whaled: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    print(f"token for {grant.client_id}: {_shown(grant.permissions)}, until {_iso(grant.expires_at)}", file=sys.stderr)
    print(token)
    return ExitStatus.STOPPED


def _inspect(arguments: argparse.Namespace) -> int:
    token = (sys.stdin.read() if arguments.token == "-" else arguments.token).strip()  # noqa: S105 - a dash
    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        print(f"whaled: this is no token: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    print(msgspec.json.format(msgspec.json.encode({"header": header, "claims": claims}), indent=2).decode())
    settings = _settings(arguments)
    try:
        grant = tokens.verify(_ring(arguments, settings), token, time.time(), settings)
    except (TokenError, KeyRingError) as error:
        print(f"not accepted: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    print(f"accepted: {grant.client_id}, {_shown(grant.permissions)}, until {_iso(grant.expires_at)}", file=sys.stderr)
    return ExitStatus.STOPPED
