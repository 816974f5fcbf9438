"""The entry point of `whaled COMMAND`. It prints errors without a traceback and maps them to the exit status."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from whaled import __version__
from whaled.errors import ExitStatus, OperatorError, WhaledError


class Command(NamedTuple):
    """A command: its module, which has `register(subparsers)`, and its line in `whaled --help`."""

    module: str
    help: str


# Only the module of the requested command is imported: `token issue` must not load a web server.
COMMANDS = {
    "run": Command("whaled.cli.run", "run the daemon"),
    "reload": Command("whaled.cli.reload", "make a running daemon read its configuration again"),
    "check-config": Command("whaled.cli.config", "check a configuration file and the files it names"),
    "keys": Command("whaled.cli.keys", "generate, rotate, list and retire signing keys"),
    "token": Command("whaled.cli.tokens", "issue and inspect tokens"),
    "labels": Command("whaled.cli.labels", "import, check and count address books"),
    "coverage": Command("whaled.cli.coverage", "show how many whales of each block were known before it"),
    "accuracy": Command("whaled.cli.accuracy", "show how accurate urgencies and predicted blocks were"),
    "tail": Command("whaled.cli.tail", "watch the alerts of a running whaled"),
    "backup": Command("whaled.cli.backup", "copy the event log while whaled runs"),
    "check": Command("whaled.cli.check", "look for damage in the event log"),
    "repair": Command("whaled.cli.repair", "remove damaged rows from the event log"),
    "restore": Command("whaled.cli.restore", "replace the event log with a backup"),
    "simulate": Command("whaled.cli.simulate", "run a simulated mempool backend"),
}

STDERR = 2
# In characters; systemd accepts at most 4096 bytes per notification.
STATUS_LENGTH = 500

EXAMPLES = """\
examples:
  whaled run --simulate --no-auth --db-path w.db  try it without a node
  whaled keys generate --key-ring keys.json       generate the key that signs tokens
  whaled check-config whaled.yaml                 print every fault of a configuration
  whaled run --config whaled.yaml
  whaled token issue --client c1 --permissions read --ttl 24h
  whaled tail --min-btc 500                       watch alerts in a terminal
"""


def entry() -> None:
    """Run the console script and exit."""
    _hold_standard_descriptors()
    if sys.argv[1:2] == ["run"]:
        # A reload during the start must not end the process; the start reads the configuration anyway.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))


def _hold_standard_descriptors() -> None:
    """Open /dev/null in place of each closed descriptor among stdin, stdout and stderr.

    Otherwise the next file or socket would get its number, and messages of the interpreter or a library would be
    written into it.
    """
    with contextlib.suppress(OSError):  # no /dev/null
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            pass
        os.close(descriptor)


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    arguments = _parser(argv).parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        if sys.stdout is not None:  # None if it was closed at the start
            sys.stdout.flush()
    except WhaledError as error:
        lines = str(error).splitlines()
        if _is_about_files(error):
            lines += _about_working_directory()
        _complain([f"whaled: {line}" for line in lines])
        _report_to_systemd(lines)
        return ExitStatus.CONFIG if isinstance(error, OperatorError) else ExitStatus.FAILED
    except FileNotFoundError:
        lines = _about_working_directory()
        if not lines:
            raise
        _complain([f"whaled: {line}" for line in lines])
        return ExitStatus.CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader is gone (`| head`). Buffered output would raise again when Python flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _is_about_files(error: BaseException) -> bool:
    """Return whether an OSError led to the error, or the error itself asks for an absolute path."""
    if "absolute path" in str(error):
        return True
    causes = (error.__cause__, error.__context__)
    return any(isinstance(cause, OSError) or (cause is not None and _is_about_files(cause)) for cause in causes)


def _about_working_directory() -> list[str]:
    """Return a note if relative paths cannot be resolved, which the errors about files do not mention."""
    remedy = "so relative paths cannot be resolved: use absolute paths"
    try:
        place = os.getcwd()  # noqa: PTH109 - pathlib would only wrap it
    except OSError:
        return [f"note: the working directory is gone, {remedy}"]
    if os.access(".", os.X_OK, effective_ids=True):
        return []
    return [f"note: user {os.geteuid()} may not enter the working directory {place}, {remedy}"]


def _complain(lines: Sequence[str]) -> None:
    logs = sys.modules.get("whaled.ops.logs")
    if logs is not None:  # the command has logged: write behind its lines, and do not wait for a reader that is gone
        logs.last_words(lines)
        return
    for line in lines:
        print(line, file=sys.stderr)


def _report_to_systemd(lines: Sequence[str]) -> None:
    """Set the status line, which `systemctl status` shows while the unit waits for a restart; it shows no log then."""
    if "NOTIFY_SOCKET" in os.environ and lines:
        from whaled.ops.systemd import Notifier  # noqa: PLC0415 - no other command needs it

        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        with contextlib.closing(Notifier()) as systemd:
            systemd.status(lines[0][:STATUS_LENGTH] + more)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whaled",
        description="Whale alerts from your own mempool.space backend: durable, replayable, over WebSocket.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"whaled {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    requested = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        if name == requested:
            importlib.import_module(command.module).register(subparsers)
        else:
            subparsers.add_parser(name, help=command.help)
    return parser
