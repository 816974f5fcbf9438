"""`whaled token`: credentials for clients."""

import argparse
import json
import os
import secrets
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import jwt

from whaled.auth import keys, tokens
from whaled.auth.signature import MAX_TOKEN_BYTES
from whaled.cli.settings import Subparsers, add_config_option, duration, load_for
from whaled.config.sections import Auth
from whaled.errors import ExitStatus, KeyRingError, TokenError
from whaled.model import Grant, Permission


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
    issue.add_argument("--ttl", type=duration, metavar="TIME", help="like 24h or 30d (default: auth.token_ttl)")
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


def _ring(arguments: argparse.Namespace, settings: Auth) -> tokens.KeyRing:
    path = arguments.key_ring
    if path is not None:  # it is meant, whatever the environment holds
        return keys.ring_of(keys.read(path), path)
    return keys.load_ring(settings, os.environ, Path.cwd())


def _key(kid: str | None) -> str:
    return f"key {kid}" if kid is not None else keys.SECRET_VARIABLE


def _issue(arguments: argparse.Namespace) -> int:
    settings = load_for(arguments).config.auth
    try:
        token, grant = tokens.issue(
            _ring(arguments, settings),
            client_id=arguments.client,
            permissions=arguments.permissions,
            ttl_s=arguments.ttl if arguments.ttl is not None else settings.token_ttl,
            now=time.time(),
            token_id=secrets.token_urlsafe(16),
            settings=settings,
        )
    except ValueError as error:
        print(f"whaled: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    print(_summary("token for", grant), file=sys.stderr)
    print(token)
    return ExitStatus.STOPPED


def _inspect(arguments: argparse.Namespace) -> int:
    # No token is longer; what is cut off makes it malformed.
    token = sys.stdin.read(2 * MAX_TOKEN_BYTES) if arguments.token == "-" else arguments.token  # noqa: S105
    token = token.strip()
    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        print(f"whaled: this is no token: {str(error)[:200]!a}", file=sys.stderr)
        return ExitStatus.FAILED
    # ASCII, escaped: whoever made the token must not write to this terminal.
    print(json.dumps({"header": header, "claims": claims}, indent=2))
    settings = load_for(arguments).config.auth
    try:
        grant = tokens.verify(_ring(arguments, settings), token, time.time(), settings)
    except TokenError as error:
        print(f"not accepted: {_ascii(str(error))}", file=sys.stderr)
        return ExitStatus.FAILED
    except KeyRingError as error:
        print(f"not verified: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    print(_summary("accepted:", grant), file=sys.stderr)
    return ExitStatus.STOPPED


def _summary(before: str, grant: Grant) -> str:
    until = datetime.fromtimestamp(grant.expires_at, UTC).isoformat() if grant.expires_at is not None else "for ever"
    permissions = ", ".join(sorted(grant.permissions)) or "no permissions"
    return f"{before} {grant.client_id}: {permissions}, until {until}, signed with {_key(grant.key_id)}"


def _ascii(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
