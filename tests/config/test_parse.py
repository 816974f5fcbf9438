import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tools import configuration
from tools.configuration import DOCUMENTATION, EXAMPLE, ROOT
from whaled.config import units
from whaled.config.keys import keys, options, reloadable
from whaled.config.loading import load
from whaled.config.parse import Loaded, diff, not_reloadable, parse
from whaled.config.render import render, written
from whaled.config.sections import Config, WatchRule
from whaled.errors import ConfigError
from whaled.model import OwnerType
from whaled.urls import redacted


def read(text: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> Config:
    return parse(text, source="w.yaml", environ=environ or {}, flags=flags or {}).config


def faults(text: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, environ, flags)
    return [str(fault) for fault in caught.value.faults]


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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "not valid YAML"),
        ("a:\n\t- b", "not valid YAML"),
        ("- a\n- b\n", "expected keys and values"),
        ("just text", "expected keys and values"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("gateway: {origins: [*]}", "w.yaml:1: not valid YAML: expected alphabetic or numeric character, but found"),
        ("gateway: {origins: [*]}", '; to write a star, put it in quotes: "*"'),
        ("gateway:\n  origins: *\n", '; to write a star, put it in quotes: "*"'),
        ("gateway:\n  host: ::\n", '; an address with two colons needs quotes: "::1"'),
        ("gateway: {host: [::1, 127.0.0.1]}", '; an address with two colons needs quotes: "::1"'),
        ("gateway: {port: 2026-99-99}", "gateway.port"),
        ("? [a, b]\n: c\n", "w.yaml:1: a key must be a plain word"),
        ("\x00", "w.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("[" * 200_000, "nested too deeply"),
        ("upstream: {url: " + "[" * 600 + "]" * 600 + "}", "not valid YAML: nested too deeply"),
        ("upstream: {url: !!python/object:os.system x}", "w.yaml:1: upstream.url: not a valid YAML value"),
        ("gateway: {port: 1}\nhttp: {}\ngateway:\n  prot: 1\n", "w.yaml:4: gateway.prot: no such key"),
        ("gateway: {max_frame: %sKiB}" % ("9" * 400), "gateway.max_frame"),
        ("gateway: {max_frame: 1.0001KiB}", "whole number of bytes"),
        ("gateway: {max_frame: 16384}", 'did you mean "16384B"?'),
        (f"gateway: {{backlog: {10**30}}}", "gateway.backlog"),
        ("detection: {threshold_btc: %s}" % ("9" * 400), "detection.threshold_btc"),
        ("detection: {threshold_btc: 1.0e-9}", "detection.threshold_btc"),
        ("detection: {threshold_btc: '100'}", "did you mean 100, without quotes?"),
        ("auth: {max_token_ttl: 99999999d}", "auth.max_token_ttl"),
        ("auth: {leeway: 31s}", """found '31s', expected a duration with its unit, from "0ms" to "30s\""""),
        ("auth: {issuer: 12}", "a string or null; did you mean '12', in quotes?"),
        ("auth: {issuer: ''}", "auth.issuer"),
        ("auth: {enabled: 'no'}", "expected true or false"),
        ("eventlog: {path: ~/whaled.db}", "~ is not expanded"),
        ('eventlog: {path: "a\\0b"}', "eventlog.path"),
        ("gateway: {port: null}", "gateway.port: found null"),
        ("gateway: {host: '127.0.0.1:80'}", "the port is set by the key `port`"),
        ("gateway: {host: '[::1]'}", "without brackets"),
        ("gateway: {host: a b}", "gateway.host"),
        (
            "gateway: {host: no}",
            "found no, expected an address or a host name; YAML reads no as false; did you mean 'no'",
        ),
        ("http: {host: []}", "http.host: found [], expected an address or a host name, or a list of at most 16"),
        (f"http: {{host: {[f'h{number}' for number in range(17)]}}}", "a list of at most 16"),
        ("http:\n  host:\n    - 127.0.0.1\n    - a b\n", "w.yaml:4: http.host[1]: found 'a b'"),
        ("gateway: {port: 9000}\nhttp: {port: 9000}", "http.port"),
        ("gateway: {origins: [https://a.example/]}", "expected an origin"),
        ("gateway: {origins: ['https://u@a.example']}", "expected an origin"),
        ("gateway: {origins: ['https://A.example']}", "expected an origin"),
        ("upstream: {url: 'ws://h/x#y'}", "expected ws://"),
        ("upstream: {url: 'ws://h h/x'}", "expected ws://"),
        ("upstream: {url: http://x}", "expected ws://"),
        ("upstream: {url: 'ws://'}", "expected ws://"),
        ("upstream: {url: 'ws://h:99999999/'}", "expected ws://"),
        ("upstream: {rest_url: ftp://x}", "expected http://"),
        ("upstream: {reconnect_initial: 1m, reconnect_max: 1s}", "reconnect_max"),
        ("upstream: {ping_interval: 2m}", "upstream.ping_interval"),
        ("gateway: {tls: {certificate: c.pem}}", "gateway.tls.private_key"),
        ("gateway: {origins: [nonsense]}", "expected an origin"),
        ("http: {allowed_hosts: ['http://whaled.internal']}", "expected a host name in lower case"),
        ("http: {allowed_hosts: ['whaled.internal:9108']}", "expected a host name in lower case"),
        ("http: {allowed_hosts: [Whaled.Internal]}", "expected a host name in lower case"),
        ("http: {allowed_hosts: ['']}", "expected a host name in lower case"),
        (
            "gateway: {origins: https://a.example}",
            "a list of origins; did you mean ['https://a.example'], a list of one?",
        ),
        ("auth: {token_ttl: 100d}", "auth.max_token_ttl"),
        ("detection: {threshold_btc: 0}", "detection.threshold_btc"),
        ("http: {port: -1}", "http.port"),
        ("eventlog: {path: ''}", "eventlog.path"),
    ],
)
def test_an_invalid_value_is_refused(text: str, problem: str) -> None:
    assert problem in "\n".join(faults(text))


def test_no_fault_is_reported_for_a_key_whose_partner_is_at_fault() -> None:
    found = faults("upstream: {stale_after: 5, ping_interval: 50s}\n")
    assert len(found) == 1
    assert "upstream.stale_after" in found[0]


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


WATCH_LIST = """
detection:
  address_book: book.csv
  watch:
    - name: governments
      types: [government, own]
    - {name: kraken, labels: [Kraken, 'Example, Inc.'], threshold_btc: 0.00000001}
"""


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
    ("text", "problem"),
    [
        ("watch: {name: x}", "w.yaml:3: detection.watch: expected a list of sections (`- key: value`)"),
        ("watch: x", "w.yaml:3: detection.watch: expected a list of sections"),
        (
            f"watch: [{', '.join(f'{{name: n{n}, types: [own]}}' for n in range(101))}]",
            "found 101 sections, expected at",
        ),
        ("watch: [{name: x}]", "w.yaml:3: detection.watch[0]: matches nothing: set `labels` or `types`"),
        ("watch: [{name: x, labels: []}]", "matches nothing"),
        (
            "watch: [{name: x, types: [own]},\n    {name: x, types: [own]}]",
            "w.yaml:4: detection.watch[1].name: 'x' is also the name of detection.watch[0]",
        ),
        (f"watch: [{{name: {'x' * 65}, types: [own]}}]", "detection.watch[0].name: found"),
        (f"watch: [{{name: x, labels: [{'x' * 65}]}}]", "detection.watch[0].labels[0]: found"),
        ("'watch[0]': {name: x}", "detection.watch[0]: no such key; did you mean `watch`?"),
        ("'watch[0].name': x", "detection.watch[0].name: no such key"),
        ("threshold_btc: null", "detection.threshold_btc: null needs another rule"),
        ("threshold_usd: 0", "detection.threshold_usd: found 0"),
        ("threshold_usd: 1000000.0\n  price_max_age: 7200", 'did you mean "7200s"?'),
    ],
)
def test_a_watch_list_that_cannot_be_is_refused(text: str, problem: str) -> None:
    found = faults(f"detection:\n  address_book: b\n  {text}\n")
    assert problem in "\n".join(found)
    assert len(found) == 1


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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("7", "w.yaml:2: detection.address_book: found 7, expected a path, a list of at most 16 of them, or null"),
        ("[a, 7]", "w.yaml:2: detection.address_book[1]: found 7, expected a path; did you mean '7', in quotes?"),
        ("[a, ~/b]", "w.yaml:2: detection.address_book[1]: found '~/b', expected a path; ~ is not expanded"),
        ("['']", "w.yaml:2: detection.address_book[0]: found '', expected a path"),
        (str(["a"] * 17), "expected a path, a list of at most 16 of them, or null"),
        ("[[a]]", "w.yaml:2: detection.address_book[0]: found ['a'], expected a path"),
    ],
)
def test_an_address_book_that_cannot_be_is_refused(text: str, problem: str) -> None:
    (found,) = faults(f"detection:\n  address_book: {text}\n")
    assert problem in found


