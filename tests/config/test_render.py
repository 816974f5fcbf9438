"""The configuration as it is written: the example, the documentation, and the effective result."""

import re

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kit.configuration import read
from tools import configuration
from tools.configuration import DOCUMENTATION, EXAMPLE, ROOT
from whaled.config import units
from whaled.config.keys import keys, options, reloadable
from whaled.config.loading import load
from whaled.config.parse import parse
from whaled.config.render import render
from whaled.config.sections import Config
from whaled.urls import redacted


def test_the_example_holds_every_key_with_its_default() -> None:
    loaded = load(EXAMPLE, environ={}, flags={})
    assert loaded.config == Config()
    assert set(loaded.origins) == set(keys())


def meanings() -> dict[str, str]:
    """The comment beside every key of the example, by path."""
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in EXAMPLE.read_text().splitlines():
        match = re.match(r"( *)([a-z_]+):(.*?)(?: +# (.*))?$", line)
        if match is None:
            continue
        parents[len(match[1]) // 2 :] = [match[2]]
        if match[3].strip():
            found[".".join(parents)] = match[4] or ""
    return found


def test_the_example_describes_every_key_and_marks_reloadable_ones() -> None:
    said = meanings()
    assert set(said) == set(keys())
    assert all(said.values())
    assert {path for path, text in said.items() if text.endswith("(reload)")} == reloadable()


def test_example_and_documentation_match_the_declarations_of_the_keys() -> None:
    assert EXAMPLE.read_text() == configuration.example(), "run: make configuration"
    page = DOCUMENTATION.read_text()
    assert page == configuration.documentation(page), "run: make configuration"
    rows = re.findall(r"^\| `([a-z]+\.[a-z_.]+)` \| .* \| (yes|no) \| .+ \|$", page, re.MULTILINE)
    assert [path for path, _ in rows] == list(keys())
    assert {path for path, reload in rows if reload == "yes"} == reloadable()


def test_the_documentation_names_every_option_that_sets_a_key() -> None:
    text = DOCUMENTATION.read_text()
    assert options()
    for path, option in options().items():
        assert re.search(rf"^\| `{option.name}[^|]*\| `{path}", text, re.MULTILINE), option


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL))
def test_the_documented_examples_are_valid(block: str) -> None:
    assert read(block) != Config()


def test_the_development_configuration_is_valid_and_stays_on_this_machine() -> None:
    config = load(ROOT / "config" / "dev.yaml", environ={}, flags={}).config
    assert not config.auth.enabled
    assert config.gateway.host == ("127.0.0.1",)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ws://host:1/x", "ws://host:1/x"),
        ("ws://user:pass@host:1/x", "ws://***@host:1/x"),
        ("ws://user:pa@ss@host/x?token=pass", "ws://***@host/x?***"),
        ("user:pass@host", "***@host"),
        ("ws://user:pass@[bad/x", "ws://***@[bad/x"),
        ("ws://user:pa/ss@host", "ws://***@host"),
        ("ws://user:pa?ss@host", "ws://***"),
        ("user:pa://ss@host", "***@host"),
        ("ws://host/x?token=a@b", "ws://***"),
        ("ws://host?token=a/b", "ws://host?***"),
    ],
)
def test_a_url_is_shown_without_parts_that_may_be_secret(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_the_effective_result_reads_back_and_shows_no_password() -> None:
    text = (
        "upstream: {url: 'ws://user:hunter2@host/x'}\n"
        "gateway: {drain_window: 1234567s, max_frame: 1000B, origins: ['https://a.example']}\n"
        "eventlog: {path: /srv/a@b.db}\n"
        "auth: {issuer: 'null'}\n"
    )
    loaded = parse(text, source="w.yaml", environ={}, flags={})
    shown = render(loaded)
    assert "hunter2" not in shown
    again = read(shown)
    assert (again.gateway, again.eventlog, again.auth) == (
        loaded.config.gateway,
        loaded.config.eventlog,
        loaded.config.auth,
    )
    assert "  # w.yaml:1" in shown
    assert set(yaml.safe_load(shown)) == {found.name for found in msgspec.structs.fields(Config)}


@given(st.integers(1, 10**9))
def test_a_size_reads_back(size_bytes: int) -> None:
    assert units.size(units.show_size(size_bytes)) == size_bytes


@given(st.integers(1, 10**12))
def test_a_duration_reads_back(milliseconds: int) -> None:
    assert units.duration(units.show_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, rel=1e-14)


@pytest.mark.parametrize("text", ["", "5", "5 parsecs", "-3s", "1e3s", "s", None, 5, True, "3 s s"])
def test_an_invalid_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        units.duration(text)
