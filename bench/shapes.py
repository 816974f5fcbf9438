"""`python -m bench.shapes`: precision and recall of the shapes over labelled transactions (docs/detection.md)."""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.report import Row, table
from bench.samples import Sample, samples
from whaled.model import Shape
from whaled.whales.amounts import shape

SEED, EACH = 1, 300
# The headings of the tables in the documentation; a test compares them.
HEADER: Row = ("shape", "precision", "recall", "precision, inputs unknown", "recall, inputs unknown")
KIND_HEADER: Row = ("made by", "transactions", "right", "coinjoin", "right, inputs unknown", "coinjoin, inputs unknown")


@dataclass(slots=True)
class Confusion:
    """A confusion matrix: counts by (correct shape, found shape), and counts by kind of transaction."""

    pairs: Counter[tuple[Shape, Shape]] = field(default_factory=Counter)
    kinds: Counter[tuple[str, Shape, bool]] = field(default_factory=Counter)

    def add(self, kind: str, right: Shape, found: Shape) -> None:
        """Count a transaction."""
        self.pairs[right, found] += 1
        self.kinds[kind, found, right is found] += 1

    def precision(self, which: Shape) -> float:
        """Return the share of the transactions found to have a shape that do have it."""
        return _part(self.pairs[which, which], sum(n for (_, found), n in self.pairs.items() if found is which))

    def recall(self, which: Shape) -> float:
        """Return the share of the transactions with a shape that were found to have it."""
        return _part(self.pairs[which, which], sum(n for (right, _), n in self.pairs.items() if right is which))

    def right(self, kind: str) -> float:
        """Return the share of a kind whose shape was found correctly."""
        return _part(sum(n for (name, _, good), n in self.kinds.items() if name == kind and good), self.count(kind))

    def coinjoins(self, kind: str) -> float:
        """Return the share of a kind that was found to be a coinjoin."""
        called = sum(n for (name, found, _), n in self.kinds.items() if name == kind and found is Shape.COINJOIN)
        return _part(called, self.count(kind))

    def count(self, kind: str) -> int:
        """Return the number of transactions of a kind."""
        return sum(n for (name, _, _), n in self.kinds.items() if name == kind)


def measure(labelled: Iterable[Sample]) -> tuple[Confusion, Confusion]:
    """Return the confusion matrices with known inputs, and with unknown inputs."""
    known, unknown = Confusion(), Confusion()
    for sample in labelled:
        known.add(sample.kind, sample.shape, shape(sample.transaction)[0])
        unknown.add(sample.kind, sample.shape, shape(sample.no_prevouts)[0])
    return known, unknown


def shape_rows(known: Confusion, unknown: Confusion) -> list[Row]:
    """Return a row per shape."""
    parts = (known.precision, known.recall, unknown.precision, unknown.recall)
    return [(f"`{which}`", *(f"{part(which):.1%}" for part in parts)) for which in Shape]


def kind_rows(known: Confusion, unknown: Confusion) -> list[Row]:
    """Return a row per kind of transaction."""
    kinds = dict.fromkeys(kind for kind, _, _ in known.kinds)
    return [
        (kind, str(known.count(kind)), *(f"{part:.1%}" for found in (known, unknown)
                                         for part in (found.right(kind), found.coinjoins(kind))))
        for kind in kinds
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED, help="another seed makes other transactions (%(default)s)")
    parser.add_argument("--each", type=int, default=EACH, help="transactions of each kind (%(default)s)")
    options = parser.parse_args(arguments)
    known, unknown = measure(samples(options.seed, options.each))
    print(table(HEADER, shape_rows(known, unknown)), table(KIND_HEADER, kind_rows(known, unknown)), sep="\n\n")


def _part(some: int, everything: int) -> float:
    return some / everything if everything else 0.0


if __name__ == "__main__":
    main()
