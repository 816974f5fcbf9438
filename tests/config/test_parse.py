"""The configuration as it is read: file, environment and command line, with the place of each fault."""

from pathlib import Path

import pytest

from kit.configuration import WATCH_LIST, faults, read
from whaled.config.keys import keys
from whaled.config.loading import load
from whaled.config.parse import diff, not_reloadable, parse
from whaled.config.render import render
from whaled.config.sections import Config, WatchRule
from whaled.errors import ConfigError
from whaled.model import OwnerType


@pytest.mark.parametrize("text", ["", "# nothing\n", "gateway:\n", "gateway:\n  tls:\n"])
def test_an_empty_file_is_all_defaults(text: str) -> None:
    assert read(text) == Config()


def test_command_line_over_environment_over_file_over_default() -> None:
    text = "gateway: {port: 1001}\n"
    assert read("").gateway.port == 8765
    assert read(text).gateway.port == 1001
    assert read(text, {"WHALED_GATEWAY_PORT": "1002"}).gateway.port == 1002
    assert read(text, {"WHALED_GATEWAY_PORT": "1002"}, {"gateway.port": "1003"}).gateway.port == 1003


def test_the_environment_can_set_every_type() -> None:
    config = read(
        "",
        {
            "WHALED_UPSTREAM_URL": "wss://backend.example/api/v1/ws",
            "WHALED_AUTH_ENABLED": "false",
            "WHALED_GATEWAY_DRAIN_WINDOW": "3s",
            "WHALED_GATEWAY_MAX_FRAME": "1KiB",
            "WHALED_GATEWAY_ORIGINS": "[https://a.example]",
            "WHALED_GATEWAY_TLS_CERTIFICATE": "/c",
            "WHALED_GATEWAY_TLS_PRIVATE_KEY": "/k",
            "WHALED_DETECTION_BASIS": "moved",
            "WHALED_TOKEN": "belongs to another command",
        },
    )
    assert config.upstream.url.startswith("wss://")
    assert (config.auth.enabled, config.gateway.drain_window, config.gateway.max_frame) == (False, 3.0, 1024)
    assert config.gateway.origins == ("https://a.example",)
    assert config.detection.basis == "moved"


def test_every_fault_is_found_at_once_with_line_and_path() -> None:
    found = faults(
        "gateway:\n"
        "  prot: 9000\n"
        "  port: 70000\n"
        "  port: 3\n"
        "  drain_window: 5\n"
        "upstrem: {}\n"
        "threshold_btc: 4\n"
        "log: {level: loud}\n"
        "auth: 5\n"
        "detection: {threshold_btc: .inf, seen_limit: true}\n"
        "upstream: {reconnect_initial: 1m, reconnect_max: 1s}\n",
        {"WHALED_LOG_LEVE": "debug"},
    )
    text = "\n".join(found)
    for expected in (
        "w.yaml:2: gateway.prot: no such key; did you mean `port`?",
        "w.yaml:3: gateway.port: found 70000",
        "w.yaml:4: gateway.port: duplicate key, first at line 3",
        'w.yaml:5: gateway.drain_window: found 5, expected a duration with its unit, from "1ms" to "36525d"; did you',
        "w.yaml:6: upstrem: no such key; did you mean `upstream`?",
        "w.yaml:7: threshold_btc: no such key; did you mean `detection.threshold_btc`?",
        "w.yaml:8: log.level: found 'loud', expected one of debug, info, warning, error",
        "w.yaml:9: auth: expected keys and values",
        "w.yaml:10: detection.threshold_btc: found .inf, expected a number from 0.00000001 to 21000000",
        "w.yaml:10: detection.seen_limit: found true, expected a whole number",
        "w.yaml:11: upstream.reconnect_initial: must not be longer than upstream.reconnect_max",
        "environment variable WHALED_LOG_LEVE: no such setting; did you mean `WHALED_LOG_LEVEL`?",
    ):
        assert expected in text
    assert len(found) == 12
    assert not any("\n" in fault for fault in found)


def test_a_value_from_the_command_line_is_named_by_its_option() -> None:
    found = faults("", flags={"gateway.port": "http", "detection.threshold_btc": "-5"})
    assert found[0].startswith("option --whale-threshold: detection.threshold_btc: found -5")
    assert found[1].startswith("option --ws-port: gateway.port: found 'http'")


@pytest.mark.parametrize(
    "text", ["https://a.example,http://b.example:81", "[https://a.example, 'http://b.example:81']"]
)
def test_a_list_in_the_environment_is_separated_by_commas(text: str) -> None:
    config = read("", {"WHALED_GATEWAY_ORIGINS": text})
    assert config.gateway.origins == ("https://a.example", "http://b.example:81")


