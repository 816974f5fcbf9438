"""The placeholder of a connection's socket."""

from collections.abc import Hashable

from whaled.gateway.share import Lane


class NoSocket:
    """The placeholder before a socket is set and after it is closed. It discards all data."""

    fd = -1
    unsent = 0
    is_closing = True
    is_plain = False
    is_agreed = False
    is_waiting = False
    lane = Lane.STRANGER
    source: Hashable = None

    def write(self, data: bytes) -> None:
        """Discard the data."""

    def end(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""

    def favour(self, jobs: int) -> None:
        """Do nothing."""

    def pause_reading(self) -> None:
        """Do nothing."""


NO_SOCKET = NoSocket()
