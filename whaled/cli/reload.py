"""`whaled reload`: make a running daemon read its configuration again, and report the result."""

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path

from whaled.cli.options import Subparsers, duration
from whaled.cli.settings import add_config_option, load_for
from whaled.errors import ExitStatus, OperatorError, WhaledError
from whaled.ops import reloads

# Below the 90 s after which systemd gives up on a reload (TimeoutStartSec=).
DEFAULT_TIMEOUT_S = 80.0
LOOK_S = 0.05
MAX_LOCK_BYTES = 20
MAX_SHOWN = 100
_MAIN = "whaled/__main__.py"


class NoDaemonError(OperatorError):
    """No running daemon has the event log open."""


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "reload",
        help="make a running daemon read its configuration again",
        description="Send SIGHUP to a running whaled and wait until it has read its configuration again. Under "
        "systemd, use `systemctl reload whaled`, which checks the file first and then runs this command.",
        epilog="exit status: 0 applied; 78 refused, the old configuration stays in effect; 1 no response",
    )
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log of the daemon (eventlog.path)")
    parser.add_argument(
        "--pid", type=int, metavar="N", help="process of the daemon (default: the one that has the event log open)"
    )
    parser.add_argument(
        "--timeout", type=duration, default=DEFAULT_TIMEOUT_S, metavar="TIME", help="how long to wait (default: 80s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reload. Raises OperatorError if whaled refuses or cannot be signalled, WhaledError if it does not respond."""
    # The status line belongs to the daemon: an error of this command must not overwrite it.
    os.environ.pop("NOTIFY_SOCKET", None)
    log_path = Path() if _needs_no_log_path(arguments) else Path(load_for(arguments).config.eventlog.path).resolve()
    if arguments.pid is not None:
        _require_daemon(arguments.pid)
    pid = arguments.pid if arguments.pid is not None else holder(log_path)
    outcome = request(pid, log_path, arguments.timeout)
    if outcome.problem is not None:
        raise OperatorError(f"reload refused, the old configuration stays: {outcome.problem}")
    print(f"reloaded by process {pid}")
    return ExitStatus.STOPPED


def _needs_no_log_path(arguments: argparse.Namespace) -> bool:
    """Return whether systemd provides all that is needed: by now the configuration may name another event log."""
    return arguments.pid is not None and bool(os.environ.get("STATE_DIRECTORY"))


def _require_daemon(pid: int) -> None:
    """Raise OperatorError unless the process is `whaled run`: SIGHUP ends most programs.

    A process whose command line cannot be read is accepted.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    names = [Path(word).name for word in words]
    places = [place for place, word in enumerate(words) if names[place] == "whaled" or word.endswith(_MAIN)]
    if not (names[0].startswith(("python", "whaled")) and places and "run" in words[places[0] + 1 :]):
        shown = " ".join(words).strip()[:MAX_SHOWN] or "a process without a command line"
        raise OperatorError(f"--pid {pid} is not `whaled run` but {shown!r}: no signal was sent")


def holder(log_path: Path) -> int:
    """Return the process that has the event log open. Raises NoDaemonError if there is none."""
    lock = log_path.with_name(log_path.name + ".lock")
    not_running = NoDaemonError(
        f"no running whaled has {log_path} open (eventlog.path): is it running, and with this configuration? "
        "A changed eventlog.path requires a restart"
    )
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise not_running from None
    except OSError as error:
        raise OperatorError(
            f"{lock}: cannot read it: {error.strerror}; run this as root, or as the user whaled runs as"
        ) from error
    try:
        holder = os.read(descriptor, MAX_LOCK_BYTES).strip()
        # Try the lock only if the recorded process exists: holding it, even briefly, could make a starting daemon fail.
        if holder.isdigit() and Path(f"/proc/{int(holder)}").exists():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(holder)
        raise not_running
    finally:
        os.close(descriptor)


def request(pid: int, log_path: Path, timeout_s: float) -> reloads.Outcome:
    """Make a daemon reload and return the outcome. Raises WhaledError if there is none in time."""
    path = reloads.outcome_path(_environ_of(pid), log_path)
    requested_s = time.monotonic()
    _signal(pid, signal.SIGHUP)
    while (now := time.monotonic()) < requested_s + timeout_s:
        outcome = reloads.read(path)
        if outcome is not None and outcome.pid == pid and requested_s <= outcome.began_s <= now:
            return outcome
        time.sleep(LOOK_S)
        _signal(pid, 0)
    raise WhaledError(
        f"no response from process {pid} within {timeout_s:g} s; its log reports the result of the reload"
    )


def _environ_of(pid: int) -> dict[str, str]:
    """Return the environment in which the outcome is found: our own in a reload by systemd, else that of the daemon.

    By hand nothing tells this command of systemd's state directory. Only root and the daemon's user may look.
    """
    if os.environ.get("STATE_DIRECTORY"):
        return dict(os.environ)
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (pair.partition(b"=") for pair in pairs)}


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        when = "there is no such process" if number else "it ended meanwhile"
        raise WhaledError(f"process {pid} did not reload: {when}") from None
    except OverflowError:
        raise OperatorError(f"--pid {pid}: there is no such process") from None
    except PermissionError as error:
        raise OperatorError(
            f"process {pid} cannot be signalled: {error.strerror}; run this as root, or as the user whaled runs as"
        ) from error
