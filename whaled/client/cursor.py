"""The position of a stream, and where it resumes after a reconnect. Pure: no event is skipped or received twice."""

from whaled.client.events import Missed, Subscribed
from whaled.client.failures import ProtocolError
from whaled.client.since import Last, Since
from whaled.model import Position


class Cursor:
    """The position of one stream. `received` is the newest one received; the consumer may still be behind it."""

    def __init__(self, start: Since | None) -> None:
        self._start = start
        self.received = start if isinstance(start, Position) else None

    def start(self, head: Position | None) -> Since | None:
        """Return the `since` to subscribe with. `head` is the position in `welcome`.

        A stream that starts now resumes from `head`: events between `welcome` and `subscribed` are unfiltered, and
        without a position they would be lost or delivered twice.
        """
        if self.received is not None:
            return self.received
        return self._start if self._start is not None else head

    def subscribed(self, since: Since | None, response: Subscribed) -> Missed | None:
        """Advance to where the subscription starts, and return the gap if the server did not honour `since`.

        Raises ProtocolError.
        """
        head = response.position
        if since is None or response.recovered:
            match since:
                case Position():
                    self.received = since
                case Last(last=count) if head is not None:
                    # Fix the start as a position: after a reconnect, `count` events back would be a different one.
                    self.received = Position(head.epoch, max(0, head.offset - count))
                case None:
                    self.received = head
                case _:
                    pass  # a time means the same after a reconnect
            return None
        # `recovered` is false or absent. An absent one promises nothing, so it counts as false.
        if head is None:
            raise ProtocolError("the server did not recover the position and does not state where the stream resumes")
        self.received = head
        return Missed(since=since, position=head, oldest=response.oldest)

    def take(self, position: Position) -> bool:
        """Advance to a position. Return False if it was received before."""
        received = self.received
        if received is not None and received.epoch == position.epoch and position.offset <= received.offset:
            return False
        self.received = position
        return True
