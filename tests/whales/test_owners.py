"""The table of an address book: small, whole, and the same in every process."""

import random
from collections.abc import Sequence
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.books import address, book
from kit.transactions import ADDRESSES
from whaled.errors import BookError, ConfigError
from whaled.model import OwnerType
from whaled.whales import owners
from whaled.whales.books import MAX_FAULTS, Reading, parse
from whaled.whales.owners import BUCKET, HEADER, MAX_LABELS, RECORD, Owner, Owners


def read(lines: Sequence[str], limit: int | None = None) -> Owners:
    return parse(lines, "book.csv", limit=limit)


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
def test_a_table_of_any_size_is_transferred_completely_to_another_process(count: int) -> None:
    found = read(book(count))
    again = Owners(bytes(found.to_bytes()))
    assert again == found
    assert [again.get(address(number)) is not None for number in range(count + 1)] == [True] * count + [False]
    assert list(again.each_label()) == sorted({f"Owner {number % 7}" for number in range(count)})


@pytest.mark.parametrize("cut", [0, 1, HEADER.size - 1, HEADER.size, -1])
def test_an_incomplete_table_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="table of owners"):
        Owners(bytes(read(book(10)).to_bytes())[:cut] or b"x")


def test_a_table_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="of this version"):
        Owners(b"whaled1\n" + bytes(read(book(10)).to_bytes())[8:])


def test_addresses_of_one_checksum_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_address_may_have_several_labels_and_the_first_line_counts_most() -> None:
    found = read([f"B,{address(1)},miner", f"C,{address(2)},own", f"A,{address(1)},exchange", f"B,{address(1)},miner"])
    first, other = Owner("B", OwnerType.MINER), Owner("A", OwnerType.EXCHANGE)
    assert found.get(address(1)) == first
    assert found.all(address(1)) == (first, other)
    assert found.all(address(2)) == (Owner("C", OwnerType.OWN),)
    assert found.all(address(3)) == ()
    assert (len(found), found.labels, found.several) == (2, 3, 1)


def test_earlier_files_come_first_and_later_ones_add() -> None:
    reading = Reading()
    assert reading.add("mine.csv", [f"Mine,{address(1)},own"])
    assert reading.add("list.csv", [f"Bank,{address(number)},exchange" for number in range(3)])
    assert not reading.add("none.csv", ["label,address,type"])
    found = reading.owners()
    assert [owner.label for owner in found.all(address(1))] == ["Mine", "Bank"]
    assert [owner.label for owner in found.all(address(2))] == ["Bank"]


def test_faults_of_several_files_are_named_with_their_file_and_counted_together() -> None:
    reading = Reading()
    reading.add("a.csv", ["x"] * 3)
    reading.add("b.csv", [f"A,{address(1)},own", *["y"] * 30])
    with pytest.raises(BookError) as error:
        reading.owners()
    lines = str(error.value).splitlines()
    assert [line.partition(": expected")[0] for line in lines[:4]] == [
        "a.csv: line 1", "a.csv: line 2", "a.csv: line 3", "b.csv: line 2"
    ]  # fmt: skip
    assert lines[MAX_FAULTS:] == ["and 13 more lines cannot be used"]
    assert error.value.lines == 33


def test_labels_beyond_the_bound_are_left_out_and_counted() -> None:
    found = read([f"Label {number},{address(1)},own" for number in range(MAX_LABELS + 3)])
    assert [owner.label for owner in found.all(address(1))] == [f"Label {number}" for number in range(MAX_LABELS)]
    assert found.notes == ("3 labels are left out: an address has the first 8",)


def test_a_label_with_a_second_type_counts_once_and_is_named() -> None:
    found = read([f"A,{address(1)},own", f"A,{address(1)},fund"])
    assert found.all(address(1)) == (Owner("A", OwnerType.OWN),)
    assert found.notes == ("1 lines give an address its label again with another type: the first counts",)


def test_a_few_addresses_of_another_network_are_named() -> None:
    test = "tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx"
    found = read([*book(5), f"A,{test},own", f"A,{test},own"])
    assert found.notes == (
        (
            "book.csv: line 6: the first of 2 addresses of testnet or signet, among 5 of mainnet: a backend shows "
            "those of its own network"
        ),
    )
    assert Owners(bytes(found.to_bytes())).notes == found.notes
    assert read([f"A,{test},own"]).notes == ()


def test_groups_of_owners_are_kept_once() -> None:
    lines = [line for number in range(2_000) for line in (f"A,{address(number)},own", f"B,{address(number)},fund")]
    found = read(lines)
    assert found.several == 2_000
    assert found.size_bytes / 2_000 < 21
    again = Owners(bytes(found.to_bytes()))
    assert [owner.label for owner in again.all(address(1_999))] == ["A", "B"]


@pytest.mark.parametrize("line", ["only one column", "x;y;z"])
def test_of_a_book_that_is_wrong_all_over_the_first_lines_are_named_and_the_others_counted(line: str) -> None:
    found = refused([line] * 500)
    assert len(found) == MAX_FAULTS + 1 == 21
    assert found[-1] == "book.csv: and 480 more lines cannot be used"
    assert sum(map(len, found)) < 6_000


def test_more_addresses_than_allowed_are_refused_with_their_number() -> None:
    lines = ["label,address,type", "# mine", *book(120), ""]
    assert len(read(lines, 120)) == 120
    assert refused(lines, 119) == [
        "detection.max_book_addresses: book.csv has 120 addresses, 119 are allowed: raise the limit, or take some out"
    ]
    assert refused(lines, 50) == [
        (
            "detection.max_book_addresses: book.csv has at least 57 addresses, 50 are allowed: raise the limit, or "
            "take some out"
        )
    ]


def test_lines_of_one_address_count_as_one() -> None:
    several = [f"Label {number},{address(0)},own" for number in range(3)]
    assert len(read(several, 1)) == 1
    assert len(read([*several, *book(2)], 2)) == 2
    assert len(read([line for line in book(100) for _ in range(8)], 100)) == 100
    assert refused([*several, *book(3)], 2)[0].startswith("detection.max_book_addresses: book.csv has 3 addresses, 2 ")
    # In any order, and wherever the count falls.
    lines = [line for line in book(40) for _ in range(5)]
    for limit in range(30, 45):
        for order in (lines, lines[::-1], sorted(lines, key=lambda line: line[-9:])):
            assert (len(read(order, limit)) == 40) if limit >= 40 else refused(order, limit)


def test_lines_are_not_kept_without_end() -> None:
    reading = Reading(10)
    reading.add("book.csv", (f"A,{address(0)},own\n" for _ in range(1_000)))
    with pytest.raises(BookError) as error:
        reading.owners()
    assert str(error.value) == (
        "detection.max_book_addresses: book.csv has 1000 lines with an address, at most 80 are allowed, 8 for each of "
        "10 addresses: raise the limit, or take repeated lines out"
    )
    assert sum(map(len, reading._packer._buckets)) == 80 * RECORD.size


def test_the_order_of_the_lines_makes_no_difference() -> None:
    lines = book(400)
    shuffled = random.Random(1).sample(lines, len(lines))
    assert read(shuffled) == read(lines)
