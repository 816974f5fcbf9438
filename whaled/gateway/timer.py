"""The timer of a connection: for the handshake, then authentication, then expiry of the credential, then the close."""

import asyncio
from collections.abc import Callable

# The wall clock may be set while a timer runs, so a deadline by the wall clock is looked at again after this time.
LOOK_AGAIN_S = 3600.0
# The time by which a deadline is extended.
LATER_S = 0.5


class Timer:
    """At most one pending call."""

    __slots__ = ("_deadline", "_handle")

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None
        self._deadline: float | None = None

    def start(self, delay_s: float, callback: Callable[[], object]) -> None:
        """Call `callback` after `delay_s`, instead of the call that is pending, if any."""
        self.stop()
        self._handle = asyncio.get_running_loop().call_later(delay_s, callback)

    def set(self, deadline: float | None, now: float, callback: Callable[[], object]) -> None:
        """Call `callback` at `deadline`, or after LOOK_AGAIN_S if that is earlier; never if it is None.

        Times are in Unix seconds. Does nothing if the timer is set to this deadline already.
        """
        if deadline == self._deadline:
            return
        self.stop()
        self._deadline = deadline
        if deadline is not None:
            self._handle = asyncio.get_running_loop().call_later(min(LOOK_AGAIN_S, max(0.0, deadline - now)), callback)

    def stop(self) -> None:
        """Cancel the pending call."""
        self._deadline = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
