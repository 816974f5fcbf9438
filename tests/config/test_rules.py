"""Values and combinations of values that the configuration refuses."""

import pytest

from kit.configuration import WATCH_LIST, faults, read
from whaled.config.parse import Loaded, not_reloadable, parse
from whaled.config.render import render
from whaled.config.sections import Config


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


def test_every_default_is_within_its_allowed_range() -> None:
    assert parse(render(Loaded(Config(), {})), source="", environ={}, flags={}).config == Config()


def test_a_fault_in_a_url_does_not_reveal_its_password() -> None:
    for text in ("upstream: {proxy: 'socks4://user:hunter2@host'}", "upstream: {url: 'user:hunter2@host'}"):
        assert "hunter2" not in "\n".join(faults(text))
