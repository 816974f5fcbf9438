"""The replacements that a backend remembers: trees whose root is the final replacement."""

from typing import TypedDict

from msgspec import Struct

from whaled.simulator.frames import number
from whaled.simulator.market import Seen
from whaled.simulator.transactions import REPLACEABLE
from whaled.simulator.txframes import effective

# A backend keeps 24 hours. Here the number is limited, since each transaction takes about 2 KB.
REMEMBERED = 5_000
# `replacements` shows this many trees; `rbfSummary` six.
TREES_SHOWN = 25
SUMMARIES_SHOWN = 6


class Replacement(Struct, frozen=True):
    """A transaction that is part of a replacement."""

    seen: Seen
    at: int


class RbfTx(TypedDict, total=False):
    """A transaction in a tree, in the stripped form."""

    txid: str
    fee: float
    vsize: float
    value: int
    rate: float
    time: int
    rbf: bool
    fullRbf: bool
    mined: bool


class RbfTree(TypedDict, total=False):
    """A replacement, with the trees of the transactions that it replaced."""

    tx: RbfTx
    time: int
    fullRbf: bool
    interval: int
    mined: bool
    replaces: list["RbfTree"]


class RbfHistory:
    """The known replacements, in both directions. Lost when the backend restarts."""

    def __init__(self) -> None:
        self._txs: dict[str, Replacement] = {}
        self._replaced_by: dict[str, str] = {}
        self._replaces: dict[str, list[str]] = {}
        self._mined: set[str] = set()

    def note(self, loser: Seen, winner: Seen, now: float, *, mined: bool = False) -> None:
        """Record that `winner` replaced `loser`."""
        for seen in (loser, winner):
            self._txs.setdefault(seen.tx.txid, Replacement(seen, int(now)))
        # The backend pairs an older loser again with each later replacement; the tree keeps the first pair.
        if loser.tx.txid not in self._replaced_by:
            self._replaced_by[loser.tx.txid] = winner.tx.txid
            self._replaces.setdefault(winner.tx.txid, []).append(loser.tx.txid)
        if mined:
            self._mined.add(winner.tx.txid)
        while len(self._txs) > REMEMBERED:
            self._forget(next(iter(self._txs)))

    def mined(self, txids: list[str]) -> None:
        """Record that these transactions were mined."""
        self._mined.update(txid for txid in txids if txid in self._txs)

    def cached(self, txid: str) -> Seen | None:
        """Return a transaction that was replaced or replaced another, None for any other."""
        known = self._txs.get(txid)
        return known.seen if known else None

    def replaces(self, txid: str) -> list[str] | None:
        """Return the txids that a transaction replaced directly, None if there are none."""
        return self._replaces.get(txid)

    def tree(self, txid: str) -> RbfTree | None:
        """Return the whole tree that contains a transaction."""
        if txid not in self._txs:
            return None
        while txid in self._replaced_by:
            txid = self._replaced_by[txid]
        if txid not in self._txs:
            return None
        tree = self._branch(txid, None)
        if _has_mined(tree):
            # Set for the whole tree, even if a replaced transaction came back and was mined.
            tree["mined"] = True
        return tree

    def latest(self) -> list[RbfTree]:
        """Return the latest trees, newest first."""
        roots = [txid for txid in reversed(self._replaces) if txid not in self._replaced_by][:TREES_SHOWN]
        return [tree for tree in map(self.tree, roots) if tree is not None]

    def summary(self) -> list[dict[str, object]]:
        """Return `rbfSummary`: the latest replacements, each with the fees of the replaced transactions."""
        found: list[dict[str, object]] = []
        for winner in list(reversed(self._replaces))[:SUMMARIES_SHOWN]:
            new = self._txs[winner].seen
            olds = [self._txs[loser].seen for loser in self._replaces[winner] if loser in self._txs]
            found.append(
                {
                    "txid": winner,
                    "mined": winner in self._mined,
                    "fullRbf": any(old.tx.sequence > REPLACEABLE for old in olds),
                    "oldFee": number(sum(old.fee for old in olds)),
                    "oldVsize": number(sum(old.tx.vsize for old in olds)),
                    "newFee": number(new.fee),
                    "newVsize": number(new.tx.vsize),
                }
            )
        return found

    def _branch(self, txid: str, replaced_at: int | None) -> RbfTree:
        known = self._txs[txid]
        tx = known.seen.tx
        stripped = RbfTx(
            txid=txid,
            fee=number(known.seen.fee),
            vsize=number(tx.vsize),
            value=tx.out_sat,
            rate=number(effective(known.seen)),
            rbf=tx.sequence <= REPLACEABLE,
        )
        if known.seen.first_seen is not None:
            stripped["time"] = known.seen.first_seen
        if txid in self._mined:
            stripped["mined"] = True
        branches = [self._branch(old, known.at) for old in self._replaces.get(txid, ()) if old in self._txs]
        full = any(not branch["tx"]["rbf"] or branch["fullRbf"] for branch in branches)
        if branches:
            stripped["fullRbf"] = any(not branch["tx"]["rbf"] for branch in branches)
        tree = RbfTree(tx=stripped, time=known.at, fullRbf=full, replaces=branches)
        if replaced_at is not None:
            tree["interval"] = replaced_at - known.at
        return tree

    def _forget(self, txid: str) -> None:
        del self._txs[txid]
        self._replaces.pop(txid, None)
        self._mined.discard(txid)
        winner = self._replaced_by.pop(txid, None)
        if winner in self._replaces:
            self._replaces[winner].remove(txid)


def _has_mined(tree: RbfTree) -> bool:
    return "mined" in tree["tx"] or any(map(_has_mined, tree["replaces"]))