def test_a_watch_list_needs_an_address_book() -> None:
    found = faults("detection:\n  watch: [{name: x, types: [own]}]\n")
    assert found == ["w.yaml:2: detection.watch: needs detection.address_book, which defines labels and types"]


def test_no_threshold_in_btc_is_needed_with_another_rule() -> None:
    assert read("detection: {threshold_btc: null, threshold_usd: 5000000}\n").detection.threshold_btc is None
    assert read(WATCH_LIST + "  threshold_btc: null\n").detection.threshold_btc is None


def test_the_first_bad_element_of_a_list_is_named() -> None:
    found = faults("gateway:\n  origins:\n    - '*'\n    - 5\n")
    assert found == ["w.yaml:4: gateway.origins[1]: found 5, expected an origin; did you mean '5', in quotes?"]


EVERYWHERE = "gateway: {host: 0.0.0.0}\n"


def test_no_auth_stays_on_this_machine_unless_the_command_line_gives_a_host() -> None:
    no_auth = {"auth.enabled": False}
    assert read("", flags=no_auth).gateway.host == ("127.0.0.1",)
    assert read(EVERYWHERE, flags=no_auth).gateway.host == ("127.0.0.1",)
    assert read("gateway: {host: '::1'}\n", flags=no_auth).gateway.host == ("::1",)
    assert read(EVERYWHERE, flags={**no_auth, "gateway.host": "0.0.0.0"}).gateway.host == ("0.0.0.0",)
    assert read("gateway: {host: ['127.0.0.1', '::1']}\n", flags=no_auth).gateway.host == ("127.0.0.1", "::1")
    assert read("gateway: {host: ['127.0.0.1', '::']}\n", flags=no_auth).gateway.host == ("127.0.0.1",)
    origin = parse(EVERYWHERE, source="w.yaml", environ={}, flags=no_auth).origins["gateway.host"]
    assert origin == "option --no-auth"


