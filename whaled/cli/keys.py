"""`whaled keys`: the keys that tokens are signed with."""

import argparse
import os
import sys
import time
from pathlib import Path

import msgspec

from whaled import times
from whaled.auth import keys
from whaled.cli.options import Subparsers
from whaled.cli.settings import add_config_option, load_for
from whaled.errors import ExitStatus

DAY_S = 86400
# Source of the unit's credential: LoadCredential=keys.json:/etc/whaled/keys.json
UNIT_KEY_RING = "/etc/whaled/keys.json"


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "keys",
        help="generate, list and retire signing keys",
        description="Manage the key ring. The newest key signs tokens; all keys that are not retired verify them. To "
        "rotate: generate a key, reload whaled, wait until the tokens of the old key have expired "
        f"(auth.max_token_ttl), retire it, reload. If the key ring is {UNIT_KEY_RING}, a credential of the unit, "
        "restart instead: not every systemd passes a changed credential on a reload.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text, handler in (
        ("generate", "add a key; it signs after the next reload or restart", _generate),
        ("list", "show the keys without their secrets", _list),
        ("retire", "retire a key; the next reload or restart revokes its tokens and closes their connections", _retire),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_option(command)
        command.add_argument("--key-ring", type=Path, metavar="FILE", help="default: auth.key_ring")
        command.add_argument("--json", action="store_true", help="print one JSON object per line")
        command.set_defaults(run=handler)
        if name == "retire":
            command.add_argument("kid", help="id of the key, as `list` shows it")
            command.add_argument(
                "--force", action="store_true", help="retire the last key too: then no client can connect"
            )


def _activation(path: Path) -> str:
    """Return the command after which whaled uses the changed key ring."""
    # The unit's key ring is a credential, and not every systemd passes a changed credential on a reload.
    return f"systemctl {'restart' if path == Path(UNIT_KEY_RING) else 'reload'} whaled"


def _path(arguments: argparse.Namespace) -> Path:
    return arguments.key_ring or Path(load_for(arguments).config.auth.key_ring)


def _generate(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    is_new = not os.access(path.parent, os.F_OK)
    key = keys.generate(path, time.time())
    if is_new:
        print(f"created the directory {path.parent}", file=sys.stderr)
    print(
        f"key {key.kid} added to {path}; it signs once whaled is started, or after: {_activation(path)}",
        file=sys.stderr,
    )
    for variable in (keys.SECRET_VARIABLE, keys.SECRET_FILE_VARIABLE):
        if variable in os.environ:
            print(f"note: {variable} is set here; wherever it is set, it overrides the key ring", file=sys.stderr)
    print(_json(key, "signs") if arguments.json else key.kid)
    return ExitStatus.STOPPED


def _list(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    ring = keys.read(path)
    signing = ring.active[-1] if ring.active else None
    now = time.time()
    for key in ring.keys:
        state = "retired" if key.retired_at is not None else "signs" if key is signing else "verifies"
        if arguments.json:
            print(_json(key, state))
        else:
            age = f"{max(0, int(now - key.created_at)) // DAY_S} days ago"
            print(f"{key.kid}  {state:8}  made {times.text_of(key.created_at)}, {age}")
    if signing is None:
        print(f"no key of {path} is in use; add one: whaled keys generate --key-ring {path}", file=sys.stderr)
    return ExitStatus.STOPPED


def _retire(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    key = keys.retire(path, arguments.kid, time.time(), force=arguments.force)
    print(
        f"key {key.kid} retired in {path}; whaled refuses its tokens and closes their connections "
        f"after: {_activation(path)}",
        file=sys.stderr,
    )
    if arguments.json:
        print(_json(key, "retired"))
    return ExitStatus.STOPPED


def _json(key: keys.StoredKey, state: str) -> str:
    shown = {
        "kid": key.kid,
        "alg": key.alg,
        "state": state,
        "created_at": times.text_of(key.created_at),
        "retired_at": times.text_of(key.retired_at) if key.retired_at is not None else None,
    }
    return msgspec.json.encode(shown).decode()
