"""The client's address in X-Forwarded-For and Forwarded."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.config.sections import AddressHeader
from whaled.gateway.forwarded import MAX_BYTES, MAX_HOPS, ForwardedError, client_of

XFF, FORWARDED = AddressHeader.X_FORWARDED_FOR, AddressHeader.FORWARDED


def is_trusted(address: str) -> bool:
    return address.startswith("10.")


@pytest.mark.parametrize(("header", "lines", "client"), [
    (XFF, ["192.0.2.7"], "192.0.2.7"),
    (XFF, ["6.6.6.6, 192.0.2.7"], "192.0.2.7"),
    (XFF, ["6.6.6.6", "192.0.2.7, 10.0.0.1", "10.0.0.2"], "192.0.2.7"),
    (XFF, ["<script>, 192.0.2.7"], "192.0.2.7"),
    (XFF, ["192.0.2.7:4711"], "192.0.2.7"),
    (XFF, ["2001:db8::7"], "2001:db8::7"),
    (XFF, ["[2001:DB8::7]:443"], "2001:db8::7"),
    (XFF, ["::ffff:192.0.2.7"], "192.0.2.7"),
    (XFF, [" , 192.0.2.7 ,, "], "192.0.2.7"),
    (XFF, ["10.0.0.9, 10.0.0.1"], "10.0.0.9"),
    (XFF, ["192.0.2.7, unknown, 10.0.0.1"], None),
    (XFF, [""], None),
    (XFF, [], None),
    (FORWARDED, ["for=192.0.2.7"], "192.0.2.7"),
    (FORWARDED, ['For="[2001:db8::7]:4711";proto=https;by=_me'], "2001:db8::7"),
    (FORWARDED, ['for=6.6.6.6, for="192.0.2.7:1" ;by=10.0.0.1, for=10.0.0.1'], "192.0.2.7"),
    (FORWARDED, ['for="1\\92.0.2.7"'], "192.0.2.7"),
    (FORWARDED, ['by="a, for=6.6.6.6";for=192.0.2.7'], "192.0.2.7"),
    (FORWARDED, ["for=6.6.6.6, for=_hidden"], None),
    (FORWARDED, ["for=6.6.6.6, for=unknown"], None),
    (FORWARDED, ["for=6.6.6.6, proto=https"], None),
])  # fmt: skip
def test_the_rightmost_untrusted_address_counts(header: AddressHeader, lines: list[str], client: str | None) -> None:
    assert client_of(header, lines, is_trusted) == client


@pytest.mark.parametrize(("header", "lines"), [
    (XFF, ["192.0.2.7, nonsense"]),
    (XFF, ["192.0.2.07"]),
    (XFF, ["[192.0.2.7]"]),
    (XFF, ["fe80::1%eth0"]),
    (XFF, ["1" * (MAX_BYTES + 1)]),
    (XFF, [", ".join(["10.0.0.1"] * (MAX_HOPS + 1))]),
    (FORWARDED, ['for="192.0.2.7']),
    (FORWARDED, ['for="6.6.6.6', 'for=192.0.2.7"']),
    (FORWARDED, ["for=2001:db8::7"]),
    (FORWARDED, ['for="2001:db8::7"']),
    (FORWARDED, ["for=192.0.2.7;for=192.0.2.8"]),
    (FORWARDED, ["192.0.2.7"]),
])  # fmt: skip
def test_a_header_that_cannot_be_read_is_refused(header: AddressHeader, lines: list[str]) -> None:
    with pytest.raises(ForwardedError):
        client_of(header, lines, is_trusted)


@given(st.sampled_from([XFF, FORWARDED]), st.lists(st.text('for="\\[]:;, .=_10a\t', max_size=60), max_size=4))
def test_any_header_gives_an_address_none_or_the_one_error(header: AddressHeader, lines: list[str]) -> None:
    try:
        client = client_of(header, lines, is_trusted)
    except ForwardedError:
        return
    assert client is None or str(ipaddress.ip_address(client)) == client


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=100), st.ip_addresses(v=4))
def test_what_a_stranger_sent_does_not_change_what_the_proxy_appended(sent: str, real: ipaddress.IPv4Address) -> None:
    for header, added in ((XFF, f", {real}"), (FORWARDED, f", for={real}")):
        try:
            assert client_of(header, [sent + added], lambda _: False) == str(real)
        except ForwardedError:
            assert header is FORWARDED  # the whole line has to be read, and a stranger can only spoil it