def test_authentication_is_not_turned_off_over_a_host_that_was_given_for_it_being_on() -> None:
    assert read(EVERYWHERE + "auth: {enabled: false}\n").gateway.host == ("0.0.0.0",)
    off = {"WHALED_AUTH_ENABLED": "false"}
    assert not read("", off).auth.enabled
    assert not read(EVERYWHERE, {**off, "WHALED_GATEWAY_HOST": "0.0.0.0"}).auth.enabled
    assert "WHALED_GATEWAY_HOST" in "\n".join(faults(EVERYWHERE, off))
    assert "gateway.host 127.0.0.1, :: (" in "\n".join(faults("gateway: {host: ['127.0.0.1', '::']}\n", off))


def test_tls_is_not_turned_on_or_off_by_a_reload() -> None:
    off = read("")
    on = read("gateway: {tls: {certificate: a.pem, private_key: a.key}}\n")
    renewed = read("gateway: {tls: {certificate: b.pem, private_key: b.key}}\n")
    assert not_reloadable(on, renewed) == ()
    for old, new in ((off, on), (on, off)):
        assert not_reloadable(old, new) == ("gateway.tls.certificate", "gateway.tls.private_key")


def test_every_key_has_a_distinct_environment_variable() -> None:
    schema = keys()
    assert len({key.variable for key in schema.values()}) == len(schema)


