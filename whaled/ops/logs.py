"""The configuration of log output: text on a terminal, journald's own protocol under systemd, JSON otherwise."""

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from whaled.config.sections import LogFormat, LogLevel, LogSettings
from whaled.log_events import MESSAGES
from whaled.ops import journal
from whaled.ops.output import FLUSH_S, Output, OutputHandler
from whaled.summaries import Summary

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The lines per ten seconds of each message of a library.
LIBRARY_LINES = 2
# The most messages that are distinguished, and the number of characters compared.
MAX_EVENTS = 100
MAX_EVENT = 100
NEWLINE = "\n"

LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def configure(
    settings: LogSettings, stream: TextIO | None = sys.stderr, *, journal_socket: Path = journal.SOCKET
) -> None:
    """Send all log lines, including those of libraries, to `stream` or the journal.

    A reload calls this again to apply a new level. `stream` is None in a process that was started without stderr.
    """
    if stream is None:
        before = next((output.stream for output in _outputs()), None)
        stream = before or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    chosen = _format(settings.format, stream)
    level = LEVELS[settings.level]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.StackInfoRenderer(),
    ]
    if chosen is not LogFormat.JOURNALD:  # journald adds the time itself
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=chosen is LogFormat.JSON))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # so that a new configuration, as in tests, applies to existing loggers
    )
    root = logging.getLogger()
    output = _release_output(root, stream)
    handler: journal.JournalHandler | OutputHandler
    render: list[structlog.typing.Processor]
    if chosen is LogFormat.JOURNALD:
        handler = journald = journal.JournalHandler(output, journal_socket, journal.open_socket())
        render = [_add_message, structlog.processors.format_exc_info, journald.render]
    else:
        handler = OutputHandler(output)
        render = [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _add_message,
            *_renderers(chosen, stream),
        ]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    handler.addFilter(LibraryLines())
    output.loss_line = handler.loss_line
    root.addHandler(handler)
    root.setLevel(level)
    # Otherwise each connection would add lines of the libraries to the gateway's own, which has the client id.
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
    """Return whether systemd connected this stream to journald.

    The variable alone does not prove it, since child processes inherit it, including shells in a terminal.
    """
    named = os.environ.get("JOURNAL_STREAM")
    if named is None:
        return False
    try:
        stat = os.fstat(stream.fileno())
    except OSError:  # not a file: a stream in memory
        return False
    return named == f"{stat.st_dev}:{stat.st_ino}"


def _outputs() -> Iterator[Output]:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, (journal.JournalHandler, OutputHandler)):
            yield handler.output


def lost_entries() -> int:
    """Return the number of log entries lost since the start."""
    return sum(output.lost for output in _outputs())


def flush(timeout_s: float = FLUSH_S) -> None:
    """Wait until everything logged is written, but at most `timeout_s`."""
    for output in _outputs():
        output.flush(timeout_s)


def last_words(lines: Iterable[str]) -> None:
    """Write lines to stderr after everything that was logged. Return within FLUSH_S, even if stderr is not read."""
    outputs = list(_outputs())
    for line in lines:
        if outputs:
            outputs[0].put(line)
        else:
            print(line, file=sys.stderr)
    flush()


def _release_output(root: logging.Logger, stream: TextIO) -> Output:
    """Remove the handlers. Return their output if it writes to `stream`, so that its queued lines are not lost."""
    outputs = list(_outputs())
    for old in list(root.handlers):
        root.removeHandler(old)
        if isinstance(old, (journal.JournalHandler, OutputHandler)):
            old.close()
    lost = 0
    for output in outputs:
        if output.stream is stream:
            return output
        output.close()
        lost += output.lost
    return Output(stream, lost=lost)


class LibraryLines(logging.Filter):
    """A rate limit of the lines of libraries, per first line of the message.

    asyncio, for example, logs a traceback for each connection that it cannot accept for lack of a descriptor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._summaries: dict[str, Summary] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record."""
        is_own = isinstance(record.msg, dict)
        # Lines that a remote peer can cause come from the event loop, in the main thread.
        if is_own or threading.current_thread() is not threading.main_thread():
            return True
        event = f"{record.name}: {str(record.msg).partition(NEWLINE)[0][:MAX_EVENT]}"
        if event not in self._summaries and len(self._summaries) >= MAX_EVENTS:
            event = "lines of libraries"
        if event not in self._summaries:
            self._summaries[event] = Summary(
                logger, event, level="warning", per_source=LIBRARY_LINES, in_all=LIBRARY_LINES
            )
        return self._summaries[event].admits(record.name)


def _renderers(chosen: LogFormat, stream: TextIO) -> list[structlog.typing.Processor]:
    if chosen is LogFormat.JSON:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    # The default formatter prints the local variables of every frame, which include tokens and keys.
    return [
        _lead_with_message,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=0,
            exception_formatter=structlog.dev.plain_traceback,
            event_key="message",
        ),
    ]


def _add_message(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the readable message of a log event. Lines of libraries have a text as their event and get none."""
    message = MESSAGES.get(event["event"])
    if message is not None:
        event["message"] = message
    return event


def _lead_with_message(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Make the message what a line of text begins with.

    The identifier follows among the fields of warnings and errors, as the name by which docs/logs.md lists them.
    """
    if "message" not in event:
        event["message"] = event.pop("event")
    elif event.get("level") in {"debug", "info"}:
        del event["event"]
    return event
