"""The order of questions that gives a mempool."""

import json

from whaled.upstream.dialect import Snapshot, decode
from whaled.upstream.snapshot import PROJECTED_BLOCKS, SnapshotRound


def answer(index: int, count: int = 1) -> Snapshot:
    """A projected block as a backend sends it."""
    rows = [[f"{number:064x}", 500, 141, 7, 3.5, 0, 1_800_000_000] for number in range(count)]
    parts = {"index": index, "sequence": 5, "blockTransactions": rows}
    snapshot = decode(json.dumps({"projected-block-transactions": parts})).snapshot
    assert snapshot is not None
    return snapshot


def asked(text: str | None) -> int:
    """Which block a question is about."""
    assert text is not None
    index: int = json.loads(text)["track-mempool-block"]
    return index


def test_every_projected_block_is_asked_for_in_turn_and_then_no_more() -> None:
    round_ = SnapshotRound()
    questions = [asked(round_.begin())]
    for _ in range(PROJECTED_BLOCKS):
        assert not round_.is_over
        questions.append(asked(round_.answered(answer(questions[-1]))))
    assert round_.is_over
    assert questions == [*range(PROJECTED_BLOCKS), -1]


def test_an_empty_block_is_the_end() -> None:
    round_ = SnapshotRound()
    round_.begin()
    assert asked(round_.answered(answer(0))) == 1
    assert asked(round_.answered(answer(1, count=0))) == -1
    assert round_.is_over


def test_what_was_not_asked_for_is_no_answer() -> None:
    round_ = SnapshotRound()
    assert round_.answered(answer(0)) is None
    round_.begin()
    round_.answered(answer(0))
    assert round_.answered(answer(0)) is None  # the same block again, as it changed
    assert round_.answered(answer(2)) is None
    assert not round_.is_over


def test_beginning_again_starts_over() -> None:
    round_ = SnapshotRound()
    round_.begin()
    round_.answered(answer(0))
    assert asked(round_.begin()) == 0
    assert round_.answered(answer(1)) is None
    assert asked(round_.answered(answer(0))) == 1


def test_changes_of_a_projected_block_are_no_snapshot() -> None:
    change = {"index": 0, "sequence": 6, "delta": {"added": [], "removed": [], "changed": []}}
    assert decode(json.dumps({"projected-block-transactions": change})).snapshot is None
