"""Where the delivery to a client starts."""

from typing import Any

import pytest

from whaled.gateway import commands
from whaled.gateway.positions import Start, not_recovered, start
from whaled.model import Position


@pytest.mark.parametrize(
    ("since", "cursor", "recovered"),
    [
        (None, 20, None),
        (Position("e", 15), 15, True),
        (Position("e", 9), 9, True),  # everything after 9 is held
        (Position("e", 8), 20, False),  # 9 is gone
        (Position("e", 20), 20, True),
        (Position("e", 21), 20, False),  # the future of another log
        (Position("f", 15), 20, False),
        (commands.Last(5), 15, True),
        (commands.Last(500), 9, True),
        (commands.Last(0), 20, True),
    ],
)
def test_a_position_is_honoured_completely_or_not_at_all(since: Any, cursor: int, recovered: bool | None) -> None:
    assert start(since, epoch="e", head=20, oldest=10) == Start(cursor, recovered)


def test_an_empty_log_resumes_at_its_beginning() -> None:
    assert start(Position("e", 0), epoch="e", head=0, oldest=1) == Start(0, True)
    assert start(commands.Last(5), epoch="e", head=0, oldest=1) == Start(0, True)


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (Position("e", 14), Start(14, True)),  # 15 and all that follow are whole
        (Position("e", 13), Start(20, False)),
        (commands.Last(6), Start(14, True)),
        (commands.Last(7), Start(20, False)),
        (None, Start(20, None)),
    ],
)
def test_damage_after_a_position_makes_recovery_impossible(since: Any, expected: Start) -> None:
    assert start(since, epoch="e", head=20, oldest=10, whole_from=15) == expected


def test_a_position_that_is_not_honoured_starts_at_the_head() -> None:
    assert not_recovered(20) == Start(20, recovered=False)
