"""Who replaced whom, as the backend tells it: a tree whose root is the transaction that nobody replaced. Pure.

`api/rbf-cache.ts`; kept for a day, lost when the backend restarts without its cache.
"""

from msgspec import Struct, field

from whaled.upstream.transactions import Rate, Seconds, Txid


class _Stripped(Struct, gc=False):
    txid: Txid
    value: Rate | None = None
    time: Seconds | None = None


class Tree(Struct):
    """A transaction and, below it, those it replaced."""

    tx: _Stripped
    time: Seconds | None = None
    replaces: list["Tree"] = field(default_factory=list)


class Relative(Struct, frozen=True):
    """A transaction of such a tree. `value` is the sum of its outputs in satoshi, `seen` when the backend had it first
    (its clock, Unix seconds), `replaced_by` who took its place.
    """

    txid: str
    value: int | None
    seen: float | None
    replaced_by: str | None


def relatives(tree: Tree) -> list[Relative]:
    """Every transaction of a tree, each after the one that replaced it."""
    found: list[Relative] = []
    waiting: list[tuple[Tree, str | None]] = [(tree, None)]
    while waiting:
        branch, winner = waiting.pop()
        tx = branch.tx
        value = None if tx.value is None else round(tx.value)
        found.append(Relative(tx.txid, value, tx.time if tx.time is not None else branch.time, winner))
        # No transaction takes its own place.
        waiting.extend((child, tx.txid if child.tx.txid != tx.txid else winner) for child in branch.replaces)
    return found
