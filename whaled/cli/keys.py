"""`whaled keys`: the keys that tokens are signed with."""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from whaled.auth import keys
from whaled.cli.settings import Subparsers, add_config_option, load_for
from whaled.errors import ExitStatus

DAY_S = 86400


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "keys",
        help="make, list and retire signing keys",
        description="The key ring: the newest key signs tokens, all that are not retired verify them. To rotate: "
        "generate, reload whaled, wait until tokens of the old key have ended (auth.max_token_ttl), retire, reload.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text, handler in (
        ("generate", "add a key; it signs from the next reload on", _generate),
        ("list", "show the keys, never their secrets", _list),
        ("retire", "take a key out of use; its tokens are refused from the next reload on", _retire),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_option(command)
        command.add_argument("--key-ring", type=Path, metavar="FILE", help="default: auth.key_ring")
        command.set_defaults(run=handler)
        if name == "retire":
            command.add_argument("kid", help="id of the key, as `list` shows it")
            command.add_argument("--force", action="store_true", help="also if no key is left: nobody can connect then")
        if name == "list":
            command.add_argument("--json", action="store_true", help="one JSON object a line")


def _path(arguments: argparse.Namespace) -> Path:
    return arguments.key_ring or Path(load_for(arguments).config.auth.key_ring)


def _generate(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    key = keys.generate(path, time.time())
    print(f"key {key.kid} made in {path}; it signs once whaled is started or reloaded", file=sys.stderr)
    print(key.kid)
    return ExitStatus.STOPPED


def _list(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    ring = keys.read(path)
    signing = ring.active[-1] if ring.active else None
    now = time.time()
    for key in ring.keys:
        state = "retired" if key.retired_at is not None else "signs" if key is signing else "verifies"
        created = datetime.fromtimestamp(key.created_at, UTC).isoformat()
        if arguments.json:
            shown = {"kid": key.kid, "state": state, "created_at": created, "alg": key.alg}
            print(msgspec.json.encode(shown).decode())
        else:
            print(f"{key.kid}  {state:8}  made {created}, {int(now - key.created_at) // DAY_S} days ago")
    return ExitStatus.STOPPED


def _retire(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    key = keys.retire(path, arguments.kid, time.time(), force=arguments.force)
    print(f"key {key.kid} retired in {path}; whaled refuses its tokens after: systemctl reload whaled", file=sys.stderr)
    return ExitStatus.STOPPED
