"""Log output: an event and fields. Text on a terminal, JSON by choice, journald's own protocol under systemd."""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

import structlog

from whaled.config.sections import Log, LogFormat, LogLevel
from whaled.ops import journal

LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def configure(settings: Log, stream: TextIO = sys.stderr, *, journal_socket: Path = journal.SOCKET) -> None:
    """Send log lines, the libraries' too, to `stream` or the journal. Called again by a reload for a new level."""
    chosen = _format(settings.format, stream)
    level = LEVELS[settings.level]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.StackInfoRenderer(),
    ]
    if chosen is not LogFormat.JOURNALD:  # journald has the time already
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=chosen is LogFormat.JSON))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a test that configures again must be heard
    )
    root = logging.getLogger()
    lost = _remove_handlers(root)
    handler: logging.Handler
    render: list[structlog.typing.Processor]
    if chosen is LogFormat.JOURNALD:
        handler = journald = journal.JournalHandler(stream, journal_socket, journal.open_socket(), lost=lost)
        render = [structlog.processors.format_exc_info, journald.render]
    else:
        handler = logging.StreamHandler(stream)
        render = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(chosen, stream)]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    root.addHandler(handler)
    root.setLevel(level)
    # Every connection of every client would be a line: the gateway says it once, with the client's name.
    logging.getLogger("websockets").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _format(chosen: LogFormat, stream: TextIO) -> LogFormat:
    if chosen is not LogFormat.AUTO:
        return chosen
    if _is_journal(stream):
        return LogFormat.JOURNALD
    return LogFormat.TEXT if stream.isatty() else LogFormat.JSON


def _is_journal(stream: TextIO) -> bool:
    """Whether systemd connected this very stream to journald: the variable is inherited, also by a terminal's shell."""
    named = os.environ.get("JOURNAL_STREAM")
    if named is None:
        return False
    try:
        stat = os.fstat(stream.fileno())
    except OSError:  # not a file: a stream in memory
        return False
    return named == f"{stat.st_dev}:{stat.st_ino}"


def _remove_handlers(root: logging.Logger) -> int:
    """Returns how many entries they could not deliver and have not told of."""
    lost = 0
    for old in list(root.handlers):
        root.removeHandler(old)
        if isinstance(old, journal.JournalHandler):
            lost += old.lost
            old.close()
    return lost


def _renderers(chosen: LogFormat, stream: TextIO) -> list[structlog.typing.Processor]:
    if chosen is LogFormat.JSON:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("event"),
            structlog.processors.JSONRenderer(),
        ]
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0)]
