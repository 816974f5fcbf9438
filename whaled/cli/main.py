"""The command line: `whaled COMMAND`. An error is one clear line, and the exit status says whose it is."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from whaled import __version__
from whaled.errors import ExitStatus, OperatorError, WhaledError

# Command and module. Only the module of the command that is asked for is imported: `token issue` must not wait for a
# web server.
COMMANDS = {
    "run": "whaled.cli.run",
    "check-config": "whaled.cli.config",
    "keys": "whaled.cli.keys",
    "token": "whaled.cli.tokens",
    "tail": "whaled.cli.tail",
    "simulate": "whaled.cli.simulate",
}

EXAMPLES = """\
examples:
  whaled run --simulate --no-auth --db-path w.db   see it work, no node needed
  whaled keys generate --key-ring keys.json       make the key that tokens are signed with
  whaled check-config whaled.yaml                 everything that is wrong with a configuration
  whaled run --config whaled.yaml
  whaled token issue --client c1 --permissions read --ttl 24h
  whaled tail --min-btc 500                       watch alerts in a terminal
"""


def entry() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run a command; returns its exit status."""
    arguments = _parser(argv).parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except OperatorError as error:
        for line in str(error).splitlines():
            print(f"whaled: {line}", file=sys.stderr)
        return ExitStatus.CONFIG
    except WhaledError as error:
        print(f"whaled: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has enough (`| head`). What is still buffered would raise again when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whaled",
        description="Whale alerts from your own mempool.space backend: durable, replayable, over WebSocket.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"whaled {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = argv[0] if argv and argv[0] in COMMANDS else None
    for module in [COMMANDS[asked]] if asked else COMMANDS.values():
        importlib.import_module(module).register(subparsers)
    return parser
