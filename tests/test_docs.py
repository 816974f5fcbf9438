"""The pages say nothing that the project does not hold: links, commands, examples, names."""

import re
from pathlib import Path

import pytest
import yaml

from whaled.config.parse import parse
from whaled.whales.labels import AddressBook

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_mentioned_are_documented(page: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"\b(whaled_[a-z_]+[a-z])\b", page.read_text()))
    histograms = {name.removesuffix("_bucket") for name in mentioned}
    assert {name for name in histograms if name not in documented} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_examples_are_accepted(page: Path) -> None:
    for text in blocks(page, "yaml"):
        if isinstance(yaml.safe_load(text), dict):
            parse(text, source=page.name, environ={}, flags={})


def test_the_example_address_book_is_accepted() -> None:
    (text,) = blocks(ROOT / "docs" / "detection.md", "csv")
    assert len(AddressBook.parse(text, "detection.md").owners) == 2
