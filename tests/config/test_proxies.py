"""Validation of gateway.trusted_proxies."""

import pytest

from whaled.config.proxies import networks_of, proxy_fault


@pytest.mark.parametrize("text", ["10.0.0.5", "10.0.0.0/8", "2001:db8::/32", "::1", "unix"])
def test_an_address_a_network_and_unix_are_trusted_proxies(text: str) -> None:
    assert proxy_fault(text) is None
    assert len(networks_of((text,))) == (text != "unix")


@pytest.mark.parametrize(("text", "problem"), [
    ("proxy.example", "expected an address or a network"),
    ("10.0.0.5/8", "did you mean 10.0.0.0/8, or 10.0.0.5 alone"),
    ("0.0.0.0/0", "trusts every address"),
    ("::/0", "trusts every address"),
    ("fe80::1%eth0", "without its zone"),
])  # fmt: skip
def test_anything_else_is_refused_with_what_to_write(text: str, problem: str) -> None:
    assert problem in str(proxy_fault(text))
