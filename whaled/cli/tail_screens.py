"""The outputs of `whaled tail`: a table for a person, JSON lines for a program."""

import os
from datetime import datetime
from pathlib import Path
from typing import IO, BinaryIO, Protocol, TextIO

import msgspec
from rich.console import Console
from rich.text import Text

from whaled.cli import tail_lines as lines
from whaled.client import (
    Connected,
    Disconnected,
    Missed,
    Progress,
    StreamEvent,
    TokenRenewed,
    UpstreamStatus,
    WhaleAlert,
    WhaleUpdate,
)

# Used if the terminal reports no width.
FALLBACK_WIDTH = 80


class Terminal(Console):
    """A console that raises on a broken pipe, so that `follow` ends with status 0."""

    def on_broken_pipe(self) -> None:
        """Raise, where rich would end the process."""
        raise BrokenPipeError


class Screen(Protocol):
    """An output for events."""

    def show(self, event: StreamEvent) -> int:
        """Write an event. Return 1 if it counts towards `--count`, else 0."""
        ...

    def discard(self) -> None:
        """Drop buffered output: its reader is gone."""
        ...


class Table:
    """Aligned lines for a person."""

    def __init__(self, out: TextIO, *, width: int | None = None) -> None:
        self._console = Terminal(file=out, highlight=False, width=width)
        if self._console.width < 1:  # some shells and containers set COLUMNS=0
            self._console.width = FALLBACK_WIDTH
        self._columns: tuple[lines.Column, ...] = ()

    def show(self, event: StreamEvent) -> int:
        """Write an alert or update. Titles precede the first one, and the first after a resize changed the columns."""
        if not isinstance(event, WhaleAlert | WhaleUpdate):
            return 0
        fit = lines.layout(self._console.width, is_ascii=self._console.options.ascii_only)
        if fit.columns != self._columns:
            self._columns = fit.columns
            self._print(lines.header(fit))
        now = datetime.now().astimezone()
        self._print(
            lines.alert_line(event, fit, now) if isinstance(event, WhaleAlert) else lines.update_line(event, fit, now)
        )
        return 1

    def _print(self, line: Text) -> None:
        self._console.print(line, no_wrap=True, overflow="crop", crop=True)

    def discard(self) -> None:
        """Drop buffered output."""
        _discard(self._console.file)


class JsonLines:
    """Frames as the server sent them, one per line and each flushed, and a `missed` line for a gap."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def show(self, event: StreamEvent) -> int:
        """Write an alert, an update or a gap."""
        match event:
            case WhaleAlert() | WhaleUpdate():
                self._write(msgspec.json.format(event.raw, indent=-1))
                return 1
            case Missed():
                gap = {"type": "missed", "since": event.since, "position": event.position, "oldest": event.oldest}
                self._write(msgspec.json.encode(gap))
                return 0
            case UpstreamStatus() | Connected() | Disconnected() | Progress() | TokenRenewed():
                return 0

    def _write(self, line: bytes) -> None:
        self._out.write(line + b"\n")
        self._out.flush()

    def discard(self) -> None:
        """Drop buffered output."""
        _discard(self._out)


def _discard(out: IO[str] | IO[bytes]) -> None:
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), out.fileno())
