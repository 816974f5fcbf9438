"""Log output to a stream whose reader may stop reading. A separate thread writes, so that no code waits when it logs.

A write to a pipe or a terminal that is not read blocks. Setting the descriptor to non-blocking would change it for all
processes that share it.
"""

import logging
import os
import select
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TextIO

# About 4,000 lines, which is more than a start, a stop or a minute of summaries logs.
LIMIT_BYTES = 1024 * 1024
# The size of one write.
CHUNK_BYTES = 64 * 1024
# The longest wait for unwritten lines when the process ends.
FLUSH_S = 2.0
# The frames that are logged of an exception in formatting a log entry: the last three.
TRACEBACK_FRAMES = -3


class Output:
    """A queue of lines, of at most `limit_bytes`, and the thread that writes them. Entries beyond that are lost.

    `lost` is the number of entries lost since the start. The thread calls `loss_line` for the line that reports
    them. A stream in memory is written directly.
    """

    def __init__(self, stream: TextIO, *, lost: int = 0, limit_bytes: int = LIMIT_BYTES) -> None:
        self.stream = stream
        self.lost = lost
        self.loss_line: Callable[[int], str] = "log entries lost: {}".format
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._held_bytes = 0  # queued, or being written
        self._unreported = 0
        self._is_closing = False
        self._thread: threading.Thread | None = None
        try:
            self._descriptor = os.dup(stream.fileno())
        except (OSError, ValueError):  # a stream in memory (io.UnsupportedOperation is both), or a closed one
            self._descriptor = -1

    def put(self, entry: str) -> bool:
        """Queue an entry of one or more lines, without waiting. Return False if there is no room."""
        data = (entry + "\n").encode(errors="backslashreplace")
        if self._descriptor < 0:
            return self._put_in_memory(entry)
        with self._changed:
            if self._is_closing or self._held_bytes + len(data) > self._limit_bytes:
                self._lose(1)
                return False
            self._lines.append(data)
            self._held_bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_lines, name="log output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def take_unreported(self) -> int:
        """Return and reset the number of lost entries not reported yet. The caller must report it."""
        with self._changed:
            unreported, self._unreported = self._unreported, 0
        return unreported

    def give_back(self, unreported: int) -> None:
        """Restore a number returned by `take_unreported` that could not be reported."""
        with self._changed:
            self._unreported += unreported

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until everything is written, but at most `timeout_s`. Return False if something is left."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held_bytes, timeout_s)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Write the queued lines, within `timeout_s`, then refuse new ones."""
        is_written = self.flush(timeout_s)
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        if self._descriptor >= 0 and is_written:
            if self._thread is not None:
                self._thread.join(timeout_s)
            os.close(self._descriptor)

    def _put_in_memory(self, entry: str) -> bool:
        try:
            self.stream.write(entry + "\n")
            self.stream.flush()
        except (OSError, ValueError, AttributeError):  # the stream is closed, or None in a process without stderr
            with self._changed:
                self._lose(1)
            return False
        return True

    def _lose(self, entries: int) -> None:
        self.lost += entries
        self._unreported += entries

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closing)
                if not self._lines:
                    return
                entries, size = 0, 0
                chunk: list[bytes] = []
                while self._lines and (not chunk or size + len(self._lines[0]) <= CHUNK_BYTES):
                    chunk.append(self._lines.popleft())
                    entries += 1
                    size += len(chunk[-1])
            is_written = self._write(b"".join(chunk))
            report = b""
            if is_written and (unreported := self.take_unreported()):
                report = (self.loss_line(unreported) + "\n").encode(errors="backslashreplace")
            with self._changed:
                self._held_bytes += len(report) - size
                if report:
                    self._lines.append(report)
                if not is_written:
                    self._lose(entries)
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process that shares the descriptor made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                return False
        return True


class OutputHandler(logging.Handler):
    """The handler that passes formatted lines to an output."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Queue an entry without waiting."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - like logging's own handlers, do not raise in the code that logs
            self.handleError(record)
            return
        self.output.put(line)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Write why an entry could not be formatted."""
        self.output.put(unshowable(record))

    def flush(self) -> None:
        """Flush the output. logging calls this when the process ends."""
        self.output.flush()

    def loss_line(self, lost: int) -> str:
        """Return the line that reports lost entries."""
        return self.format(
            logging.makeLogRecord(
                {
                    "name": __name__,
                    "levelno": logging.WARNING,
                    "levelname": "WARNING",
                    "msg": "log_entries_lost",
                    "lost": lost,
                }
            )
        )


def unshowable(record: logging.LogRecord) -> str:
    """Return the line for an entry that could not be formatted: its source and the exception being handled."""
    return f"a log entry cannot be shown ({record.pathname}:{record.lineno})\n{traceback.format_exc(TRACEBACK_FRAMES)}"
