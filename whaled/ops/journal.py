"""Log entries with fields for systemd-journald, in its native protocol, one datagram per entry.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. The event loop logs, so nothing here waits. An entry that
journald does not take at once goes to stderr instead, as lines with a priority prefix, which systemd forwards to
journald (output.py). Entries that stderr does not take either are counted, and the next entry that gets through is
preceded by an entry with their number.
"""

import errno
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from structlog.processors import LogfmtRenderer
from structlog.typing import EventDict, WrappedLogger

from whaled.log_events import MESSAGES
from whaled.ops.output import Output, unshowable

SOCKET = Path("/run/systemd/journal/socket")

# syslog priorities (RFC 5424, 6.2.1)
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}

# An entry is one datagram of at most about 200 KiB by default (net.core.wmem_default). A larger one would require
# memfd_create, which the sandbox denies. These limits keep every entry below half of that.
MAX_FIELDS = 48
MAX_VALUE_BYTES = 1024
MAX_MESSAGE_BYTES = 8 * 1024
MAX_TRACEBACK_BYTES = 24 * 1024
MAX_NAME = 64  # journald drops fields with longer names
# The limit of the message if even such an entry is too large (a smaller net.core.wmem_default).
MIN_MESSAGE_BYTES = 1024

LOSS_EVENT = "log_entries_lost"
LOSS = MESSAGES[LOSS_EVENT]
TRACEBACK = "WHALED_TRACEBACK"
UNFIT = re.compile(r"[^A-Z0-9_]")

_logfmt = LogfmtRenderer(bool_as_flag=False)

Fields = list[tuple[str, str]]


def open_socket() -> socket.socket:
    """Return a socket for `JournalHandler`, which closes it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return fields in the native format: NAME=value, or, if the value has several lines, NAME, length and value.

    The length has 64 bits, little endian.
    """
    parts = []
    for name, value in fields:
        data = value.encode(errors="replace")
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), data))
    return b"".join(parts)


class JournalHandler(logging.Handler):
    """The handler that sends entries to journald. Its formatter must end with `render`.

    Entries that journald does not take go to `output`.
    """

    def __init__(self, output: Output, path: Path, sock: socket.socket) -> None:
        super().__init__()
        self.output = output
        self._path = str(path)
        self._socket = sock
        self._is_unusable = False
        self._fields: Fields = []  # of the entry being formatted, since a formatter returns only text

    def render(self, logger: WrappedLogger, name: str, event: EventDict) -> str:
        """Store the fields of an entry, and return its lines for stderr. This is the last processor."""
        record: logging.LogRecord = event.pop("_record")
        event.pop("_from_structlog")
        priority = PRIORITIES[event.pop("level", "info")]
        source = str(event.pop("logger", record.name))
        traceback = str(event.pop("exception", ""))
        identifier = str(event.pop("event"))
        message = event.pop("message", identifier)
        fields = [(f"WHALED_{key}", _text(value)) for key, value in event.items() if value is not None]
        fields.insert(0, ("WHALED_EVENT", identifier))  # before fields that are too many
        message = f"{message} {_logfmt(logger, name, event)}".rstrip()
        if traceback:
            message += "\n" + traceback
            fields.insert(0, (TRACEBACK, traceback))
        self._fields = [
            ("MESSAGE", _cut(message, MAX_MESSAGE_BYTES)),
            ("PRIORITY", str(priority)),
            ("SYSLOG_IDENTIFIER", "whaled"),
            ("LOGGER", source),
            ("CODE_FILE", record.pathname),
            ("CODE_LINE", str(record.lineno)),
            ("CODE_FUNC", record.funcName or ""),
            *_bounded(fields),
        ]
        # journald reads a priority at the beginning of each line.
        return "\n".join(f"<{priority}>{line}" for line in message.splitlines())

    def emit(self, record: logging.LogRecord) -> None:
        """Send an entry without waiting. logging calls this with the handler's lock held."""
        try:
            lines = self.format(record)
        except Exception:  # noqa: BLE001 - like logging's own handlers, do not raise in the code that logs
            self.handleError(record)
            return
        lost = self.output.take_unreported()
        if lost and self._send(_loss(lost)) is not None:
            self.output.give_back(lost)
        problem = self._send(self._fields)
        if problem is None:
            self._is_unusable = False
            return
        # A full queue empties within moments. Other errors last, so log why the entries have no fields.
        if problem.errno not in {errno.EAGAIN, errno.ENOBUFS} and not self._is_unusable:
            self._is_unusable = self.output.put(
                f"<5>journal not reachable, entries go to stderr without their fields socket={self._path} "
                f'error="{problem.strerror}"'
            )
        self.output.put(lines)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Write why an entry could not be formatted."""
        self.output.put(unshowable(record))

    def loss_line(self, lost: int) -> str:
        """Return the line that reports lost entries on stderr."""
        return f"<4>{LOSS} lost={lost}"

    def flush(self) -> None:
        """Flush the output. logging calls this when the process ends."""
        self.output.flush()

    def close(self) -> None:
        """Close the socket. logging calls this when the process ends."""
        self._socket.close()
        super().close()

    def _send(self, fields: Fields) -> OSError | None:
        try:
            try:
                self._socket.sendto(encode(fields), self._path)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                self._socket.sendto(encode(_least(fields)), self._path)
        except OSError as error:
            return error
        return None


def _loss(lost: int) -> Fields:
    return [
        ("MESSAGE", f"{LOSS} lost={lost}"),
        ("PRIORITY", "4"),
        ("SYSLOG_IDENTIFIER", "whaled"),
        ("LOGGER", __name__),
        ("WHALED_EVENT", LOSS_EVENT),
        ("WHALED_LOST", str(lost)),
    ]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounded(fields: Fields) -> Iterator[tuple[str, str]]:
    for name, value in fields[:MAX_FIELDS]:
        limit = MAX_TRACEBACK_BYTES if name == TRACEBACK else MAX_VALUE_BYTES
        yield UNFIT.sub("_", name.upper())[:MAX_NAME], _cut(value, limit)
    if len(fields) > MAX_FIELDS:
        yield "WHALED_CUT", f"{len(fields) - MAX_FIELDS} fields left out"


def _least(fields: Fields) -> Fields:
    """Return the fields that identify an entry that is too large, and a note that it was cut."""
    kept = {"PRIORITY", "SYSLOG_IDENTIFIER", "LOGGER", "CODE_FILE", "CODE_LINE", "CODE_FUNC"}
    return [
        *((name, value) for name, value in fields if name in kept),
        *((name, _cut(value, MIN_MESSAGE_BYTES)) for name, value in fields if name in {"MESSAGE", "WHALED_EVENT"}),
        ("WHALED_CUT", "too large for the journal's socket: other fields left out"),
    ]


def _cut(text: str, limit_bytes: int) -> str:
    """Return at most `limit_bytes` of a text, plus a note: the beginning and the end.

    The end is kept because a traceback names the exception in its last line.
    """
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return text
    half = limit_bytes // 2
    cut = f" ...[{len(data) - 2 * half} bytes cut]... "
    return data[:half].decode(errors="ignore") + cut + data[-half:].decode(errors="ignore")
