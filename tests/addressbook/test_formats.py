"""Label files of other programs: which of their lines become rows of an address book, and which files are refused."""

import io
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.labels import BIP329, KEY, TAGPACK, WALLETEXPLORER, A, B, C, D, written
from kit.transactions import relaxed
from whaled.addressbook import formats
from whaled.addressbook.formats import Format
from whaled.addressbook.rows import LabelFileError, Options, Report, Row, line_of
from whaled.model import OwnerType
from whaled.whales.books import parse


def imported(path: Path, form: Format | None = None, **options: object) -> tuple[list[Row], Report]:
    report = Report()
    found = formats.rows(path, form or formats.format_of(path), Options(**options), report)  # type: ignore[arg-type]
    return list(found), report


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_bip_329_gives_addresses_and_keys_and_counts_the_rest(tmp_path: Path, ending: str, encoding: str) -> None:
    path = written(tmp_path, "labels.jsonl", BIP329.replace("\n", ending), encoding)
    assert formats.format_of(path) is Format.BIP329
    rows, report = imported(path)
    assert rows == [
        Row(label='Cold, "old"', key=A, type=OwnerType.OWN, source="wpkh([d34db33f/84'/0'/0'])"),
        Row(label="Rent über month", key=B, type=OwnerType.OWN),
        Row(label="#1 key", key=KEY, type=OwnerType.OWN),
    ]
    assert dict(report.left_out) == {
        "tx records": 1,
        "without a label": 2,
        "pubkey records of 32 bytes": 1,
        "input records": 1,
        "output records that are not spendable": 1,
        "output records": 1,
        "xpub records": 1,
        "records of other types": 1,
    }
    assert [(line, problem.partition(":")[0]) for line, problem in report.faults] == [
        (14, f"address '{A[:-1]}z' has a wrong checksum"),
        (15, "not a BIP 329 record"),
        (16, "not a BIP 329 record"),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_tags_of_a_tagpack_inherit_fields_before_and_after_them(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, "pack.yaml", TAGPACK.replace("\n", ending))
    assert formats.format_of(path) is Format.TAGPACK
    rows, report = imported(path)
    source, fields = "https://exchange.example/proof", {"date": "2022-11-16", "confidence": "service_data"}
    exchange = OwnerType.EXCHANGE
    assert rows == [
        Row(label="Exchange: reserve #1", key=A, type=exchange, source=source, **fields),
        Row(
            label="Pool, old",
            key=B,
            type=OwnerType.MINER,
            source="https://pool.example/list#main",
            date="2019-08-06",
            confidence="forensic",
        ),
        Row(label="Mixer", key=C, type=exchange, source=source, **fields),
        Row(label="Exchange", key=D, type=exchange, source=source, **fields),
    ]
    assert dict(report.left_out) == {"tags in ETH": 1, "tags of transactions": 1}
    assert report.read == 9
    assert [problem for _, problem in report.faults] == [
        "the tag has no `currency`, nor do the common fields",
        f"address '{D[:-1]}z' has a wrong checksum: a character is mistyped",
        "not a tag: expected fields like `address:` and `label:`",
    ]
    assert report.faults[2][0] == 1 + TAGPACK.split("\n").index("- just a text")


def test_concepts_determine_the_owner_type_if_no_category_does(tmp_path: Path) -> None:
    tags = f"- {{address: {A}, label: M, concepts: [sanction, mixing_service]}}\n- {{address: {B}, label: N}}\n"
    path = written(tmp_path, "pack.yaml", f"currency: BTC\nheader: {{creator: X, lastmod: 2020-01-03}}\ntags:\n{tags}")
    rows, _ = imported(path)
    assert [(row.label, row.type, row.date) for row in rows] == [
        ("M", OwnerType.SERVICE, "2020-01-03"),
        ("N", OwnerType.OTHER, "2020-01-03"),
    ]
    assert [row.type for row in imported(path, type=OwnerType.GOVERNMENT)[0]][1] is OwnerType.GOVERNMENT


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"title: x\ntags:\n- address: {A}\n  label: 'cut sho", "line 4: not YAML: "),
        ("title: x\ntags:\n- a: [", "not YAML: "),
        ("title: x\nlabel: y\n", "not a TagPack: it has no `tags:`"),
        ("- title: x\n", "not a TagPack: expected fields like"),
        ("", "not a TagPack: expected fields like"),
        ("title: x\nactors:\n- id: y\n", "this is an ActorPack: it has no addresses"),
        ("header: !include header.yaml\ntags: []\n", "line 1: `header` includes another file, which is not followed"),
        ("title: \x00\ntags: []\n", "not YAML: "),
    ],
)
def test_an_invalid_tagpack_is_named_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = written(tmp_path, "pack.yaml", text)
    with pytest.raises(LabelFileError) as error:
        imported(path, Format.TAGPACK)
    assert problem in str(error.value)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_walletexplorer_gives_the_wallet_s_name_and_the_export_s_date(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, "huobi.csv", WALLETEXPLORER.replace("\n", ending))
    assert formats.format_of(path) is Format.WALLETEXPLORER
    rows, report = imported(path, type=OwnerType.EXCHANGE)
    url = "https://www.walletexplorer.com/wallet/"
    exchange = OwnerType.EXCHANGE
    assert rows == [
        Row(label="Huobi.com", key=A, type=exchange, source=f"{url}Huobi.com", date="block 523401"),
        Row(label="Huobi.com", key=B, type=exchange, source=f"{url}Huobi.com", date="block 523401"),
        Row(label="Huobi.com-2", key=C, type=exchange, source=f"{url}Huobi.com-2", date="2018-05-20 13:07:31"),
    ]
    assert (report.read, report.faults[0][0]) == (4, 9)


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        (
            WALLETEXPLORER,
            {},
            (
                "WalletExplorer does not state the type of a wallet: give it, like --type exchange, in a separate "
                "command, because --type applies to all files"
            ),
        ),
        (
            f'"#Wallet A"\ndate,received from,received amount,sent amount,sent to,balance,transaction\n1,2,{A}\n',
            {"type": OwnerType.SERVICE},
            "line 2: these are the transactions of a wallet; download its addresses",
        ),
        (f'"#Wallet A"\n{A},0,4,5\n', {"type": OwnerType.SERVICE}, "line 2: expected the columns address,balance,"),
        (f"address,balance\n{A},0\n", {"type": OwnerType.SERVICE}, "no line `#Wallet NAME` before the addresses"),
        ("Too many requests", {"type": OwnerType.SERVICE}, "line 1: expected the columns address,balance,"),
    ],
)
def test_an_invalid_list_of_wallet_addresses_is_named(
    tmp_path: Path, text: str, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(LabelFileError) as error:
        imported(written(tmp_path, "x.csv", text), Format.WALLETEXPLORER, **options)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}\n{{"type":"addr","ref":"{B[:20]}","label":"x"}}'),
        ("x.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}'),
        ("x.csv", f'"#Wallet X"\naddress,balance,incoming txs\n{A},1,2'),
        ("x.csv", f'"#Wallet X"\naddress,balance,incoming txs\n{A},1,2\n '),
        ("x.yaml", f"currency: BTC\nlabel: x\ntags:\n- address: {A}"),
    ],
)
def test_a_complete_last_line_needs_no_line_break(tmp_path: Path, name: str, text: str) -> None:
    rows, _ = imported(written(tmp_path, name, text), type=OwnerType.FUND)
    assert [row.key for row in rows] == [A]


