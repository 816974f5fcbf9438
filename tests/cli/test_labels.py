"""`whaled labels`: other label files become an address book, and books are checked and counted."""

import argparse
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.books import address, book
from kit.paths import ROOT
from kit.transactions import relaxed
from whaled.addressbook import formats
from whaled.addressbook.formats import Format
from whaled.addressbook.rows import MAX_FAULTS, LabelFileError, Options, Report, Row, line_of
from whaled.cli import labels
from whaled.cli.main import main
from whaled.model import OwnerType
from whaled.whales.books import parse

Output = pytest.CaptureFixture[str]
A, B, C, D = (address(number) for number in range(4))
KEY = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
TXID = "f91d0a8a78462bc59398f2c5d7a84fcff491c26ba54c4833478b202796c8aafd"

# As the test vectors of BIP 329, with what wallets add.
BIP329 = f"""{{ "type": "tx", "ref": "{TXID}", "label": "Transaction", "origin": "wpkh([d34db33f/84'/0'/0'])" }}
{{ "type": "addr", "ref": "{A}", "label": "Cold, \\"old\\"", "origin": "wpkh([d34db33f/84'/0'/0'])" }}
{{"type":"addr","ref":"{B}","label":"Rent\\u2028 \\u00fcber\\nmonth","keypath":"/1/123","heights":[800000,800001]}}
{{ "type": "addr", "ref": "{C}", "label": "" }}
{{ "type": "addr", "ref": "{C}" }}
{{ "type": "pubkey", "ref": "{KEY}", "label": "#1 key" }}
{{ "type": "pubkey", "ref": "{KEY[2:]}", "label": "x-only" }}
{{ "type": "input", "ref": "{TXID}:0", "label": "Input" }}
{{ "type": "output", "ref": "{TXID}:1", "label": "Output", "spendable": false }}
{{ "type": "output", "ref": "{TXID}:2", "label": "Output", "spendable": "false" }}
{{ "type": "xpub", "ref": "xpub661MyMwAqRbcFtXgS5sYJABqqG9YLmC4Q1Rdap9gSE8Nqtw", "label": "Extended" }}
{{ "type": "silent", "ref": "sp1", "label": "of a later version" }}

{{ "type": "addr", "ref": "{A[:-1]}z", "label": "mistyped" }}
{{ "type": "addr", "ref": 7, "label": "a number" }}
{{ "type": "addr", "ref": "{D}", "label": "no end
"""

# As packs of the public repository look.
TAGPACK = f"""title: Example wallets
creator: Somebody
description: >
  Wallets that an exchange
  published
confidence: service_data
category: exchange
source: https://exchange.example/proof
lastmod: 2022-11-16
is_cluster_definer: true
tags:
- address: '{A}'
  currency: BTC
  label: 'Exchange: reserve #1'
- address: {B}
  label: "Pool, old"
  currency: BTC\x20
  category: miner
  source: https://pool.example/list#main
  lastmod: '2019-08-06'
  confidence: forensic
- label: Mixer
  address: {C}
  currency: BTC
  category: ~
  concepts:
  - sanction
  - mixing_service
  context: '{{"validated": true}}'
- address: '0xbe0eb53f46cd790cd13851d5eff43d12404d33e8'
  currency: ETH
  label: reserve ETH
- tx_hash: {TXID}
  currency: BTC
  label: a transaction
- address: {D}
  currency: BTC
- address: {D}
  label: without a currency
- address: {D[:-1]}z
  currency: BTC
  label: mistyped
- just a text
label: Exchange
"""

WALLETEXPLORER = f""""#Wallet Huobi.com. Updated to block 523401"
address,balance,incoming txs,last used in block
{A},0.,4,520000
{B},1.5,2,521000
"#Wallet Huobi.com-2 (00004f8abc). Updated to block 523402 (2018-05-20 13:07:31)"
address,balance,incoming txs,last used in block
{C},0.00000001,1,

{C[:-1]}z,0,1,1
"""


def imported(path: Path, form: Format | None = None, **options: object) -> tuple[list[Row], Report]:
    report = Report()
    found = formats.rows(path, form or formats.format_of(path), Options(**options), report)  # type: ignore[arg-type]
    return list(found), report