def test_every_default_is_within_its_allowed_range() -> None:
    assert parse(render(Loaded(Config(), {})), source="", environ={}, flags={}).config == Config()


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


def test_a_fault_in_a_url_does_not_reveal_its_password() -> None:
    for text in ("upstream: {proxy: 'socks4://user:hunter2@host'}", "upstream: {url: 'user:hunter2@host'}"):
        assert "hunter2" not in "\n".join(faults(text))


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


# --- hosts and origins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environ", "flags"),
    [
        ("gateway: {host: ['127.0.0.1', '::1']}\n", {}, {}),
        ("gateway:\n  host:\n  - 127.0.0.1\n  - ::1\n", {}, {}),
        ("", {"WHALED_GATEWAY_HOST": "127.0.0.1,::1"}, {}),
        ("", {"WHALED_GATEWAY_HOST": "[127.0.0.1, '::1']"}, {}),
        ("", {}, {"gateway.host": "127.0.0.1,::1"}),
    ],
)
def test_several_hosts_are_a_list(text: str, environ: dict[str, str], flags: dict[str, object]) -> None:
    assert read(text, environ, flags).gateway.host == ("127.0.0.1", "::1")


def test_one_host_is_shown_as_it_is_written_and_several_as_a_list() -> None:
    schema = keys()
    assert written(schema["gateway.host"], ("127.0.0.1",)) == "127.0.0.1"
    assert written(schema["gateway.host"], ("127.0.0.1", "::")) == "[127.0.0.1, '::']"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0", "::", "::1", "fe80::1%eth0", "localhost", "Whale.Example.", "a_b", "xn--gre-6ka8i.a"],
)
def test_addresses_and_names_can_be_listened_on(host: str) -> None:
    assert read(f"http: {{host: '{host}'}}\n").http.host == (host,)


@pytest.mark.parametrize(
    ("host", "hint"),
    [
        ("", "to listen everywhere, write '::' or '0.0.0.0'"),
        (" ", "to listen everywhere, write '::' or '0.0.0.0'"),
        (" ::1", "did you mean '::1'?"),
        ("*", "to listen everywhere, write '::' (IPv4 and IPv6) or '0.0.0.0' (IPv4)"),
        ("0", "did you mean '0.0.0.0'?"),
        ("127.1", "did you mean '127.0.0.1'?"),
        ("0x7f.1", "did you mean '127.0.0.1'?"),
        ("2130706433", "did you mean '127.0.0.1'?"),
        ("010.0.0.1", "did you mean '8.0.0.1'?"),
        ("10.0.0.256", "four numbers from 0 to 255"),
        ("10.09.0.1", "this is not an IPv4 address"),
        ("1.2.3.4.5", "this is not an IPv4 address"),
        ("127.0.0.1,::1", "write several hosts as a list"),
        ("127.0.0.1:80", "write '127.0.0.1', the port is set by the key `port`"),
        ("[::1]:80", "without brackets: '::1'"),
        ("::1::", "this is not an IPv6 address"),
        ("http://127.0.0.1", "without scheme, user or path"),
        ("10.0.0.0/8", "this is a network or a path"),
        ("::ffff:10.0.0.1", "write the IPv4 address: '10.0.0.1'"),
        ("fe80::1", "needs its interface, like 'fe80::1%eth0'"),
        ("224.0.0.1", "multicast or broadcast"),
        ("ff02::1", "multicast or broadcast"),
        ("255.255.255.255", "multicast or broadcast"),
        ("größe.example", "did you mean 'xn--gre-6ka8i.example'?"),
        ("-a", "this is not a host name"),
        ("a b", "this is not a host name"),
        ("a" * 64, "this is not a host name"),
        ("*.example.org", "this is not a host name"),
    ],
)
def test_an_unusable_host_is_named_with_a_suggestion(host: str, hint: str) -> None:
    (fault,) = faults(yaml.safe_dump({"gateway": {"host": host}}, allow_unicode=True))
    assert fault.startswith(f"w.yaml:2: gateway.host: found {host!r}, expected an address or a host name; ")
    assert hint in fault


