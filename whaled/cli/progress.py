"""How far a copy is, in one line of a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

INTERVAL_S = 0.1


@contextmanager
def progress_line(stream: TextIO, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Takes (done, of all). Shows nothing where nobody watches; the line is gone when left."""
    if not stream.isatty():
        yield _show_nothing
        return
    shown_at = 0.0

    def show(done: int, of_all: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at >= INTERVAL_S:
            shown_at = now
            stream.write(f"\r{doing}: {100 * done // max(1, of_all):3} %")
            stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


def _show_nothing(_done: int, _of_all: int) -> None:
    pass
