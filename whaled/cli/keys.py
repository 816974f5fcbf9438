"""`whaled keys`: the keys that tokens are signed with."""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from whaled.auth import keys
from whaled.cli.settings import Subparsers, add_config_option, load_for
from whaled.errors import ExitStatus

DAY_S = 86400
# The unit's credential: LoadCredential=keys.json:/etc/whaled/keys.json
UNIT_KEY_RING = "/etc/whaled/keys.json"


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "keys",
        help="make, list and retire signing keys",
        description="The key ring: the newest key signs tokens, all that are not retired verify them. To rotate: "
        "generate, reload whaled, wait until tokens of the old key have ended (auth.max_token_ttl), retire, reload. "
        f"Of {UNIT_KEY_RING}, a credential of the unit, only a restart sees the new file on every systemd.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text, handler in (
        ("generate", "add a key; it signs from the next reload or restart on", _generate),
        ("list", "show the keys, never their secrets", _list),
        ("retire", "take a key out of use; the next reload or restart ends its tokens, open connections too", _retire),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_option(command)
        command.add_argument("--key-ring", type=Path, metavar="FILE", help="default: auth.key_ring")
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        command.set_defaults(run=handler)
        if name == "retire":
            command.add_argument("kid", help="id of the key, as `list` shows it")
            command.add_argument("--force", action="store_true", help="also if no key is left: nobody can connect then")


def _taking(path: Path) -> str:
    """The command that puts a changed key ring into force."""
    # The unit has it as a credential, whose new file a reload does not see on every systemd.
    return f"systemctl {'restart' if path == Path(UNIT_KEY_RING) else 'reload'} whaled"


def _path(arguments: argparse.Namespace) -> Path:
    return arguments.key_ring or Path(load_for(arguments).config.auth.key_ring)


def _generate(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    is_new = not os.access(path.parent, os.F_OK)
    key = keys.generate(path, time.time())
    if is_new:
        print(f"the directory {path.parent} was made", file=sys.stderr)
    print(f"key {key.kid} made in {path}; it signs once whaled is started, or after: {_taking(path)}", file=sys.stderr)
    for variable in (keys.SECRET_VARIABLE, keys.SECRET_FILE_VARIABLE):
        if variable in os.environ:
            print(f"note: {variable} is set and comes before the key ring where it is set", file=sys.stderr)
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
            print(f"{key.kid}  {state:8}  made {_iso(key.created_at)}, {age}")
    if signing is None:
        print(f"no key of {path} is in use; make one: whaled keys generate --key-ring {path}", file=sys.stderr)
    return ExitStatus.STOPPED


def _retire(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    key = keys.retire(path, arguments.kid, time.time(), force=arguments.force)
    print(
        f"key {key.kid} retired in {path}; whaled refuses its tokens, and closes the connections that rest on it, "
        f"after: {_taking(path)}",
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
        "created_at": _iso(key.created_at),
        "retired_at": _iso(key.retired_at) if key.retired_at is not None else None,
    }
    return msgspec.json.encode(shown).decode()


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
