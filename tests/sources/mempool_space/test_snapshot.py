"""The order of questions that gives a mempool."""

import json

from whaled.model import PROJECTED_BLOCKS
from whaled.sources.mempool_space.dialect import Snapshot, decode
from whaled.sources.mempool_space.snapshot import SnapshotRound

NOW = 100.0


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


def test_every_projected_block_is_requested_once_in_turn() -> None:
    round_ = SnapshotRound(10.0)
    questions = [asked(round_.begin(NOW))]
    for _ in range(PROJECTED_BLOCKS):
        assert not round_.is_over
        questions.append(asked(round_.answered(answer(questions[-1]), NOW)))
    assert round_.is_over
    assert questions == [*range(PROJECTED_BLOCKS), -1]


def test_an_empty_block_is_the_end() -> None:
    round_ = SnapshotRound(10.0)
    round_.begin(NOW)
    assert asked(round_.answered(answer(0), NOW)) == 1
    assert asked(round_.answered(answer(1, count=0), NOW)) == -1
    assert round_.is_over


def test_the_round_ends_with_the_last_block_that_the_backend_projects() -> None:
    round_ = SnapshotRound(10.0)
    round_.projected(2)
    assert asked(round_.begin(NOW)) == 0
    assert asked(round_.answered(answer(0), NOW)) == 1
    assert asked(round_.answered(answer(1), NOW)) == -1
    assert round_.is_over


def test_a_mempool_that_grows_or_shrinks_meanwhile_moves_the_end() -> None:
    round_ = SnapshotRound(10.0)
    round_.projected(1)
    round_.begin(NOW)
    round_.projected(3)
    assert asked(round_.answered(answer(0), NOW)) == 1
    round_.projected(0)
    assert asked(round_.answered(answer(1), NOW)) == -1


def test_an_answer_is_waited_for_until_its_deadline() -> None:
    round_ = SnapshotRound(10.0)
    dues = [round_.due]
    round_.begin(NOW)
    dues.append(round_.due)
    round_.answered(answer(0), NOW + 5.0)
    dues.append(round_.due)
    assert asked(round_.end()) == -1
    dues.append(round_.due)
    assert dues == [None, NOW + 10.0, NOW + 15.0, None]
    assert round_.answered(answer(1), NOW) is None


def test_an_unrequested_block_is_no_response() -> None:
    round_ = SnapshotRound(10.0)
    assert round_.answered(answer(0), NOW) is None
    round_.begin(NOW)
    round_.answered(answer(0), NOW)
    assert round_.answered(answer(0), NOW) is None  # the same block again, as it changed
    assert round_.answered(answer(2), NOW) is None
    assert not round_.is_over


def test_beginning_again_starts_over() -> None:
    round_ = SnapshotRound(10.0)
    round_.begin(NOW)
    round_.answered(answer(0), NOW)
    assert asked(round_.begin(NOW)) == 0
    assert round_.answered(answer(1), NOW) is None
    assert asked(round_.answered(answer(0), NOW)) == 1


def test_changes_of_a_projected_block_are_no_snapshot() -> None:
    change = {"index": 0, "sequence": 6, "delta": {"added": [], "removed": [], "changed": []}}
    assert decode(json.dumps({"projected-block-transactions": change})).snapshot is None
