"""Shapes against labelled transactions: real ones, and those that the protocols' published rules make."""

import json
import re

import pytest
from msgspec.structs import replace

from bench import shapes
from bench.report import table
from bench.samples import Sample, samples
from kit.paths import ROOT
from kit.recordings import real_shapes
from whaled.model import Input, Shape, Transaction
from whaled.sources.mempool_space.transactions import transaction_of
from whaled.whales.amounts import shape

DETECTION = ROOT / "docs" / "detection.md"
# How often one owner may be taken for many.
FALSE_COINJOINS = 0.03
COINJOINS = (
    "joinmarket",
    "joinmarket_pair",
    "whirlpool",
    "wasabi_single",
    "wasabi_levels",
    "wabisabi",
    "wabisabi_small",
)


def blinded(found: Transaction) -> Transaction:
    """The transaction as a backend sends it that does not know what it spends."""
    return replace(found, inputs=tuple(Input(entry.txid, entry.vout, entry.sequence) for entry in found.inputs))


@pytest.mark.parametrize("name", sorted(real_shapes()))
def test_real_transactions_have_their_right_shape_with_and_without_inputs(name: str) -> None:
    entry = real_shapes()[name]
    found = transaction_of(json.dumps(entry["tx"]).encode())
    assert shape(found)[0] == entry["shape"]
    without, reasons = shape(blinded(found))
    assert without == entry["without_inputs"]
    assert reasons[-1:] == ("inputs_unknown",)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [shapes.SEED, 77])
def test_precision_and_recall_hold_for_the_printed_seed_and_another(seed: int) -> None:
    known, unknown = shapes.measure(samples(seed, 60))
    for which in Shape:
        assert known.precision(which) >= 0.98, which
        assert known.recall(which) >= 0.98, which
    assert unknown.precision(Shape.COINJOIN) >= 0.98
    assert unknown.recall(Shape.COINJOIN) >= 0.8
    for kind in dict.fromkeys(name for name, _, _ in known.kinds):
        if kind in COINJOINS:
            assert known.coinjoins(kind) >= 0.95, kind
        else:
            assert max(known.coinjoins(kind), unknown.coinjoins(kind)) <= 2 * FALSE_COINJOINS, kind


def test_the_same_seed_makes_the_same_transactions() -> None:
    def made() -> list[Sample]:
        return list(samples(3, 2))

    assert made() == made()
    assert {sample.kind for sample in made()} > set(COINJOINS)


@pytest.mark.slow
@pytest.mark.long
def test_the_documentation_has_the_measured_values() -> None:
    known, unknown = shapes.measure(samples(shapes.SEED, shapes.EACH))
    text = DETECTION.read_text()
    assert table(shapes.HEADER, shapes.shape_rows(known, unknown)) in text
    assert table(shapes.KIND_HEADER, shapes.kind_rows(known, unknown)) in text
    assert re.search(rf"\b{shapes.EACH} of each kind", text)
