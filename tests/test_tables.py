"""Tables that are built anew once they are sparse."""

import sys
from collections import OrderedDict
from typing import Any

import pytest

from whaled.tables import LEAST, SPARSE, Tables

MANY = 40 * LEAST


def filled(kind: type[Any]) -> Any:
    return set(range(MANY)) if kind is set else kind.fromkeys(range(MANY))


def left(table: Any, count: int) -> None:
    for number in range(MANY - count):
        table.discard(number) if isinstance(table, set) else table.pop(number)


@pytest.mark.parametrize("kind", [set, dict, OrderedDict])
def test_a_table_that_was_emptied_is_small_again_and_holds_the_same(kind: type[Any]) -> None:
    table = filled(kind)
    tables = Tables(table)
    tables.shrink()
    full = sys.getsizeof(table)
    left(table, LEAST)
    assert sys.getsizeof(table) > full / 2  # what Python leaves
    tables.shrink()
    assert sys.getsizeof(table) < full / 10
    assert list(table) == list(range(MANY - LEAST, MANY)) or isinstance(table, set)
    assert set(table) == set(range(MANY - LEAST, MANY))


def test_a_table_that_is_not_sparse_is_left_alone() -> None:
    table = filled(dict)
    tables = Tables(table)
    tables.shrink()
    full = sys.getsizeof(table)
    left(table, int(MANY * SPARSE) + 1)
    tables.shrink()
    assert sys.getsizeof(table) == full


def test_a_table_is_compared_with_its_largest_size_since_it_was_built() -> None:
    table: set[int] = set(range(MANY))
    tables = Tables(table)
    tables.shrink()
    for _ in range(3):
        table.intersection_update(range(LEAST * 2))
        tables.shrink()
        small = sys.getsizeof(table)
        tables.shrink()
        assert sys.getsizeof(table) == small
        table.update(range(MANY))
        tables.shrink()
