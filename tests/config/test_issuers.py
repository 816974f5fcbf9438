"""Issuers that the configuration refuses, through the parser, so that the place of a fault is checked as well."""

import pytest

from kit.configuration import faults, read
from whaled.config.issuers import trusted_url
from whaled.config.sections import Algorithm

GOOD = "name: corp, issuer: 'https://login.example.org/realms/ops', audience: whaled, read: [scope=whales:read]"


def listed(*sections: str) -> str:
    return "auth:\n  issuers:\n" + "".join(f"    - {{{section}}}\n" for section in sections)


def test_an_issuer_has_defaults_for_all_but_its_names_and_permissions() -> None:
    (issuer,) = read(listed(GOOD)).auth.issuers
    assert (issuer.name, issuer.audience, issuer.read) == ("corp", "whaled", ("scope=whales:read",))
    assert (issuer.algorithms, issuer.client_id_claim, issuer.jwks_uri) == ((Algorithm.RS256,), "client_id", None)
    assert (issuer.leeway, issuer.refresh_interval, issuer.unknown_key_interval, issuer.timeout) == (30, 600, 30, 10)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            GOOD.replace("https:", "http:"),
            "w.yaml:3: auth.issuers[0].issuer: found 'http://login.example.org/realms/ops'",
        ),
        (GOOD.replace("/realms", "/?r"), "without a query"),
        (GOOD.replace("//login", "//u:p@login"), "expected https://host[:port][/...]"),
        (GOOD.replace("https://login.example.org/realms/ops", "login"), "found 'login', expected https://"),
        (GOOD + ", jwks_uri: 'http://example.org/jwks'", "auth.issuers[0].jwks_uri: found 'http://example.org/jwks'"),
        (GOOD + ", algorithms: []", "auth.issuers[0].algorithms: needs at least one algorithm"),
        (GOOD + ", algorithms: [HS256]", "auth.issuers[0].algorithms[0]: found 'HS256', expected one of RS256, RS384"),
        (GOOD + ", algorithms: [none]", "auth.issuers[0].algorithms[0]: found 'none'"),
        (GOOD.replace("read: [scope=whales:read]", "read: []"), "auth.issuers[0].read: its tokens would grant nothing"),
        (GOOD.replace("scope=", "scope"), "auth.issuers[0].read: found 'scopewhales:read', expected claim=value"),
        (GOOD + ", admin: [a b=c]", "auth.issuers[0].admin: found 'a b=c', expected names of claims"),
        (GOOD + ", client_id_claim: a=b", "auth.issuers[0].client_id_claim: found 'a=b'"),
        (GOOD + ", leeway: 31s", "auth.issuers[0].leeway: found '31s'"),
        (GOOD + ", refresh_interval: 2h", 'from "10s" to "1h"'),
        (GOOD + ", unknown_key_interval: 0s", 'from "1s" to "1h"'),
        (GOOD + ", timeout: 2m", 'from "100ms" to "1m"'),
        (
            GOOD.replace("name: corp", "name: 'a:b'"),
            "auth.issuers[0].name: found 'a:b', expected a string of 1 to 64 letters",
        ),
        (GOOD.replace("audience: whaled, ", ""), "auth.issuers[0].audience: missing"),
        (GOOD + ", secret: x", "auth.issuers[0].secret: no such key"),
    ],
)
def test_an_issuer_that_cannot_be_trusted_or_used_is_refused(section: str, problem: str) -> None:
    (found,) = faults(listed(section))
    assert problem in found


def test_names_and_issuers_are_unique() -> None:
    found = faults(listed(GOOD, GOOD))
    assert len(found) == 2
    assert "auth.issuers[1].name: 'corp' is also that of auth.issuers[0]: it must be unique" in found[0]
    assert "auth.issuers[1].issuer: 'https://login.example.org/realms/ops' is also that of auth.issuers[0]" in found[1]


def test_an_issuer_is_not_that_of_the_key_ring() -> None:
    (found,) = faults(listed(GOOD) + "  issuer: https://login.example.org/realms/ops\n")
    assert "auth.issuers[0].issuer: is also auth.issuer, which tokens of the key ring state" in found


@pytest.mark.parametrize(
    ("url", "is_trusted"),
    [
        ("https://example.org", True),
        ("https://example.org:8443/a?b=c", True),
        ("http://127.0.0.1:8080/realms/a", True),
        ("http://[::1]:8080", True),
        ("http://localhost", True),
        ("http://127.0.0.1.example.org", False),
        ("http://localhost.example.org", False),
        ("http://10.0.0.1", False),
        ("http://0.0.0.0", False),
        ("https://u@example.org", False),
        ("https://:p@example.org", False),
        ("https://example.org#f", False),
        ("https://ex\u0430mple.org", False),
        ("HTTPS://example.org", True),
        ("ftp://example.org", False),
        ("//example.org", False),
        ("https://", False),
        ("", False),
    ],
)
def test_only_https_is_trusted_and_plain_http_on_this_machine(url: str, is_trusted: bool) -> None:
    assert (trusted_url(url) is not None) is is_trusted
