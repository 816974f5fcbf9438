"""RBF trees: read from their roots, whatever they contain."""

import msgspec

from kit.whales import txid
from whaled.sources.mempool_space.rbf import Tree, relatives


def test_an_rbf_tree_is_read_from_its_root() -> None:
    raw = {
        "tx": {"txid": txid(1), "value": 5, "time": None},
        "time": 30,
        "replaces": [
            {"tx": {"txid": txid(2), "value": 4, "time": 20}, "time": 21, "replaces": []},
            {"tx": {"txid": txid(3)}, "time": 10, "replaces": [{"tx": {"txid": txid(4), "value": 3}, "replaces": []}]},
        ],
    }
    found = {each.txid: (each.value, each.seen, each.replaced_by) for each in relatives(msgspec.convert(raw, Tree))}
    assert found == {
        txid(1): (5, 30, None),
        txid(2): (4, 20, txid(1)),
        txid(3): (None, 10, txid(1)),
        txid(4): (3, None, txid(3)),
    }


def test_a_transaction_below_itself_in_an_rbf_tree_is_not_replaced_by_itself() -> None:
    raw = {"tx": {"txid": txid(1)}, "replaces": [{"tx": {"txid": txid(1)}, "replaces": [{"tx": {"txid": txid(2)}}]}]}
    replaced = [(each.txid, each.replaced_by) for each in relatives(msgspec.convert(raw, Tree))]
    assert replaced == [(txid(1), None), (txid(1), None), (txid(2), txid(1))]
