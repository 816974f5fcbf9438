"""Log output: an event and fields. Text on a terminal, JSON by choice, priorities for journald under systemd."""

import logging
import os
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from whaled.config.sections import Log, LogFormat, LogLevel

# syslog priorities (RFC 5424, 6.2.1), which journald reads from a "<N>" prefix.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}
LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def configure(settings: Log, stream: TextIO = sys.stderr) -> None:
    """Send log lines, the libraries' too, to `stream`. Called again by a reload: the level may change."""
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
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(chosen, stream)],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # Every connection of every client would be a line: the gateway says it once, with the client's name.
    logging.getLogger("websockets").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _format(chosen: LogFormat, stream: TextIO) -> LogFormat:
    if chosen is not LogFormat.AUTO:
        return chosen
    if "JOURNAL_STREAM" in os.environ:
        return LogFormat.JOURNALD
    return LogFormat.TEXT if stream.isatty() else LogFormat.JSON


def _renderers(chosen: LogFormat, stream: TextIO) -> list[structlog.typing.Processor]:
    match chosen:
        case LogFormat.JSON:
            return [
                structlog.processors.format_exc_info,
                structlog.processors.EventRenamer("event"),
                structlog.processors.JSONRenderer(),
            ]
        case LogFormat.JOURNALD:
            return [
                structlog.processors.format_exc_info,
                _with_priority(structlog.processors.LogfmtRenderer(key_order=["event"], drop_missing=True)),
            ]
        case _:
            return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0)]


def _with_priority(render: structlog.processors.LogfmtRenderer) -> structlog.typing.Processor:
    def rendered(logger: WrappedLogger, name: str, event: EventDict) -> str:
        priority = PRIORITIES[event.pop("level", "info")]
        event.pop("logger", None)
        # A traceback has many lines; journald reads a priority from the beginning of each.
        lines = render(logger, name, event).replace("\\n", "\n").splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)

    return rendered
