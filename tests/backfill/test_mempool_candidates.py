"""Candidates of the mempool: what a snapshot states of a transaction, and what its fetched body adds."""

import pytest

from whaled.backfill.mempool import Candidate
from whaled.model import Transaction
from whaled.sources.mempool_space.shapes import Stripped

A, B = "aa" * 32, "bb" * 32


@pytest.mark.parametrize(("snapshot", "fee"), [(0.0, 192), (-1.0, 192), (None, 192), (190.0, 190)])
def test_a_fee_of_zero_in_a_snapshot_does_not_override_that_of_the_transaction(
    snapshot: float | None, fee: int
) -> None:
    stripped = Stripped(txid=A, fee=snapshot, vsize=192.0, value=150 * 10**8)
    fetched = Transaction(txid=A, inputs=(), outputs=(), fee_sat=192, vsize=192.0)
    assert Candidate.of(stripped).completing(fetched).fee_sat == fee
