"""The backend's trees of replacements; the root of a tree is the transaction that was not replaced. Pure.

The backend (`api/rbf-cache.ts`) keeps a tree for a day and loses it if it restarts without its cache.
"""

from msgspec import Struct, field

from whaled.source import Relative
from whaled.sources.mempool_space.fields import Rate, Seconds, Txid


class _Member(Struct, gc=False):
    txid: Txid
    value: Rate | None = None
    time: Seconds | None = None


class Tree(Struct):
    """A transaction with the subtrees of the transactions that it replaced."""

    tx: _Member
    time: Seconds | None = None
    replaces: list["Tree"] = field(default_factory=list)


def relatives(tree: Tree) -> list[Relative]:
    """Return every transaction of a tree, each after the one that replaced it."""
    found: list[Relative] = []
    waiting: list[tuple[Tree, str | None]] = [(tree, None)]
    while waiting:
        branch, winner = waiting.pop()
        tx = branch.tx
        value = None if tx.value is None else round(tx.value)
        found.append(Relative(tx.txid, value, tx.time if tx.time is not None else branch.time, winner))
        # A transaction cannot replace itself; a child with the txid of its parent has the parent's replacer.
        waiting.extend((child, tx.txid if child.tx.txid != tx.txid else winner) for child in branch.replaces)
    return found