@pytest.mark.parametrize(
    "origin",
    [
        "*", "null", "https://a.example", "http://a.example:8080", "https://ok.example.", "http://[::1]:3000", "https://xn--gre-6ka8i.a",
        "http://127.0.0.1", "file://", "app://", "app://.", "capacitor://localhost", "ionic://localhost:8100",
        "chrome-extension://abcdefghijklmnopabcdefghijklmnop", "moz-extension://0b7a3f0e-7a8b-4b3c-9d2e-1f2a3b4c5d6e",
        "safari-web-extension://0B7A3F0E-7A8B", "vscode-webview://abc", "app://obsidian.md",
    ],
)  # fmt: skip
def test_every_origin_that_a_browser_can_send_can_be_allowed(origin: str) -> None:
    assert read(yaml.safe_dump({"gateway": {"origins": [origin]}})).gateway.origins == (origin,)


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        ("https://a.example/", "did you mean 'https://a.example'?"),
        ("https://a.example/app?x#y", "did you mean 'https://a.example'?"),
        ("a.example", "did you mean 'https://a.example'?"),
        ("a.example:8443", "did you mean 'https://a.example:8443'?"),
        ("wss://a.example", "did you mean 'https://a.example'?"),
        ("ws://a.example:8765", "did you mean 'http://a.example:8765'?"),
        ("HTTPS://A.example", "did you mean 'https://a.example'?"),
        (" https://a.example", "did you mean 'https://a.example'?"),
        ("https://a.example:443", "did you mean 'https://a.example'?"),
        ("http://a.example:80", "did you mean 'http://a.example'?"),
        ("https://a.example:0443", "did you mean 'https://a.example:443'?"),
        ("https://größe.example", "did you mean 'https://xn--gre-6ka8i.example'?"),
        ("http://127.1", "expected an origin"),
        ("http://[0:0::1]", "did you mean 'http://[::1]'?"),
        ("Null", "did you mean 'null'?"),
        ("about:blank", "did you mean 'null'?"),
        ("data:text/html,x", "did you mean 'null'?"),
        ("Chrome-Extension://abc/", "did you mean 'chrome-extension://abc'?"),
        ("https://*.a.example", 'a * inside is not supported: list each origin, or write "*" alone for all'),
        ("**", "a * inside is not supported"),
        ("https://", "expected an origin"),
        ("https://a.example:99999", "expected an origin"),
        ("https://a b", "expected an origin"),
        ("nonsense", "expected an origin"),
        ("", "expected an origin"),
        ("://a", "expected an origin"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_with_a_suggestion(origin: str, hint: str) -> None:
    (fault,) = faults(yaml.safe_dump({"gateway": {"origins": ["*", origin]}}, allow_unicode=True))
    assert fault.startswith("w.yaml:4: gateway.origins[1]: found ")
    assert hint in fault


def test_a_password_in_an_origin_is_not_shown() -> None:
    (fault,) = faults("gateway: {origins: ['https://u:hunter2@a.example']}\n")
    assert "hunter2" not in fault
    assert "did you mean 'https://a.example'?" in fault


def test_an_origin_that_yaml_reads_as_nothing_needs_quotes() -> None:
    (fault,) = faults("gateway: {origins: [null]}\n")
    assert "did you mean 'null', in quotes?" in fault
    assert read("", {"WHALED_GATEWAY_ORIGINS": "null,app://"}).gateway.origins == ("null", "app://")


# --- numbers as people write them -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("1_000", 1000), (".5", 0.5), ("5.", 5), ("0x1F", 31), ("0b11", 3), ("1.5e+3", 1500), ("007", 7), ("+100", 100)],
)
def test_numbers_that_yaml_reads_as_people_do_are_read(text: str, number: float) -> None:
    assert read(f"detection: {{threshold_btc: {text}}}\n").detection.threshold_btc == number


