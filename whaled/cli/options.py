"""The parts shared by all commands. It loads no configuration parser, which `tail` and `simulate` do not need."""

import argparse
from typing import Any, Protocol

from whaled.config import units


class Subparsers(Protocol):
    """The part of the result of argparse's `add_subparsers()` that the commands use."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add a command. It sets `run`, which takes the parsed arguments and returns the exit status."""
        ...


def duration(text: str) -> float:
    """Parse an argument such as 24h into seconds, for argparse."""
    try:
        return units.duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, {error}") from None
