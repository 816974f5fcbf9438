"""`whaled reload`: asks a running daemon to read its configuration again, and says what came of it."""

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path

from whaled.cli.settings import Subparsers, add_config_option, duration, load_for
from whaled.errors import ExitStatus, OperatorError, WhaledError
from whaled.ops import reloads

# Below the 90 s after which systemd ends a reload by itself (TimeoutStartSec=).
DEFAULT_TIMEOUT_S = 80.0
LOOK_S = 0.05
MAX_LOCK_BYTES = 20
MAX_SHOWN = 100
_MAIN = "whaled/__main__.py"


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "reload",
        help="let a running whaled read its configuration again",
        description="Send SIGHUP to a running whaled, and wait until it has read its configuration again. Under "
        "systemd: systemctl reload whaled, which checks the file first and then does this.",
        epilog="exit status: 0 applied; 78 refused, the old configuration stays; 1 no answer",
    )
    add_config_option(parser)
    parser.add_argument("--db-path", metavar="FILE", help="event log of the daemon (eventlog.path)")
    parser.add_argument(
        "--pid", type=int, metavar="N", help="its process (default: the one that has the event log open)"
    )
    parser.add_argument(
        "--timeout", type=duration, default=DEFAULT_TIMEOUT_S, metavar="TIME", help="how long to wait (default: 80s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reload. Raises OperatorError if it is refused or cannot be asked for, WhaledError if there is no answer."""
    # A refused reload is no state of the daemon: systemd's status line stays its own.
    os.environ.pop("NOTIFY_SOCKET", None)
    log_path = Path() if _is_complete_report(arguments) else Path(load_for(arguments).config.eventlog.path).resolve()
    if arguments.pid is not None:
        _require_daemon(arguments.pid)
    pid = arguments.pid if arguments.pid is not None else _holder(log_path)
    outcome = _ask(pid, reloads.outcome_path(os.environ, log_path), arguments.timeout)
    if outcome.problem is not None:
        raise OperatorError(f"reload refused, the old configuration stays: {outcome.problem}")
    print(f"reloaded by process {pid}")
    return ExitStatus.STOPPED


def _is_complete_report(arguments: argparse.Namespace) -> bool:
    """Under systemd: the configuration may name another event log by now."""
    return arguments.pid is not None and bool(os.environ.get("STATE_DIRECTORY"))


def _require_daemon(pid: int) -> None:
    """Refuse a process that is no `whaled run`: SIGHUP ends most programs. One that cannot be seen is let through."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    names = [Path(word).name for word in words]
    places = [place for place, word in enumerate(words) if names[place] == "whaled" or word.endswith(_MAIN)]
    if not (names[0].startswith(("python", "whaled")) and places and "run" in words[places[0] + 1 :]):
        shown = " ".join(words).strip()[:MAX_SHOWN] or "a process without a command line"
        raise OperatorError(f"--pid {pid} is no `whaled run` but {shown!r}: it was sent nothing")


def _holder(log_path: Path) -> int:
    """The process that has the event log open."""
    lock = log_path.with_name(log_path.name + ".lock")
    nobody = OperatorError(
        f"no running whaled has {log_path} open (eventlog.path): is it running, and with this configuration? "
        "A changed eventlog.path takes a restart"
    )
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise nobody from None
    except OSError as error:
        raise OperatorError(
            f"{lock}: cannot read it: {error.strerror}; ask as root, or as the user whaled runs as"
        ) from error
    try:
        holder = os.read(descriptor, MAX_LOCK_BYTES).strip()
        # Only where there is such a process: the lock of a moment here must not keep one out that starts.
        if holder.isdigit() and Path(f"/proc/{int(holder)}").exists():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(holder)
        raise nobody
    finally:
        os.close(descriptor)


def _ask(pid: int, path: Path, timeout_s: float) -> reloads.Outcome:
    asked_s = time.monotonic()
    _signal(pid, signal.SIGHUP)
    while (now := time.monotonic()) < asked_s + timeout_s:
        outcome = reloads.read(path)
        if outcome is not None and outcome.pid == pid and asked_s <= outcome.began_s <= now:
            return outcome
        time.sleep(LOOK_S)
        _signal(pid, 0)
    raise WhaledError(f"no answer of process {pid} within {timeout_s:g} s; its log says what becomes of the reload")


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
            f"process {pid} cannot be signalled: {error.strerror}; ask as root, or as the user whaled runs as"
        ) from error
