"""The txids that were examined: compared with the mempool, and bounded in memory."""

import pytest

from kit.whales import txid
from whaled.backfill import seen_txids
from whaled.backfill.seen_txids import SeenTxids


def test_a_comparison_finds_unexamined_transactions_and_forgets_those_that_left() -> None:
    seen = SeenTxids()
    seen.add(txid(n) for n in range(4))
    assert seen.compare(txid(n) for n in range(2, 6)) == [txid(4), txid(5)]
    assert [n for n in range(6) if txid(n) in seen] == [2, 3]
    seen.discard([txid(2), txid(7)])
    assert seen.compare([txid(2), txid(3)]) == [txid(2)]
    assert len(seen) == 1


def test_examined_transactions_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_txids, "SEEN_LIMIT", 100)
    seen = SeenTxids()
    for n in range(1_000):
        seen.add([txid(n)])
        assert len(seen) <= 100


def test_seen_txids_give_memory_back_when_the_mempool_empties() -> None:
    seen = SeenTxids()
    seen.add(txid(n) for n in range(20_000))
    full = seen.table_bytes
    seen.discard(txid(n) for n in range(1_000, 20_000))
    assert len(seen) == 1_000
    assert seen.table_bytes < full / 8
    seen.add(txid(n) for n in range(20_000))
    seen.compare([txid(1)])
    assert seen.table_bytes < full / 100


def test_a_comparison_keeps_the_memory_of_what_was_examined() -> None:
    # New integers would lie among the texts of the mempool, and hold those pages when the texts are freed.
    seen = SeenTxids()
    seen.add(txid(n) for n in range(2_000))
    before = {id(key) for key in seen._hashes}
    seen.compare(txid(n) for n in range(1_000, 2_000))
    assert len(seen) == 1_000
    assert {id(key) for key in seen._hashes} <= before
