"""The parser of the PROXY protocol."""

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.gateway.proxies import Preamble
from whaled.gateway.proxy_protocol import ABSENT, MAX_V2_BYTES, SIGNATURE, Kind, ProxyHeaderError, read_header


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body)) + body


def v2_of(source: str, tlvs: bytes = b"") -> bytes:
    packed = ipaddress.ip_address(source).packed
    return v2(0x21, 0x11 if len(packed) == 4 else 0x21, packed * 2 + b"\x01\xbb\x01\xbb" + tlvs)


# An endpoint of AWS PrivateLink, a checksum, and padding.
TLVS = b"\xea\x00\x04\x01vpc" + b"\x03\x00\x04abcd" + b"\x04\x00\x03\x00\x00\x00"
GOOD = {
    b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n": "192.0.2.7",
    b"PROXY TCP6 2001:db8::7 2001:db8::1 0 65535\r\n": "2001:db8::7",
    b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n": "192.0.2.7",
    v2_of("192.0.2.7"): "192.0.2.7",
    v2_of("2001:db8::7", TLVS): "2001:db8::7",
    v2_of("::ffff:192.0.2.7"): "192.0.2.7",
}
UNNAMED = (
    b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n",
    v2(0x20, 0x00, b""),
    v2(0x20, 0x11, bytes(12)),
    v2(0x21, 0x00, TLVS),
    v2(0x21, 0x31, b"/run/x.sock".ljust(216, b"\0")),
)
BAD = (
    b"PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
    b"PROXY TCP4  192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 192.0.2.07 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 1 65536\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 01 2\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
    b"PROXY TCP4 \xff 198.51.100.1 1 2\r\n",
    b"PROXY UDP4 192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY " + b"x" * 200,
    v2(0x11, 0x11, bytes(12)),
    v2(0x22, 0x11, bytes(12)),
    v2(0x21, 0x12, bytes(12)),
    v2(0x21, 0x41, bytes(12)),
    v2(0x21, 0x11, bytes(11)),
    v2(0x21, 0x21, bytes(35)),
    SIGNATURE + b"\x21\x11" + struct.pack("!H", MAX_V2_BYTES + 1),
)


@pytest.mark.parametrize(("raw", "address"), GOOD.items())
def test_a_header_names_the_client_and_nothing_after_it_is_taken(raw: bytes, address: str) -> None:
    header = read_header(raw + b"GET / HTTP/1.1\r\n")
    assert header is not None
    assert (header.kind, header.address, header.size) == (Kind.NAMED, address, len(raw))


@pytest.mark.parametrize("raw", UNNAMED)
def test_a_header_without_a_client_is_read_to_its_end(raw: bytes) -> None:
    header = read_header(raw + b"GET")
    assert header is not None
    assert (header.kind, header.address, header.size) == (Kind.UNNAMED, "", len(raw))


@pytest.mark.parametrize("raw", BAD)
def test_a_malformed_header_is_refused(raw: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        read_header(raw)


@pytest.mark.parametrize("raw", [*GOOD, *UNNAMED])
def test_a_header_may_arrive_byte_by_byte(raw: bytes) -> None:
    preamble = Preamble(is_required=True)
    for at in range(len(raw) - 1):
        assert preamble.feed(raw[at : at + 1]) is None
    assert preamble.feed(raw[-1:] + b"rest") == (GOOD.get(raw), b"rest")


def test_other_bytes_are_no_header_unless_one_is_required() -> None:
    assert read_header(b"GET / HTTP/1.1\r\n") is ABSENT
    assert Preamble(is_required=False).feed(b"\x16\x03\x01") == (None, b"\x16\x03\x01")
    with pytest.raises(ProxyHeaderError, match="requires one"):
        Preamble(is_required=True).feed(b"\x16\x03\x01")


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]), st.binary(max_size=300))
def test_any_bytes_give_a_header_or_the_one_error(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except ProxyHeaderError:
        return
    assert header is None or header.size <= len(start + rest)
    if header is not None and header.address:
        ipaddress.ip_address(header.address)


@given(st.ip_addresses(v=4), st.binary(max_size=64), st.integers(1, 400))
def test_every_split_of_a_header_gives_its_address(address: ipaddress.IPv4Address, rest: bytes, cut: int) -> None:
    raw = v2_of(str(address), TLVS) + rest
    preamble = Preamble(is_required=True)
    found = preamble.feed(raw[:cut]) or preamble.feed(raw[cut:])
    assert found is not None
    assert found[0] == str(address)
    assert rest.startswith(found[1])