def written(directory: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = directory / name
    path.write_bytes(text.encode(encoding))
    return path


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
    ("name", "text", "line"),
    [
        ("x.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}\n{{"type":"addr","ref":"{B}","la', 2),
        ("x.csv", f'"#Wallet X"\naddress,balance,incoming txs\n{A},1,2\n{B[:20]}', 4),
        ("x.csv", f'"#Wallet X"\naddress,balance,incoming txs\n{A},1,2\n{B},1', 4),
        ("x.yaml", f"currency: BTC\nlabel: x\ntags:\n- address: {A}\n- address: {B[:20]}", 5),
        ("x.yaml", f"currency: BTC\nlabel: x\ntags:\n- address: {A}\n- add", 5),
        ("x.yaml", f"currency: BTC\nlabel: x\ntags:\n- address: {A}\n- address: {B}\n  lab", 7),
    ],
)
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, capsys: Output, name: str, text: str, line: int) -> None:
    path, out = written(tmp_path, name, text), tmp_path / "book.csv"
    whole = written(tmp_path, "whole.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}\n')
    assert run("import", whole, path, "--type", "fund", "--output", out) == 1
    found = capsys.readouterr().err
    assert f"whaled: {path}: line {line}: " in found
    assert "cut short?" in found
    assert not out.exists()


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


def test_a_type_for_all_files_that_takes_own_from_a_wallet_is_warned_of(tmp_path: Path, capsys: Output) -> None:
    wallet = written(tmp_path, "x.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}\n')
    assert run("import", wallet, written(tmp_path, "x.csv", WALLETEXPLORER), "--type", "exchange") == 0
    assert f"whaled: warning: {wallet} (BIP 329): --type exchange applies to all files; " in capsys.readouterr().err
    for options in ((), ("--type", "own")):
        assert run("import", wallet, *options) == 0
        assert "warning" not in capsys.readouterr().err


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


def run(*arguments: str | Path) -> int:
    return main(["labels", *map(str, arguments)])


def test_the_import_is_an_address_book_with_source_and_date(tmp_path: Path, capsys: Output) -> None:
    wallet = written(tmp_path, "labels.jsonl", BIP329)
    pack = written(tmp_path, "pack.yaml", TAGPACK)
    out = tmp_path / "book.csv"
    assert run("import", wallet, pack, "--output", out) == 0
    assert out.read_text().splitlines()[:3] == [
        "label,address,type,source,date,confidence",
        f'"Cold, ""old""",{A},own,wpkh([d34db33f/84\'/0\'/0\'])',
        f"Rent über month,{B},own",
    ]
    err = capsys.readouterr().err.splitlines()
    assert err[3] == (
        f"whaled: {wallet} (BIP 329): 15 read, 3 written; 3 cannot be used; left out: 2 without a label, 1 tx records, "
        "1 pubkey records of 32 bytes, 1 input records, 1 output records that are not spendable, 1 output records, 1 "
        "xpub records, 1 records of other types"
    )
    assert err[-1] == (
        f"whaled: {pack} (GraphSense TagPack): 9 read, 4 written; 3 cannot be used; left out: 1 tags in ETH, 1 tags of "
        "transactions"
    )
    assert run("check", out) == 0
    assert capsys.readouterr().out == "fine: 5 addresses of 7 owners, 2 of them with several labels\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_option_and_format_is_documented() -> None:
    page = (ROOT / "docs" / "labels.md").read_text()
    parser = argparse.ArgumentParser()
    labels.register(parser.add_subparsers())
    (commands,) = (
        action
        for action in parser._subparsers._group_actions[0].choices["labels"]._subparsers._group_actions  # type: ignore[union-attr, index]
    )
    for name, command in commands.choices.items():
        assert f"`whaled labels {name} FILE...`" in page
        options = {option for action in command._actions for option in action.option_strings}
        assert {option for option in options if f"`{option}" not in page} == {"-h", "--help"}
    assert all(form.shown in page and f"`{form}`" in page.replace("--format ", "") for form in Format)


def test_no_file_is_overwritten_or_partially_written(tmp_path: Path, capsys: Output) -> None:
    wallet, out = written(tmp_path, "labels.jsonl", BIP329), tmp_path / "book.csv"
    out.write_text("mine")
    assert run("import", wallet, "--output", out) == 1
    assert run("import", wallet, "--output", out, "--force", "--strict") == 1
    nothing = written(tmp_path, "none.jsonl", '{"type":"tx","ref":"x","label":"y"}\n')
    assert run("import", nothing, "--output", out, "--force") == 1
    broken = written(tmp_path, "pack.yaml", TAGPACK + "x: 'cut")
    assert run("import", wallet, broken, "--output", out, "--force") == 1
    assert run("import", tmp_path / "none", "--output", out, "--force") == 1
    assert run("import", wallet, "--output", tmp_path / "no" / "book.csv") == 1
    err = capsys.readouterr().err
    for expected in (
        f"whaled: {out} exists: --force replaces it",
        "whaled: 3 lines cannot be used: nothing is written (--strict)",
        "whaled: no address was found: nothing is written",
        f"whaled: {broken}: line ",
        f"whaled: cannot read {tmp_path}/none: ",
        f"whaled: cannot write {tmp_path}/no/book.csv: No such file or directory",
    ):
        assert expected in err
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.csv", "labels.jsonl", "none.jsonl", "pack.yaml"]


def test_without_an_output_the_book_goes_to_standard_output(tmp_path: Path, capsys: Output) -> None:
    path = written(tmp_path, "huobi.csv", WALLETEXPLORER)
    assert run("import", path) == 1
    assert run("import", path, "--strict", "--type", "exchange") == 1
    assert capsys.readouterr().out == ""
    assert run("import", path, "--type", "exchange") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"Huobi.com,{A},exchange,https://www.walletexplorer.com/wallet/Huobi.com,block 523401"
    assert len(out) == 4


def test_many_faults_are_counted(tmp_path: Path, capsys: Output) -> None:
    path = written(tmp_path, "x.jsonl", f'{{"type":"addr","ref":"{A}","label":"{"x" * 70}"}}\n' + "{\n" * 30)
    assert run("import", path) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == MAX_FAULTS + 2
    assert err[-2] == f"whaled: {path}: and 10 more lines cannot be used"
    assert err[-1].endswith("31 read, 1 written; 30 cannot be used; 1 labels cut to 64 characters")


def test_check_prints_faults_and_fails(tmp_path: Path, capsys: Output) -> None:
    good = written(tmp_path, "good.csv", "\n".join(book(3)))
    bad = written(tmp_path, "bad.csv", "\n".join([*book(3), *["x"] * 30]))
    assert run("check", good, bad) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{bad}: line 4: expected 3 columns, label,address,type, found 1; separate them by commas, semicolons or tabs"
    )
    assert lines[-2:] == ["and 10 more lines cannot be used", "30 lines cannot be used"]
    for text, problem in (
        ("", "has no address (0 bytes)"),
        ("<html>", "is not an address book but a page in HTML or XML"),
    ):
        assert run("check", written(tmp_path, "x.csv", text)) == 1
        assert capsys.readouterr().out.startswith(f"{tmp_path}/x.csv {problem}")
    assert run("check", good, written(tmp_path, "x.csv", "A,tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx,own")) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"warning: {tmp_path}/x.csv: line 1: the first of 1 addresses of testnet or signet, among 3 of"
    )
    assert out.endswith("fine: 4 addresses of 4 owners\n")


def test_stats_count_by_type_owner_source_and_network(tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "book.csv"
    assert run("import", written(tmp_path, "pack.yaml", TAGPACK), "--output", out) == 0
    lines = written(tmp_path, "mine.csv", "".join(f"Owner {number},{address(number)},own\n" for number in range(30)))
    capsys.readouterr()
    assert run("stats", lines, out) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "30 addresses of 34 owners, 4 of them with several labels; 34 lines with an address\n\ntype\n"
    )
    for expected in (
        "          30  own\n           3  exchange\n           1  miner\n",
        "network\n          34  mainnet\n",
        "source\n          30  (none)\n           3  exchange.example\n           1  pool.example\n",
        "              and 14 more; --all shows them\n",
    ):
        assert expected in shown
    assert run("stats", "--json", lines, out) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["addresses"], counts["entries"], counts["by_type"]["own"]) == (30, 34, 30)
    assert len(counts["by_owner"]) == 34
    assert run("stats", "--all", lines, out) == 0
    assert "more" not in capsys.readouterr().out
    assert run("stats", written(tmp_path, "x.csv", "")) == 1


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
