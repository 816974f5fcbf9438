"""The table of an address book: small, whole, and the same in every process."""

import random
from collections.abc import Sequence
from zlib import crc32

import pytest
from book_kit import address, book
from hypothesis import given
from hypothesis import strategies as st

from whale_kit import ADDRESSES
from whaled.errors import ConfigError
from whaled.model import OwnerType
from whaled.whales import owners
from whaled.whales.owners import BUCKET, HEADER, MAX_FAULTS, Owner, Owners, parse


def read(lines: Sequence[str], limit: int | None = None) -> Owners:
    return parse(lambda: lines, "book.csv", limit=limit)


def refused(lines: Sequence[str], limit: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(lines, limit)
    return [str(fault) for fault in error.value.faults]


def test_every_address_has_its_owner_and_others_have_none() -> None:
    found = read(book(3_000))
    assert len(found) == 3_000
    assert found.labels == 7
    types = list(OwnerType)
    for number in range(3_000):
        assert found.get(address(number)) == Owner(f"Owner {number % 7}", types[number % 3])
    assert all(found.get(address(number)) is None for number in range(3_000, 4_000))
    assert found.get("bc1\ud800") is None


def test_a_table_takes_21_bytes_an_address() -> None:
    count = 20_000
    assert read(book(count)).size_bytes / count < 21


@given(st.integers(0, 3 * BUCKET))
def test_a_table_of_any_size_is_taken_over_whole_by_another_process(count: int) -> None:
    found = read(book(count))
    again = Owners(bytes(found.to_bytes()))
    assert again == found
    assert [again.get(address(number)) is not None for number in range(count + 1)] == [True] * count + [False]
    assert list(again.each_label()) == sorted({f"Owner {number % 7}" for number in range(count)})


@pytest.mark.parametrize("cut", [0, 1, HEADER.size - 1, HEADER.size, -1])
def test_a_table_that_is_not_whole_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="table of owners"):
        Owners(bytes(read(book(10)).to_bytes())[:cut] or b"x")


def test_a_table_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="of this version"):
        Owners(b"whaled1\n" + bytes(read(book(10)).to_bytes())[8:])


def test_addresses_of_one_checksum_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(raw: bytes) -> int:
        return crc32(raw) & 0x8000_0001

    monkeypatch.setattr(owners, "crc32", weak)
    found = read(book(300))
    assert [found.get(address(number)) for number in (0, 150, 299)] == [
        Owner(f"Owner {number % 7}", list(OwnerType)[number % 3]) for number in (0, 150, 299)
    ]
    assert found.get(address(300)) is None


def test_an_address_that_comes_again_with_its_owner_counts_once_in_either_case_of_letters() -> None:
    bech32 = next(each for each in ADDRESSES if each.startswith("bc1"))
    found = read([f"A,{bech32},own", f"A,{bech32.upper()},OWN", f"B,{address(1)},own"])
    assert len(found) == 2
    assert found.labels == 2


def test_labels_are_found_and_counted_once_whatever_their_types() -> None:
    lines = [f"{label},{address(number)},{kind}" for number, (label, kind) in enumerate(
        [("b", "own"), ("ä", "miner"), ("b", "exchange"), ("a", "own")]
    )]  # fmt: skip
    found = read(lines)
    assert list(found.each_label()) == ["a", "b", "ä"]
    assert found.labels == 3
    assert [found.has_label(label) for label in ("a", "b", "ä", "", "c", "ab")] == [True] * 3 + [False] * 3


def test_two_owners_of_an_address_are_named_with_the_lines_they_stand_in() -> None:
    kinds = list(OwnerType)
    again = f"Owner 6,{address(6)},{kinds[0]}"
    lines = ["label,address,type", *book(2_000), f"Other,{address(5)},own", "", again, f"Owner 7,{address(6)},own"]
    assert refused(lines) == [
        f"book.csv: line {line}; an address has one owner: remove one of the lines"
        for line in (
            f"2002: {address(5)} is 'Other' (own) here and 'Owner 5' ({kinds[2]}) in line 7",
            f"2005: {address(6)} is 'Owner 7' (own) here and 'Owner 6' ({kinds[0]}) in line 8",
        )
    ]


@pytest.mark.parametrize("line", ["only one column", "", "x;y;z"])
def test_of_a_book_that_is_wrong_all_over_the_first_lines_are_named_and_the_others_counted(line: str) -> None:
    good = book(500)
    lines = [line or f"Other {number},{address(number)},own" for number in range(500)]
    found = refused(lines if line else [*good, *lines])
    assert len(found) == MAX_FAULTS + 1 == 21
    assert found[-1] == "book.csv: and 480 more lines cannot be used"
    assert sum(map(len, found)) < 6_000


def test_more_addresses_than_allowed_are_refused_with_their_number() -> None:
    lines = ["label,address,type", "# mine", *book(120), ""]
    assert len(read(lines, 120)) == 120
    assert refused(lines, 119) == [
        "detection.max_book_addresses: book.csv has 120 addresses, 119 are allowed: split the book or raise the limit"
    ]


def test_the_order_of_the_lines_makes_no_difference() -> None:
    lines = book(400)
    shuffled = random.Random(1).sample(lines, len(lines))
    assert read(shuffled) == read(lines)
