"""`whaled labels`: other label files become an address book, and books are checked and counted."""

import argparse
import json
from pathlib import Path

import pytest

from kit.books import address, book
from kit.labels import BIP329, TAGPACK, WALLETEXPLORER, A, B, written
from kit.paths import ROOT
from whaled.addressbook.formats import Format
from whaled.addressbook.rows import MAX_FAULTS
from whaled.cli import labels
from whaled.cli.main import main

Output = pytest.CaptureFixture[str]


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


def test_a_type_for_all_files_that_takes_own_from_a_wallet_is_warned_of(tmp_path: Path, capsys: Output) -> None:
    wallet = written(tmp_path, "x.jsonl", f'{{"type":"addr","ref":"{A}","label":"x"}}\n')
    assert run("import", wallet, written(tmp_path, "x.csv", WALLETEXPLORER), "--type", "exchange") == 0
    assert f"whaled: warning: {wallet} (BIP 329): --type exchange applies to all files; " in capsys.readouterr().err
    for options in ((), ("--type", "own")):
        assert run("import", wallet, *options) == 0
        assert "warning" not in capsys.readouterr().err


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
