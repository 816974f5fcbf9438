"""Hosts to listen on and origins to allow, with suggestions for those that cannot be."""

import pytest
import yaml

from kit.configuration import faults, read
from whaled.config.keys import keys
from whaled.config.render import written


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
