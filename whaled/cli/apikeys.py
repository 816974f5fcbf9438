"""`whaled apikey`: create, list and revoke API keys. It works whether whaled runs or not."""

import argparse
import asyncio
import ipaddress
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from whaled import times
from whaled.auth.apikeydesk import ApiKeyDesk, Order
from whaled.auth.apikeys import ApiKey
from whaled.cli.access import ORIGIN, actor, opened
from whaled.cli.options import Subparsers
from whaled.cli.settings import add_config_option
from whaled.cli.tokens import write_secret
from whaled.config import units
from whaled.errors import ClientError, ExitStatus
from whaled.gateway.entitlement import MAX_NETWORKS, fixed_filter
from whaled.model import Permission


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "apikey",
        help="create, list and revoke API keys",
        description="Create, list and revoke API keys. A running whaled notices a change within a second.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = commands.add_parser(
        "create",
        help="create an API key and print it once",
        description="Create an API key for a client. Prints only the key to standard output, or writes it to FILE, "
        "which no other user can read. whaled stores a hash of it: nothing can show the key again.",
        epilog="""example: whaled apikey create --client desk-1 --network 10.1.0.0/16 --filter '{"min_btc": 500}'""",
    )
    create.add_argument("--client", required=True, metavar="ID", help="name of the client; shown in logs")
    create.add_argument(
        "--permission", action="append", type=_permission, metavar="NAME", help="read, write or admin; may be repeated "
        "(default: read)",
    )  # fmt: skip
    create.add_argument(
        "--filter", type=_filter, metavar="JSON", help="filter, as in docs/protocol.md, that the client cannot widen"
    )
    create.add_argument("--rate", type=float, metavar="N", help="messages per second (default: the configured limits)")
    create.add_argument(
        "--network", action="append", type=_network, default=[], metavar="CIDR",
        help="accept the key only from this network, such as 10.1.0.0/16 or 2001:db8::/48; may be repeated",
    )  # fmt: skip
    create.add_argument(
        "--expires", type=_expiry, metavar="TIME", help="a duration such as 90d, or an ISO 8601 time (default: never)"
    )
    create.add_argument("--comment", default="", metavar="TEXT", help="a note for `list`")
    create.add_argument("--output", type=Path, metavar="FILE", help="write the key to FILE (mode 0600)")
    create.add_argument("--force", action="store_true", help="replace FILE if it exists")
    create.set_defaults(run=_create)
    listing = commands.add_parser(
        "list", help="list API keys", description="List API keys: what they permit, and when they were last used."
    )
    listing.add_argument("--client", metavar="ID", help="only the keys of this client")
    listing.add_argument("--all", action="store_true", help="also expired and revoked keys")
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    listing.set_defaults(run=_list)
    revoke = commands.add_parser(
        "revoke",
        help="end an API key for good",
        description="Revoke an API key. A running whaled refuses it and closes its connections with 1008 "
        "`Token revoked` within a second.",
    )
    revoke.add_argument("id", metavar="ID", help="public id of the key, as `list` shows it (whkid_...)")
    revoke.set_defaults(run=_revoke)
    for command in (create, listing, revoke):
        add_config_option(command)
        command.add_argument("--db-path", metavar="FILE", help="event log (eventlog.path); the keys lie beside it")


# --- arguments --------------------------------------------------------------------------------------------------------


def _permission(text: str) -> Permission:
    try:
        return Permission(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed are {', '.join(Permission)}") from None


def _filter(text: str) -> str:
    """Return a filter in its canonical form, as JSON."""
    try:
        return msgspec.json.encode(fixed_filter(text).normalised()).decode()
    except ClientError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected a network such as 10.1.0.0/16, or an address") from None


def _expiry(text: str) -> float:
    """Return a duration from now, or a time, as Unix seconds."""
    try:
        return time.time() + units.duration(text)
    except ValueError:
        pass
    try:
        return times.parse(text).timestamp()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected that, or a duration such as 90d") from None


# --- commands ---------------------------------------------------------------------------------------------------------


def _create(arguments: argparse.Namespace) -> int:
    order = Order(
        client_id=arguments.client,
        permissions=frozenset(arguments.permission or [Permission.READ]),
        comment=arguments.comment,
        fixed_filter=arguments.filter,
        rate=arguments.rate,
        networks=tuple(dict.fromkeys(arguments.network)),
        expires_at=arguments.expires,
    )
    if len(order.networks) > MAX_NETWORKS:
        print(f"whaled: found {len(order.networks)} networks; allowed are {MAX_NETWORKS}", file=sys.stderr)
        return ExitStatus.USAGE
    output: Path | None = arguments.output

    def keep(text: str) -> None:
        if output is not None:
            write_secret(output, text, overwrite=arguments.force)

    with opened(arguments) as access:
        try:
            text, key = asyncio.run(ApiKeyDesk(access).create(order, actor=actor(), origin=ORIGIN, keep=keep))
        except ValueError as error:
            print(f"whaled: {error}", file=sys.stderr)
            return ExitStatus.USAGE
    print(f"API key {key.id} for {_line(key, time.time())}", file=sys.stderr)
    if output is None:
        print(text)
    return ExitStatus.STOPPED


def _list(arguments: argparse.Namespace) -> int:
    now = time.time()
    with opened(arguments) as access:
        keys = asyncio.run(ApiKeyDesk(access).list(arguments.client))
    shown = [key for key in keys if arguments.all or key.state(now) == "active"]
    for key in shown:
        print(_json(key, now) if arguments.json else f"{key.id}  {_line(key, now)}")
    if not shown:
        print("no API key is valid" if not arguments.all else "there are no API keys", file=sys.stderr)
    return ExitStatus.STOPPED


def _revoke(arguments: argparse.Namespace) -> int:
    with opened(arguments) as access:
        is_new = asyncio.run(ApiKeyDesk(access).revoke(arguments.id, actor=actor(), origin=ORIGIN))
    text = "a running whaled closes its connections within a second" if is_new else "it was revoked before"
    print(f"API key {arguments.id} revoked; {text}", file=sys.stderr)
    return ExitStatus.STOPPED


def _line(key: ApiKey, now: float) -> str:
    parts = [
        key.client_id,
        key.state(now),
        ",".join(sorted(key.permissions)),
        f"from {','.join(key.networks)}" if key.networks else "from any network",
        f"until {_iso(key.expires_at)}" if key.expires_at is not None else "no expiry",
        f"last used {_iso(key.last_used_at)}" if key.last_used_at is not None else "never used",
    ]
    if key.rate is not None:
        parts.append(f"{key.rate:g} messages/s")
    if key.fixed_filter is not None:
        parts.append(f"filter {key.fixed_filter}")
    if key.comment:
        parts.append(key.comment)
    return "  ".join(parts)


def _json(key: ApiKey, now: float) -> str:
    shown: dict[str, Any] = {
        "id": key.id,
        "client_id": key.client_id,
        "state": key.state(now),
        "comment": key.comment,
        "permissions": sorted(key.permissions),
        "filter": msgspec.json.decode(key.fixed_filter) if key.fixed_filter is not None else None,
        "rate": key.rate,
        "networks": list(key.networks),
        "created_at": _iso(key.created_at),
        "created_by": key.created_by,
        "expires_at": _iso(key.expires_at),
        "revoked_at": _iso(key.revoked_at),
        "last_used_at": _iso(key.last_used_at),
    }
    return msgspec.json.encode(shown).decode()


def _iso(at: float | None) -> str | None:
    return times.text_of(at) if at is not None else None
