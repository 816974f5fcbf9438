"""Run the command line: `python -m whaled`."""

from whaled.cli.main import entry

entry()
