"""`whaled token list` and `whaled token revoke`: the register of issued tokens, and the end of tokens.

They work on the access database, whether whaled runs or not: a running daemon notices within a second.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from whaled import times
from whaled.auth.desk import Listed, Revoked, Target, TokenDesk, check_name
from whaled.auth.register import revocations_after
from whaled.auth.revocations import Revocations
from whaled.auth.store import Direct, beside, open_directly
from whaled.cli.access import ORIGIN, actor, opened
from whaled.cli.options import Subparsers
from whaled.cli.settings import add_config_option
from whaled.config.sections import Config
from whaled.errors import AccessError, ExitStatus
from whaled.model import Grant


def register(commands: Subparsers) -> None:
    """Add the commands to those of `whaled token`."""
    listing = commands.add_parser(
        "list",
        help="list issued tokens that have not expired",
        description="List the tokens that `whaled token issue` and refreshes have issued and that have not expired. "
        "The register has what identifies a token, not the token itself, and nothing of tokens made elsewhere.",
    )
    listing.add_argument("--client", metavar="ID", help="only the tokens of this client")
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    listing.set_defaults(run=_list)
    revoke = commands.add_parser(
        "revoke",
        help="end a token, all tokens of a client, or all tokens of a signing key",
        description="Revoke tokens for good. Within a second a running whaled refuses them and closes their "
        "connections with 1008 `Token revoked`; a restart changes nothing. A token is revoked together with those "
        "refreshed from it, and those it was refreshed from.",
        epilog="example: whaled token revoke --client desk-1",
    )
    what = revoke.add_mutually_exclusive_group(required=True)
    what.add_argument("jti", nargs="?", metavar="JTI", help="id of the token, as `list` and `inspect` show it")
    what.add_argument("--client", metavar="ID", help="every token issued to this client until now")
    what.add_argument(
        "--key", metavar="KID", help="every token signed with this key, also later ones; see `whaled keys list`"
    )
    revoke.add_argument("--json", action="store_true", help="print the outcome as a JSON object")
    revoke.set_defaults(run=_revoke)
    for command in (listing, revoke):
        add_config_option(command)
        command.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path); the register lies beside it")


def _list(arguments: argparse.Namespace) -> int:
    with opened(arguments) as access:
        found = asyncio.run(TokenDesk(access).list(arguments.client))
    for listed in found:
        print(_json(listed) if arguments.json else _line(listed))
    if not found:
        print("no registered token is valid", file=sys.stderr)
    return ExitStatus.STOPPED


def _revoke(arguments: argparse.Namespace) -> int:
    if arguments.client is not None:
        target, name = Target.CLIENT, arguments.client
    elif arguments.key is not None:
        target, name = Target.KEY, arguments.key
    else:
        target, name = Target.TOKEN, arguments.jti
    try:
        check_name(target, name)
    except ValueError as error:
        print(f"whaled: {_ascii(str(error))}", file=sys.stderr)
        return ExitStatus.USAGE
    with opened(arguments) as access:
        revoked = asyncio.run(TokenDesk(access).revoke(target, name, actor=actor(), origin=ORIGIN))
    print(_outcome(revoked), file=sys.stderr)
    if arguments.json:
        shown = {
            "revoked": target.value,
            "name": name,
            "at": times.text_of(revoked.at),
            "registered_tokens": revoked.tokens,
        }
        print(msgspec.json.encode(shown).decode())
    return ExitStatus.STOPPED


def _outcome(revoked: Revoked) -> str:
    subject = {
        Target.TOKEN: "token {} and its family",
        Target.CLIENT: "all tokens of client {} issued until now",
        Target.KEY: "all tokens of key {}",
    }[revoked.target].format(_ascii(revoked.name))
    text = f"revoked: {subject}; a running whaled closes their connections within a second"
    if revoked.tokens == 0:
        text += ". The register has no such valid token: check the name, unless it was issued elsewhere"
    if revoked.target is Target.KEY:
        text += ". If this key signs, generate another one (`whaled keys generate`) and reload whaled"
    return text


def _line(listed: Listed) -> str:
    token = listed.token
    state = "revoked" if listed.is_revoked else "valid"
    return (
        f"{_ascii(token.jti)}  {state:7}  {_ascii(token.client_id)}  {token.permissions or '-'}  "
        f"issued {times.text_of(token.issued_at)}  until {times.text_of(token.expires_at)}  key {token.kid or '-'}  "
        f"by {_ascii(token.issued_by)}"
    )


def _json(listed: Listed) -> str:
    token = listed.token
    shown = {
        "jti": token.jti,
        "family": token.family,
        "client_id": token.client_id,
        "permissions": token.permissions.split(",") if token.permissions else [],
        "issued_at": times.text_of(token.issued_at),
        "expires_at": times.text_of(token.expires_at),
        "kid": token.kid,
        "issued_by": token.issued_by,
        "revoked": listed.is_revoked,
    }
    return msgspec.json.encode(shown).decode()


def enter(config: Config, grant: Grant) -> str | None:
    """Register a token that was just issued. Return why that failed, None if it did not."""
    try:
        with open_directly(beside(Path(config.eventlog.path))) as database:
            asyncio.run(TokenDesk(Direct(database)).register(grant, actor=actor(), origin=ORIGIN))
    except AccessError as error:
        return str(error)
    return None


def is_revoked(config: Config, grant: Grant, now: float) -> bool:
    """Return whether a token is revoked. Raises AccessError if the database exists and cannot be read."""
    path = beside(Path(config.eventlog.path))
    if not path.exists():
        return False
    revocations = Revocations()
    with open_directly(path) as database:
        for revocation in database.read(lambda connection: revocations_after(connection, 0))[1]:
            revocations.add(revocation)
    return revocations.cover(grant, now)


def _ascii(text: str) -> str:
    """Return a text that cannot control a terminal: an id may have been chosen by another issuer."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
