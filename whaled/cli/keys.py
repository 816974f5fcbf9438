"""`whaled keys`: the keys that tokens are signed with."""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from whaled.auth import keys, sources
from whaled.auth.eddsa import EDDSA
from whaled.cli import reload, unit
from whaled.cli.options import Subparsers, duration
from whaled.cli.settings import add_config_option, load_for
from whaled.config import units
from whaled.config.sections import Config
from whaled.errors import ExitStatus, OperatorError

DAY_S = 86400


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "keys",
        help="generate, rotate, list and retire signing keys",
        description="Manage the key ring. One key signs tokens; all keys that are not retired verify them. `rotate` "
        "replaces the key that signs without logging anybody out, and makes a running whaled use it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text, handler in (
        ("generate", "add a key; it signs after the next reload or restart", _generate),
        ("rotate", "add a key that signs, let the others verify until their tokens have ended, and reload", _rotate),
        ("list", "show the keys without their secrets", _list),
        ("public", "print the public keys of the EdDSA keys as a JWK Set (RFC 7517), never a secret", _public),
        ("retire", "retire a key; the next reload or restart revokes its tokens and closes their connections", _retire),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_option(command)
        command.add_argument("--key-ring", type=Path, metavar="FILE", help="default: auth.key_ring")
        if name != "public":
            command.add_argument("--json", action="store_true", help="print one JSON object per line")
        command.set_defaults(run=handler)
        if name == "generate":
            command.add_argument(
                "--algorithm", choices=keys.ALGORITHMS, default=keys.ALGORITHMS[0], help="default: %(default)s"
            )
        if name == "rotate":
            _add_rotation(command)
        if name == "retire":
            command.add_argument("kid", help="id of the key, as `list` shows it")
            command.add_argument(
                "--force", action="store_true", help="retire the last key too: then no client can connect"
            )


def _add_rotation(command: argparse.ArgumentParser) -> None:
    command.epilog = (
        "exit status: 0 the new key signs, or whaled is not running; 78 whaled runs on with its old keys; "
        "1 whaled did not respond. The key ring has the new key in each case"
    )
    command.add_argument("--algorithm", choices=keys.ALGORITHMS, help="default: that of the key that signs now")
    command.add_argument("--no-reload", action="store_true", help="change the file only")
    command.add_argument("--db-path", metavar="FILE", help="event log of the daemon (eventlog.path)")
    command.add_argument(
        "--timeout",
        type=duration,
        default=reload.DEFAULT_TIMEOUT_S,
        metavar="TIME",
        help="how long to wait for whaled (default: 80s)",
    )


def _activation(path: Path) -> str:
    """Return the command after which whaled.service uses the changed key ring.

    A drop-in, or the unit of an earlier version, may still pass the ring as a credential. Not every systemd renews a
    credential on a reload.
    """
    found = unit.installed()
    is_credential = found is not None and found.credentials.get(sources.CREDENTIAL_NAME) == str(path)
    return f"systemctl {'restart' if is_credential else 'reload'} whaled"


def _path(arguments: argparse.Namespace) -> Path:
    return arguments.key_ring or Path(load_for(arguments).config.auth.key_ring)


def _generate(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    is_new = not os.access(path.parent, os.F_OK)
    key = keys.generate(path, time.time(), algorithm=arguments.algorithm)
    if is_new:
        print(f"created the directory {path.parent}", file=sys.stderr)
    print(
        f"key {key.kid} added to {path}; it signs once whaled is started, or after: {_activation(path)}",
        file=sys.stderr,
    )
    _note_override()
    print(_json(key, "signs") if arguments.json else key.kid)
    return ExitStatus.STOPPED


def _note_override() -> None:
    for variable in (sources.SECRET_VARIABLE, sources.SECRET_FILE_VARIABLE):
        if variable in os.environ:
            print(f"note: {variable} is set here; wherever it is set, it overrides the key ring", file=sys.stderr)


def _rotate(arguments: argparse.Namespace) -> int:
    config = load_for(arguments).config
    path = arguments.key_ring or Path(config.auth.key_ring)
    longest_s = config.auth.max_token_ttl
    key, others = keys.rotate(path, time.time(), longest_s=longest_s, algorithm=arguments.algorithm)
    print(f"key {key.kid} added to {path}; it signs from now on", file=sys.stderr)
    for other in others:
        until = _iso(other.verifies_until) if other.verifies_until is not None else "it is retired"
        print(
            f"key {other.kid} verifies until {until} (auth.max_token_ttl is {units.show_duration(longest_s)}), then it "
            "is dropped",
            file=sys.stderr,
        )
    _note_override()
    print(_json(key, "signs") if arguments.json else key.kid, flush=True)
    if arguments.no_reload:
        print(f"whaled takes it when it is started, or after: {_activation(path)}", file=sys.stderr)
        return ExitStatus.STOPPED
    _hand_over(key, path, config, arguments.timeout)
    return ExitStatus.STOPPED


def _hand_over(key: keys.StoredKey, path: Path, config: Config, timeout_s: float) -> None:
    """Make the running daemon read the ring, and report what came of it. Raises WhaledError if it does not use it."""
    log_path = Path(config.eventlog.path).resolve()
    try:
        pid = reload.holder(log_path)
    except reload.NoDaemonError:
        print(f"no running whaled has {log_path} open: the key is in force from its next start", file=sys.stderr)
        return
    outcome = reload.request(pid, log_path, timeout_s)
    if outcome.problem is not None:
        raise OperatorError(
            f"process {pid} refused the reload and still has its old keys: {outcome.problem}\n"
            f"key {key.kid} is in {path} already: correct the fault, then: {_activation(path)}"
        )
    if outcome.signing_key != key.kid:
        raise OperatorError(
            f"process {pid} has reloaded, but does not sign with key {key.kid} of {path}: its keys come from elsewhere "
            f"(the event signing_keys_loaded of its log names the source), or it is older. {_activation(path)}"
        )
    print(f"process {pid} signs with key {key.kid}; nobody was disconnected", file=sys.stderr)


def _list(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    ring = keys.read(path)
    now = time.time()
    for key in ring.keys:
        state = ring.state(key, now)
        if arguments.json:
            print(_json(key, state))
            continue
        age = f"{max(0, int(now - key.created_at)) // DAY_S} days ago"
        until = f", until {_iso(key.verifies_until)}" if key.verifies_until is not None else ""
        print(f"{key.kid}  {key.alg}  {state:8}  made {_iso(key.created_at)}, {age}{until}")
    if ring.signing is None:
        print(f"no key of {path} signs; add one: whaled keys generate --key-ring {path}", file=sys.stderr)
    return ExitStatus.STOPPED


def _public(arguments: argparse.Namespace) -> int:
    path = _path(arguments)
    ring = keys.read(path)
    print(msgspec.json.format(keys.public_keys(ring, path, time.time()), indent=2).decode())
    if not any(key.alg == EDDSA for key in ring.active):
        print(f"note: {path} has no EdDSA key, and an HS256 key has no public part", file=sys.stderr)
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
        "created_at": _iso(key.created_at),
        "retired_at": _iso(key.retired_at) if key.retired_at is not None else None,
        "verifies_until": _iso(key.verifies_until) if key.verifies_until is not None else None,
    }
    return msgspec.json.encode(shown).decode()


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
