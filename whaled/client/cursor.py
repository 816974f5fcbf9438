"""How far a stream came, and what it asks for when it comes back. Pure: no event is asked for twice, none left out."""

from whaled.client.events import Missed, Subscribed
from whaled.client.failures import ProtocolError
from whaled.client.since import Last, Since
from whaled.model import Position


class Cursor:
    """`received` is the newest position that came in; the consumer may not have got that far yet."""

    def __init__(self, start: Since | None) -> None:
        self._start = start
        self.received = start if isinstance(start, Position) else None

    def ask(self, head: Position | None) -> Since | None:
        """What to subscribe with, `head` being the position in `welcome`.

        A stream that starts now asks for everything since `welcome`: what the server delivers between `welcome` and
        `subscribed` is unfiltered, and would be lost or doubled.
        """
        if self.received is not None:
            return self.received
        return self._start if self._start is not None else head

    def answered(self, asked: Since | None, answer: Subscribed) -> Missed | None:
        """The server subscribed this stream; what it lost, if it did. Raises ProtocolError."""
        head = answer.position
        if asked is None or answer.recovered:
            match asked:
                case Position():
                    self.received = asked
                case Last(last=count) if head is not None:
                    # A place from now on: after a reconnect, `count` back would be another one.
                    self.received = Position(head.epoch, max(0, head.offset - count))
                case None:
                    self.received = head
                case _:
                    pass  # a time stays where it is
            return None
        # Not honoured, or not said whether: what is not promised is not assumed.
        if head is None:
            raise ProtocolError("the server did not recover the position and does not say where it goes on")
        self.received = head
        return Missed(since=asked, position=head, oldest=answer.oldest)

    def take(self, position: Position) -> bool:
        """Whether this position is new; from now on it is not."""
        received = self.received
        if received is not None and received.epoch == position.epoch and position.offset <= received.offset:
            return False
        self.received = position
        return True
