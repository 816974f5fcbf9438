"""Which pages may connect, by the headers that browsers and proxies send."""

import pytest
from websockets.datastructures import Headers

from whaled.config.origins import origin_fault
from whaled.gateway.origins import Origins, is_own, shown

OPEN = Origins.of((), needs_token=False)
GUARDED = Origins.of((), needs_token=True)


@pytest.mark.parametrize(
    ("origin", "host", "is_tls"),
    [
        ("http://127.0.0.1:8765", "127.0.0.1:8765", False),
        ("http://[::1]:8765", "[::1]:8765", False),
        ("http://whale.example", "whale.example", False),
        ("http://whale.example", "whale.example:80", False),
        ("HTTP://Whale.Example", "WHALE.example", False),
        ("https://whale.example", "whale.example", True),
        ("https://whale.example", "whale.example:443", True),
        ("https://whale.example:8765", "whale.example:8765", True),
        # Behind a proxy that ends TLS and passes on the Host header.
        ("https://whale.example", "whale.example", False),
        ("https://whale.example:8443", "whale.example:8443", False),
    ],
)
def test_a_page_of_the_requests_own_host_is_known(origin: str, host: str, is_tls: bool) -> None:
    assert is_own(origin, host, is_tls=is_tls)
    assert GUARDED.refusal(Headers({"Origin": origin, "Host": host}), is_tls=is_tls) is None


@pytest.mark.parametrize(
    ("origin", "host", "is_tls"),
    [
        ("http://127.0.0.1:3000", "127.0.0.1:8765", False),
        ("http://127.0.0.1", "127.0.0.1:8765", False),
        ("http://evil.example:8765", "127.0.0.1:8765", False),
        ("http://whale.example.evil.example", "whale.example", False),
        ("http://evil.example/@whale.example", "whale.example", False),
        ("http://u@whale.example", "whale.example", False),
        ("https://whale.example:8443", "whale.example", False),
        # Anybody on the network can answer plain http in the name of a server of TLS.
        ("http://whale.example:8765", "whale.example:8765", True),
        ("http://whale.example", "whale.example", True),
        ("ws://whale.example", "whale.example", False),
        ("chrome-extension://whale.example", "whale.example", False),
        ("null", "null", False),
        ("", "", False),
        ("://", "", False),
        ("http://", "", False),
        ("http://:80", ":80", False),
        ("http://a b", "a b", False),
        ("http://[::1", "[::1", False),
    ],
)
def test_a_page_of_another_host_port_or_scheme_is_refused(origin: str, host: str, is_tls: bool) -> None:
    assert not is_own(origin, host, is_tls=is_tls)
    problem = GUARDED.refusal(Headers({"Origin": origin, "Host": host}), is_tls=is_tls)
    assert problem is not None
    assert ("gateway.origins" in problem) is (origin_fault(origin) is None)


@pytest.mark.parametrize(
    ("origins", "told"),
    [
        ([""], "the Origin header is empty"),
        (["https://a.example", "https://b.example"], "the Origin header came 2 times"),
        (["", "", ""], "the Origin header came 3 times"),
        (["*"], "is no origin as browsers send it"),
        (["https://a.example/page"], "is no origin as browsers send it"),
        (["https://" + "a" * 16_000], "is no origin as browsers send it"),
        (["HTTPS://B.example"], "can add it to gateway.origins"),
        (["null"], "can add it to gateway.origins"),
    ],
)
def test_only_an_origin_that_can_be_configured_is_suggested_for_it(origins: list[str], told: str) -> None:
    headers = Headers([("Host", "a.example"), *(("Origin", origin) for origin in origins)])
    problem = GUARDED.refusal(headers, is_tls=True)
    assert problem is not None
    assert told in problem
    assert ("gateway.origins" in problem) is ("can add" in told)
    assert len(problem) < 350


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "[::1]:8765", "localhost:8765", "10.0.0.5", "localhost"])
def test_without_authentication_only_hosts_that_dns_does_not_control_are_admitted(host: str) -> None:
    assert OPEN.refusal(Headers({"Origin": f"http://{host}", "Host": host}), is_tls=False) is None


@pytest.mark.parametrize(
    "host", ["evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example", "2130706433"]
)
def test_without_authentication_a_name_is_refused_since_dns_could_lead_it_here(host: str) -> None:
    headers = Headers({"Origin": f"http://{host}", "Host": host})
    assert "DNS rebinding" in str(OPEN.refusal(headers, is_tls=False))
    assert Origins.of((f"http://{host}",), needs_token=False).refusal(headers, is_tls=False) is None


def test_programs_that_send_no_origin_are_admitted() -> None:
    assert OPEN.refusal(Headers({"Host": "whale.example"}), is_tls=False) is None


def test_two_origins_are_refused_unless_every_one_is_allowed() -> None:
    headers = Headers([("Host", "a.example"), ("Origin", "https://a.example"), ("Origin", "https://a.example")])
    assert Origins.of(("https://a.example",), needs_token=True).refusal(headers, is_tls=True) is not None
    assert Origins.of(("*",), needs_token=True).refusal(headers, is_tls=True) is None


@pytest.mark.parametrize(
    "origin", ["chrome-extension://abc", "app://.", "file://", "null", "safari-web-extension://AB"]
)
def test_exact_origins_of_any_scheme_are_admitted(origin: str) -> None:
    allowed = Origins.of((origin,), needs_token=False)
    assert allowed.refusal(Headers({"Origin": origin, "Host": "a"}), is_tls=False) is None
    assert allowed.refusal(Headers({"Origin": origin + "x", "Host": "a"}), is_tls=False) is not None


def test_an_origin_is_logged_truncated_and_in_ascii() -> None:
    assert shown("https://\udce9" + "x" * 300).isascii()
    assert len(shown("x" * 20_000)) == 203
