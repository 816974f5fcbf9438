"""The cursor of a stream, against a model of the log."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kit.streams import at
from whaled.client import (
    Last,
    Position,
)
from whaled.client.cursor import Cursor
from whaled.client.events import Subscribed


@given(seed=st.integers(), filtered=st.booleans(), last=st.none() | st.integers(0, 12))
def test_over_any_sequence_of_disconnects_every_event_comes_once(seed: int, filtered: bool, last: int | None) -> None:
    rng = random.Random(seed)
    head = rng.randrange(20)
    cursor = Cursor(None if last is None else Last(last))
    got: list[int] = []
    start: int | None = None
    for _ in range(rng.randrange(1, 8)):
        asked = cursor.start(at(head))
        head += rng.randrange(3)  # between welcome and subscribe
        match asked:
            case Position():
                begin = asked.offset
            case Last():
                begin = max(0, head - asked.last)
            case other:
                raise AssertionError(other)
        start = begin if start is None else start
        assert cursor.subscribed(asked, Subscribed(recovered=True, position=at(head))) is None
        head += rng.randrange(6)  # live
        cut = rng.randrange(begin, head + 1)  # how far this connection came
        got += [n for n in range(begin + 1, cut + 1) if (n % 3 or not filtered) and cursor.take(at(n))]
    end = got[-1] if got else 0
    assert start is not None
    assert got == [n for n in range(start + 1, end + 1) if n % 3 or not filtered]
