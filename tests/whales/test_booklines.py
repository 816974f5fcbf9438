"""Lines of an address book as spreadsheets and people write them."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.model import OwnerType
from whaled.whales.bookkeys import Network
from whaled.whales.booklines import TYPES, Entry, LineFaultError, Lines

HOT = "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"
ENTRY = Entry("Example, Inc.", HOT, TYPES.index(OwnerType.EXCHANGE), Network.MAINNET)


def read(*lines: str) -> list[Entry]:
    book = Lines()
    return [entry for line in lines if (entry := book.entry(line)) is not None]


def problem(*lines: str) -> str:
    book = Lines()
    for line in lines[:-1]:
        book.entry(line)
    with pytest.raises(LineFaultError) as error:
        book.entry(lines[-1])
    return str(error.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["label,address,type", f'"Example, Inc.",{HOT},exchange'],
        ["label;address;type", f"Example, Inc.;{HOT};exchange"],
        ["label\taddress\ttype", f"Example, Inc.\t{HOT}\texchange"],
        [f"Example, Inc.;{HOT};exchange"],
        [f"Example, Inc.\t{HOT}\texchange"],
        ["sep=;", "label;address;type", f"Example, Inc.;{HOT};exchange"],
        ['"sep=\t"', f"Example, Inc.\t{HOT}\texchange"],
        ["\ufeffsep=,", f'"Example, Inc.",{HOT},exchange'],
        ['"label","address","type"', f'"Example, Inc.","{HOT}","exchange"'],
        ["address,label,type", f'{HOT},"Example, Inc.",exchange'],
        ["Type;Address;Label", f"exchange;{HOT};Example, Inc."],
        ["id,label,address,type,note", f'7,"Example, Inc.",{HOT},exchange,cold'],
        ["label,address,type,,", f'"Example, Inc.",{HOT},Exchange,,'],
        ["label,address,type,source,date,confidence", f'"Example, Inc.",{HOT},exchange,a list,2026-01-02,forensic'],
        ["label,address,type,source,date,confidence", f'"Example, Inc.",{HOT},exchange'],
        [f'"Example, Inc.",{HOT},exchange,a list,2026-01-02'],
        [f'"Example, Inc.",{HOT.upper()},EXCHANGE\r\n'],
        [f" Example, Inc. ; {HOT} ; exchange "],
        ["# Owners; of, addresses", "", "   ", f"Example, Inc.;{HOT};exchange"],
    ],
)
def test_separators_orders_and_additions_that_show_are_read(lines: list[str]) -> None:
    assert read(*lines) == [ENTRY]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["label;address;type", f"A;{HOT}"],
            "expected 3 columns, label;address;type (separated by semicolons), found 2; put a label with a ; in quotes",
        ),
        (
            ["label\taddress\ttype", f"A\t{HOT}\town\tx"],
            (
                "expected 3 columns, label<tab>address<tab>type (separated by tabs), found 4; put a label with a tab "
                "in quotes"
            ),
        ),
        (
            ["label|address|type"],
            "expected 3 columns, label,address,type, found 1; separate them by commas, semicolons or tabs",
        ),
        (
            [f"Example, Inc.,{HOT},exchange"],
            "expected 3 columns, label,address,type, found 4; put a label with a comma in quotes",
        ),
        (
            ["name,address,category"],
            (
                "this line names the columns, and `label` and `type` are missing: found 'name, address, category', "
                "expected label, address and type, in any order"
            ),
        ),
        (
            ["label;address"],
            (
                "this line names the columns, and `type` is missing: found 'label, address', expected label, address "
                "and type, in any order"
            ),
        ),
        (
            [f"{HOT},Example,exchange"],
            (
                "the address is in column 1, expected label,address,type; for another order begin the file with a line "
                "of the columns' names, like address,label,type"
            ),
        ),
        (
            ["label,address,type", f"A,own,{HOT}"],
            (
                "the address is in column 3, expected label,address,type; for another order begin the file with a line "
                "of the columns' names, like address,label,type"
            ),
        ),
        (
            [f"exchange,{HOT},Example"],
            (
                "type must be one of exchange, custodian, service, miner, fund, government, own, other; found "
                "'Example'; label and type are swapped"
            ),
        ),
        ([f"A,{HOT},mining pool"], "government, own, other; found 'mining pool'; the nearest is miner"),
        ([f"A,{HOT},exchange # hot"], "found 'exchange # hot'; a comment has a line of its own"),
        ([f'"A,{HOT},exchange'], "a quote opens and does not close in this line: quotes in a label are doubled, and"),
        ([f'"A"b,{HOT},exchange'], "not CSV: ',' expected after '\"'"),
        (["label,address,type", "A,,own"], "the address is missing"),
    ],
)
def test_an_unreadable_line_is_named_with_its_content(lines: list[str], expected: str) -> None:
    assert problem(*lines).endswith(expected) or problem(*lines).startswith(expected)


def test_a_line_in_another_encoding_is_shown_as_it_may_be_meant() -> None:
    line = f"B\xf6rse K\xf6ln,{HOT},exchange".encode("cp1252").decode("utf-8", "surrogateescape")
    assert problem(line) == (
        f"not UTF-8: byte 0xf6. As Windows-1252, the plain CSV of spreadsheets, it is 'Börse Köln,{HOT},exchange'. "
        "Save the file as CSV UTF-8, or, if that reads right: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    )


def test_a_line_that_is_wrong_does_not_decide_about_the_others() -> None:
    book = Lines()
    with pytest.raises(LineFaultError):
        book.entry("name;address;type")
    assert book.entry(f"A;{HOT};own") == Entry("A", HOT, TYPES.index(OwnerType.OWN), Network.MAINNET)


@given(st.lists(st.text(max_size=200), max_size=4))
def test_no_text_makes_the_reading_fail_otherwise(lines: list[str]) -> None:
    book = Lines()
    for line in lines:
        with suppress(LineFaultError):
            book.entry(line)
