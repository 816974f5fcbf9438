"""docs/client.md says what the client does: its examples compile, its names and defaults are the real ones."""

import argparse
import ast
import re

import msgspec
import pytest

from kit.paths import ROOT
from whaled import client
from whaled.cli import tail
from whaled.client import Limits, Retry

PAGE = (ROOT / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_compile_and_import_what_is_public(example: str) -> None:
    tree = ast.parse(example)
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "whaled.client"
        for alias in node.names
    ]
    assert names
    assert set(names) <= set(client.__all__)


def test_every_public_name_is_explained() -> None:
    unexplained = [name for name in client.__all__ if not re.search(rf"\b{name}\b", PAGE)]
    assert not unexplained


@pytest.mark.parametrize("settings", [Retry(), Limits()])
def test_the_defaults_are_the_real_ones(settings: Retry | Limits) -> None:
    for name, value in msgspec.structs.asdict(settings).items():
        assert re.search(rf"\| .*`{name}`.* \| {re.escape(str(value))} \|", PAGE), name


def test_every_option_of_tail_is_listed() -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    tail.register(subparsers)
    options = {option for action in subparsers.choices["tail"]._actions for option in action.option_strings}
    unlisted = {option for option in options if f"`{option}" not in PAGE}
    assert unlisted == {"-h", "--help", "--updates"}
