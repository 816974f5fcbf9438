"""The functions that a call runs, to compare the work of two calls."""

import sys
from collections.abc import Callable
from types import FrameType


def work(call: Callable[[], object]) -> list[str]:
    """Every function that is called, ours and those written in C, in order."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            seen.append(frame.f_code.co_qualname)
        elif event == "c_call":
            seen.append(str(getattr(argument, "__qualname__", argument)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen
