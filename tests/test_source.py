"""The values of the seam to a source, as a source fills them that is not mempool.space."""

from kit.whales import BTC, NOW, txid
from whaled.model import Input, Output, Transaction, outpoint
from whaled.source import BackendError, Decoded, MempoolChange


def paying(number: int, value: int, fee_sat: int | None = 1_000) -> Transaction:
    """A transaction that spends the first output of the one with the number 1000 higher."""
    inputs = (Input(txid(1000 + number), 0, 0xFFFF_FFFD, Output(value + (fee_sat or 0), "00")),)
    return Transaction(txid=txid(number), inputs=inputs, outputs=(Output(value, "51"),), fee_sat=fee_sat, vsize=100.0)


def test_decoded_transactions_are_found_by_their_amount_and_by_what_they_spend() -> None:
    small, large = paying(1, 99 * BTC, fee_sat=None), paying(2, 100 * BTC - 1_000)
    entered = Decoded((small, large))
    assert entered.at_least(100 * BTC) == [large]
    assert entered.at_least(0) == [small, large]
    assert entered.spending({outpoint(txid(1002), 0), outpoint(txid(7), 0)}) == {outpoint(txid(1002), 0): txid(2)}
    assert entered.size_bytes == 0


def test_a_change_without_parts_changes_nothing() -> None:
    change = MempoolChange(received_at=NOW, received_monotonic=0.0)
    assert (change.entered.added, change.entered.at_least(0), change.predecessor(txid(1))) == ((), [], None)


def test_an_error_has_the_source_s_own_reason() -> None:
    error = BackendError("no_rpc", "the node does not respond", is_backend_wide=True, retry_after_s=3.0)
    assert (error.reason, error.is_backend_wide, error.retry_after_s) == ("no_rpc", True, 3.0)
    assert str(error) == "the node does not respond"