def test_a_label_may_be_given_where_the_file_has_none(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", f"address,balance\n{A},0\n")
    rows, _ = imported(path, type=OwnerType.MINER, label="Pool", source="me")
    assert rows == [Row(label="Pool", key=A, type=OwnerType.MINER, source="me")]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"a,b,c\n", "an unknown format: expected BIP 329, GraphSense TagPack, WalletExplorer; name it with --format"),
        (b"\x1f\x8b\x08\x00", "this is compressed with gzip: unpack it"),
        (b"<html>", "this is a page in HTML or XML: the download gave an error or login page; expected BIP 329, "),
        (
            b"404: Not Found",
            "this is the response of a server, '404: Not Found': the download failed; expected BIP 329",
        ),
        (LFS.encode(), "this is a pointer of Git LFS, not the file itself"),
        (b'[{"type":"addr"}]', "this is JSON; expected BIP 329, "),
        (f"label,address,type\nA,{A},own\n".encode(), "this is an address book already: "),
        (f"# mine\naddress;type;label\n{A};own;A\n".encode(), "this is an address book already: "),
        (f"[Hot] A,{A},own\n".encode(), "this is an address book already: "),
        (f"A,{A},owner\n".encode(), "this is an address book already: "),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(LabelFileError) as error:
        formats.format_of(path)
    assert str(error.value).startswith(what)


@relaxed
@given(
    st.text(min_size=1, max_size=80).filter(lambda text: text.isprintable() and text.strip()),
    st.text(max_size=80),
    st.sampled_from(OwnerType),
)
def test_a_row_that_is_written_is_read_again(label: str, source: str, kind: OwnerType) -> None:
    row = Report().row(1, label=label, key=A, type=kind, source=source, date="2026-01-02")
    if row is None:
        return
    found = parse(["label,address,type,source,date,confidence\n", line_of(row)], "book.csv")
    owner = found.get(A)
    assert owner is not None
    assert (owner.label, owner.type) == (row.label, kind)


# --- the commands ---


@pytest.mark.slow
@pytest.mark.parametrize("form", list(Format))
def test_huge_files_are_not_held_in_memory(tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the file's size is more than any buffer, and less than the file."""
    count = 4_000
    starts = {
        Format.TAGPACK: "currency: BTC\nlabel: x\ntags:\n",
        Format.WALLETEXPLORER: '"#Wallet X"\naddress,balance\n',
    }
    lines = {
        Format.BIP329: f'{{"type":"addr","ref":"{A}","label":"x","heights":[{"800000," * 100}1]}}\n',
        Format.TAGPACK: f"- address: {A}\n  context: {'c' * 800}\n",
        Format.WALLETEXPLORER: f"{A},{'0' * 800},1\n",
    }
    path = written(tmp_path, "x", starts.get(form, "") + lines[form] * count)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    report = Report()
    tracemalloc.start()
    try:
        found = sum(1 for _ in formats.rows(path, form, Options(OwnerType.OWN), report))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found, report.fault_count) == (count, 0)
    assert most < path.stat().st_size / 10


def test_a_line_of_any_length_loses_only_itself(tmp_path: Path) -> None:
    long = "x" * (2 * formats.MAX_LINE + 5)
    path = written(tmp_path, "x.jsonl", f'{{"type":"{long}"}}\n{{"type":"addr","ref":"{A}","label":"x"}}\n')
    rows, report = imported(path, Format.BIP329)
    assert [row.key for row in rows] == [A]
    assert report.faults == [(1, "more than 1,048,576 characters")]
