"""`whaled reload`: make a running daemon read its configuration again, and report the result."""

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path

from whaled.admin.door import Door, NoDaemonError, NoResponseError, RefusedError
from whaled.admin.sockets import paths_of_daemon
from whaled.admin.views import Reloaded
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


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "reload",
        help="make a running daemon read its configuration again",
        description="Have a running whaled read its configuration again, over its admin socket or by SIGHUP, and wait "
        "for the result. Under systemd, use `systemctl reload whaled`, which checks the file first and then runs this "
        "command.",
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
    elif (answer := _over_socket(arguments, log_path)) is not None:
        if answer.problem is not None:
            raise OperatorError(f"reload refused, the old configuration stays: {answer.problem}")
        print(f"reloaded by process {answer.pid}")
        return ExitStatus.STOPPED
    pid = arguments.pid if arguments.pid is not None else _holder(log_path)
    outcome = _request(pid, reloads.outcome_path(os.environ, log_path), arguments.timeout)
    if outcome.problem is not None:
        raise OperatorError(f"reload refused, the old configuration stays: {outcome.problem}")
    print(f"reloaded by process {pid}")
    return ExitStatus.STOPPED


def _over_socket(arguments: argparse.Namespace, log_path: Path) -> Reloaded | None:
    """Reload over the admin socket. Return None if there is none, or it refuses: a signal may still work."""
    way = Door(paths_of_daemon(load_for(arguments).config.admin, log_path), arguments.timeout)
    try:
        return way.post("/v1/reload", {}, Reloaded)
    except (NoDaemonError, RefusedError, OperatorError):
        return None
    except NoResponseError:
        raise _no_response(_holder(log_path), arguments.timeout) from None


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


def _holder(log_path: Path) -> int:
    """Return the process that has the event log open. Raises OperatorError if there is none."""
    lock = log_path.with_name(log_path.name + ".lock")
    not_running = OperatorError(
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


def _request(pid: int, path: Path, timeout_s: float) -> reloads.Outcome:
    requested_s = time.monotonic()
    _signal(pid, signal.SIGHUP)
    while (now := time.monotonic()) < requested_s + timeout_s:
        outcome = reloads.read(path)
        if outcome is not None and outcome.pid == pid and requested_s <= outcome.began_s <= now:
            return outcome
        time.sleep(LOOK_S)
        _signal(pid, 0)
    raise _no_response(pid, timeout_s)


def _no_response(pid: int, timeout_s: float) -> WhaledError:
    return WhaledError(
        f"no response from process {pid} within {timeout_s:g} s; its log reports the result of the reload"
    )


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