def test_a_list_of_sections_is_read_shown_and_read_again() -> None:
    loaded = parse(WATCH_LIST, source="w.yaml", environ={}, flags={})
    assert loaded.config.detection.watch == (
        WatchRule(name="governments", types=(OwnerType.GOVERNMENT, OwnerType.OWN)),
        WatchRule(name="kraken", labels=("Kraken", "Example, Inc."), threshold_btc=0.000_000_01),
    )
    shown = render(loaded)
    assert (
        "    - name: governments  # w.yaml:5\n      labels: []\n      types: [government, own]  # w.yaml:6\n" in shown
    )
    assert read(shown) == loaded.config
    assert diff(Config(), loaded.config) == ("detection.watch", "detection.address_book")
    assert not_reloadable(Config(), loaded.config) == ()


@pytest.mark.parametrize("text", ["detection: {watch: []}", "detection:\n  watch:\n  #  - name: x\n"])
def test_a_list_whose_sections_are_commented_out_is_empty(text: str) -> None:
    assert read(text) == Config()


def test_every_fault_in_a_list_of_sections_has_its_line_and_path() -> None:
    found = faults(
        "detection:\n"
        "  address_book: book.csv\n"
        "  watch:\n"
        "    - name: states\n"
        "      types:\n"
        "        - own\n"
        "        - goverment\n"
        "    - nmae: x\n"
        "      labels: [Kraken, 12]\n"
        "    - name: a b\n"
        "      types: fund\n"
        "      threshold_btc: -1\n"
        "    - 5\n"
        "    - name: ok\n"
        "      name: ok\n"
        "      types: [own]\n"
        '      labels: ["a\\tb"]\n',
        {"WHALED_DETECTION_WATCH": "[]"},
    )
    text = "\n".join(found)
    for expected in (
        "w.yaml:7: detection.watch[0].types[1]: found 'goverment', expected one of exchange, custodian, service,",
        "fund, government, own, other; did you mean `government`?",
        "w.yaml:8: detection.watch[1].nmae: no such key; did you mean `name`?",
        "w.yaml:8: detection.watch[1].name: missing, expected a string of 1 to 64 letters",
        "w.yaml:9: detection.watch[1].labels[1]: found 12, expected a string of 1 to 64 characters; did you mean '12'",
        "w.yaml:10: detection.watch[2].name: found 'a b', expected a string of 1 to 64 letters A-Z and a-z",
        "w.yaml:11: detection.watch[2].types: found 'fund', expected a list, each element one of exchange, custodian",
        "w.yaml:12: detection.watch[2].threshold_btc: found -1, expected a number from 0 to 21000000",
        "w.yaml:13: detection.watch[3]: expected keys and values",
        "w.yaml:13: detection.watch[3].name: missing",
        "w.yaml:15: detection.watch[4].name: duplicate key, first at line 14",
        "w.yaml:17: detection.watch[4].labels[0]: found 'a\\tb', expected a string of 1 to 64 characters, without",
        "environment variable WHALED_DETECTION_WATCH: detection.watch: a variable cannot hold a list of sections",
    ):
        assert expected in text
    assert len(found) == 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("null", ()),
        ("[]", ()),
        ("a.csv", ("a.csv",)),
        ("[a.csv]", ("a.csv",)),
        ("\n  - a.csv\n  - /b, c.csv", ("a.csv", "/b, c.csv")),
    ],
)
def test_an_address_book_is_one_file_or_several(text: str, expected: tuple[str, ...]) -> None:
    loaded = parse(f"detection:\n  address_book: {text}\n", source="w.yaml", environ={}, flags={})
    assert loaded.config.detection.books == expected
    assert read(render(loaded)) == loaded.config
    assert loaded.keys_set == 1
    assert read("", {"WHALED_DETECTION_ADDRESS_BOOK": "/b, c.csv"}).detection.books == ("/b, c.csv",)


def test_each_file_of_an_address_book_has_its_place() -> None:
    loaded = parse("detection:\n  address_book:\n  - a.csv\n  - b.csv\n", source="w.yaml", environ={}, flags={})
    assert loaded.origins["detection.address_book[1]"] == "w.yaml:4"


def test_every_key_has_a_distinct_environment_variable() -> None:
    schema = keys()
    assert len({key.variable for key in schema.values()}) == len(schema)


def test_a_file_that_is_missing_too_large_or_not_text_is_named(tmp_path: Path) -> None:
    for name, body, problem in (
        ("missing", None, "cannot read"),
        ("large", b"#" * 300_000, "larger than 256KiB"),
        ("binary", b"\xff\xfe", "not UTF-8"),
    ):
        path = tmp_path / name
        if body is not None:
            path.write_bytes(body)
        with pytest.raises(ConfigError, match=problem) as caught:
            load(path, environ={}, flags={})
        assert str(path) in str(caught.value)


def test_changed_keys_and_those_that_need_a_restart_are_listed() -> None:
    old, new = read(""), read("gateway: {port: 1}\ndetection: {threshold_btc: 5}\n")
    assert diff(old, new) == ("detection.threshold_btc", "gateway.port")
    assert not_reloadable(old, new) == ("gateway.port",)