MISREAD = [
    ("0100", "; YAML reads 0100 as 64 (octal): did you mean 100?"),
    ("0_100", "; YAML reads 0_100 as 64 (octal): did you mean 100?"),
    ("1:40", "; YAML reads 1:40 as 100 (base 60): write 100 if that is meant"),
    ("1:40.5", "; YAML reads 1:40.5 as 100.5 (base 60): write 100.5 if that is meant"),
    ("1e3", "; write it as 1000"),
    ("1.5e3", "; write it as 1500"),
    ("0o144", "; write it as 100"),
    ("08", "; write it as 8"),
    ("1000000", ""),
    ("1 000", "; write it as 1000"),
    ("1'000'000.5", "; write it as 1000000.5"),
    ("1e300", ""),
    ("many", ""),
]


@pytest.mark.parametrize(("text", "hint"), MISREAD)
def test_a_number_that_yaml_reads_as_another_one_is_refused_with_a_suggestion(text: str, hint: str) -> None:
    if text == "1000000":
        assert read(f"detection:\n  threshold_btc: {text}\n").detection.threshold_btc == 1e6
        return
    allowed = "expected a number from 0.00000001 to 21000000 or null"
    for found, place in (
        (faults(f"detection:\n  threshold_btc: {text}\n"), "w.yaml:2"),
        (faults("", {"WHALED_DETECTION_THRESHOLD_BTC": text}), "environment variable WHALED_DETECTION_THRESHOLD_BTC"),
        (faults("", flags={"detection.threshold_btc": text}), "option --whale-threshold"),
    ):
        assert len(found) == 1
        assert found[0].startswith(f"{place}: detection.threshold_btc: found ")
        assert found[0].endswith(allowed + hint)


def test_a_number_of_thousands_is_grouped_as_people_group_it() -> None:
    assert faults("detection:\n  threshold_btc: 1,000\n")[0].endswith("or null; write it as 1000")
    for number, rest in (("1,000", "000"), ("1,000,000", "000")):
        found = faults(f"detection: {{threshold_btc: {number}}}\n")
        problems = [each for each in found if f"detection.{rest}: no such key" in each]
        written = f"no such key; if it belongs to the number of `threshold_btc`, write it as {number.replace(',', '')}"
        assert problems
        assert all(problem.endswith(written) for problem in problems)
    assert "write it as" not in faults("detection: {000: 5}\n")[0]
    assert faults("gateway:\n  port: 08765\n")[0].endswith("; write it as 8765")


@pytest.mark.parametrize(
    ("word", "meant"), [("on", True), ("off", False), ("yes", True), ("No", False), ("TRUE", True)]
)
def test_words_that_yaml_reads_as_true_and_false_are_read(word: str, meant: bool) -> None:
    assert read(f"detection: {{fetch_inputs: {word}}}\n").detection.fetch_inputs is meant


@pytest.mark.parametrize(
    ("word", "meant"), [("'no'", "false"), ("n", "false"), ("0", "false"), ("Y", "true"), ("1", "true")]
)
def test_other_words_for_true_and_false_are_refused_with_a_suggestion(word: str, meant: str) -> None:
    assert faults(f"auth: {{enabled: {word}}}\n")[0].endswith(f"expected true or false; did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("auth: {issuer: 0100}", "found 0100, expected a string or null; did you mean '0100', in quotes?"),
        ("eventlog: {path: 2026-01-01}", "found 2026-01-01, expected a path; did you mean '2026-01-01', in quotes?"),
        (
            "auth: {issuer: off}",
            "found off, expected a string or null; YAML reads off as false; did you mean 'off', in quotes?",
        ),
        ("eventlog: {retention: 1:30}", '"36525d"; YAML reads 1:30 as 90 (base 60)'),
        ("gateway: {max_frame: 010000}", '"1024GiB"; YAML reads 010000 as 4096 (octal)'),
        ("gateway: {port: 2026-01-01}", "found 2026-01-01, expected a whole number from 0 to 65535"),
    ],
)
def test_a_value_that_yaml_converts_is_quoted_as_it_was_written(text: str, end: str) -> None:
    assert faults(text)[0].endswith(end)
