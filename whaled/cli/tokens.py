"""`whaled token`: issue and inspect the tokens of clients."""

import argparse
import json
import os
import secrets
import stat
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import jwt

from whaled.auth import keys, sources, tokenfile, tokens, tokentext
from whaled.auth.ring import KeyRing
from whaled.cli.options import Subparsers, duration
from whaled.cli.settings import add_config_option, load_for, working_directory
from whaled.config.sections import AuthSettings
from whaled.durable import replacing
from whaled.errors import ExitStatus, KeyRingError, OperatorError, TokenError, reason_of
from whaled.model import Grant, Permission


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "token", help="issue and inspect tokens", description="Issue and inspect the tokens (JWT) of clients."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    issue = commands.add_parser(
        "issue",
        help="issue a token and print it",
        description="Issue a token for a client. Prints only the token to standard output, or writes it to FILE, which "
        "no other user can read. Issue one for each program: two programs that refresh the same token revoke it for "
        "both.",
        epilog="example: whaled token issue --client desk-1 --permissions read --ttl 30d --output desk-1.token",
    )
    issue.add_argument("--client", required=True, metavar="ID", help="name of the client; shown in logs")
    issue.add_argument(
        "--permissions", type=_permissions, default=[Permission.READ], metavar="LIST",
        help="read, write or admin, separated by commas (default: read)",
    )  # fmt: skip
    issue.add_argument("--ttl", type=duration, metavar="TIME", help="lifetime, 24h or 30d (default: auth.token_ttl)")
    issue.add_argument("--output", type=Path, metavar="FILE", help="write the token to FILE (mode 0600)")
    issue.add_argument("--force", action="store_true", help="replace FILE if it exists")
    issue.set_defaults(run=_issue)
    inspect = commands.add_parser(
        "inspect",
        help="show the contents of a token and whether it is accepted",
        description="Show the contents of a token, and whether the keys of this configuration accept it. The signature "
        "is not shown, so the output cannot be used as a token.",
        epilog="exit status: 0 the token is accepted, 1 it is not",
    )
    inspect.add_argument(
        "token", nargs="?", default="-", metavar="FILE",
        help="a file with the token, as written by `issue --output`; - for standard input (default); or the token "
        "itself, which other users of this machine can then see",
    )  # fmt: skip
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


def _ring(arguments: argparse.Namespace, settings: AuthSettings) -> KeyRing:
    path = arguments.key_ring
    if path is not None:  # an explicit --key-ring overrides the environment
        return keys.ring_of(keys.read(path), path)
    return sources.load_ring(settings, os.environ, working_directory())


def _key(kid: str | None) -> str:
    return f"key {kid}" if kid is not None else sources.SECRET_VARIABLE


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
    if arguments.output is not None:
        _write(arguments.output, token, overwrite=arguments.force)
    print(_summary("token for", grant), file=sys.stderr)
    if arguments.output is None:
        print(token)
    return ExitStatus.STOPPED


def _write(path: Path, token: str, *, overwrite: bool) -> None:
    """Write a token into a file that no other user can read, never through a link. Raises OperatorError."""
    try:
        if overwrite and os.path.lexists(path):
            _replace(path, token)
            return
        # Never overwrites an existing file or link (open(2), O_EXCL).
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                os.fchmod(file.fileno(), 0o600)  # regardless of the umask
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except FileExistsError:
        raise OperatorError(f"{path}: this file exists; name another one, or replace it with --force") from None
    except OSError as error:
        raise OperatorError(f"cannot write {path}: {reason_of(error)}") from error


def _replace(path: Path, token: str) -> None:
    """Replace a file or link with a new file, which no other user can read."""
    if not stat.S_ISREG(path.lstat().st_mode) and not path.is_symlink():
        raise OperatorError(f"{path}: exists and is not a regular file; name another file for the token")
    with replacing(path) as file:
        file.write(f"{token}\n".encode("ascii"))


def _inspect(arguments: argparse.Namespace) -> int:
    try:
        name, token = _unwrapped(arguments.token)
    except (OSError, ValueError) as error:
        reason = f"{arguments.token}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"whaled: {_ascii(reason)}", file=sys.stderr)
        return ExitStatus.FAILED
    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        problem = _flaw(token) or f"holds no token: {str(error)[:200]}"
        print(f"whaled: {_ascii(name)} {_ascii(problem)}", file=sys.stderr)
        return ExitStatus.FAILED
    # Escaped to ASCII: the contents of a foreign token must not control this terminal.
    print(json.dumps({"header": header, "claims": claims}, indent=2))
    settings = load_for(arguments).config.auth
    try:
        grant = tokens.verify(_ring(arguments, settings), token, time.time(), settings)
    except TokenError as error:
        flaw = _flaw(token)
        print(f"not accepted: {_ascii(str(error))}" + (f"; it {_ascii(flaw)}" if flaw else ""), file=sys.stderr)
        return ExitStatus.FAILED
    except KeyRingError as error:
        print(f"not verified: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    print(_summary("accepted:", grant), file=sys.stderr)
    return ExitStatus.STOPPED


def _unwrapped(argument: str) -> tuple[str, str]:
    """Return the name of the token's source and the text found there. Raises ValueError or OSError."""
    if argument == "-":
        return "standard input", tokenfile.unwrapped(sys.stdin.buffer, "standard input")
    if os.sep in argument or os.path.lexists(argument):
        found = tokenfile.read_unchecked(Path(argument))
        if found.warning is not None:
            print(f"whaled: warning: {_ascii(found.warning)}", file=sys.stderr)
        return argument, found.token
    return "the argument, which names no file,", tokentext.unwrapped(argument)


def _flaw(token: str) -> str | None:
    """Return why a text is not a token under any key, None if it may be one."""
    try:
        tokentext.check(token)
    except ValueError as error:
        return str(error)
    return None


def _summary(before: str, grant: Grant) -> str:
    expiry = grant.expires_at
    until = "no expiry" if expiry is None else f"until {datetime.fromtimestamp(expiry, UTC).isoformat()}"
    permissions = ", ".join(sorted(grant.permissions)) or "no permissions"
    return f"{before} {grant.client_id}: {permissions}, {until}, signed with {_key(grant.key_id)}"


def _ascii(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
