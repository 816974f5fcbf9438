"""Faults injected into an unmodified daemon: Python imports this module at its start if PYTHONPATH contains it.

SIGRTMIN+2 blocks the event loop, SIGRTMIN+3 hangs the event log's writing thread, SIGRTMIN+1 makes the hub deliver
nothing.
"""

import gc
import signal
import time
from concurrent.futures import ThreadPoolExecutor

FOR_EVER_S = 3600.0


def block_the_loop(*_: object) -> None:
    """Block the event loop: signal handlers run in the main thread, as the loop does."""
    time.sleep(FOR_EVER_S)


def hang_the_writer(*_: object) -> None:
    """Occupy the thread that writes the event log."""
    for found in gc.get_objects():
        if isinstance(found, ThreadPoolExecutor) and "writer" in getattr(found, "_thread_name_prefix", ""):
            found.submit(time.sleep, FOR_EVER_S)


def wedge_the_hub(*_: object) -> None:
    """Make the hub silently drop all that it should deliver."""
    from whaled.gateway import hub  # noqa: PLC0415 - only the daemon can import it, and only after its start

    def deliver_nothing(_members: object, _data: object, _behind: object) -> int:
        return 0

    hub.Hub._write = staticmethod(deliver_nothing)  # type: ignore[method-assign, assignment]


signal.signal(signal.SIGRTMIN + 2, block_the_loop)
signal.signal(signal.SIGRTMIN + 3, hang_the_writer)
signal.signal(signal.SIGRTMIN + 1, wedge_the_hub)
