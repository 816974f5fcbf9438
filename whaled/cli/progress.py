"""A progress line for a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

INTERVAL_S = 0.1


@contextmanager
def progress_line(stream: TextIO, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (done, total) and updates the line. Erases the line on exit.

    It writes nothing if `stream` is not a terminal.
    """
    if not stream.isatty():
        yield _show_nothing
        return
    shown_at = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at >= INTERVAL_S:
            shown_at = now
            stream.write(f"\r{doing}: {100 * done // max(1, total):3} %")
            stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


def _show_nothing(_done: int, _total: int) -> None:
    pass
