"""The position at which the delivery to a client starts.

Pure.
"""

from msgspec import Struct

from whaled.gateway import commands
from whaled.model import Position


class Start(Struct, frozen=True):
    """The offset before the first event, and whether everything after the requested position is available.

    `recovered` is None if no position was requested.
    """

    cursor: int
    recovered: bool | None


def not_recovered(head: int) -> Start:
    """Return the start of a client whose position cannot be honoured. Recovery is all or nothing."""
    return Start(head, recovered=False)


def start(
    since: Position | commands.Last | None, *, epoch: str, head: int, oldest: int, whole_from: int | None = None
) -> Start:
    """Return where delivery starts for a position of this log, whose newest published event is `head`.

    `oldest` is the oldest offset held. No event from `whole_from` on is damaged; None if none is.
    """
    if since is None:
        return Start(head, None)
    if isinstance(since, commands.Last):
        cursor = max(head - since.last, oldest - 1, 0)
    elif since.epoch != epoch or not oldest - 1 <= since.offset <= head:
        return not_recovered(head)
    else:
        cursor = since.offset
    if whole_from is not None and cursor < whole_from - 1:
        return not_recovered(head)
    return Start(cursor, recovered=True)
