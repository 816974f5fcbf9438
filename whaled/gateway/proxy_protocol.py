"""The PROXY protocol, versions 1 and 2: the header in which a proxy names the client of a connection.

https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt. TLVs, the checksum among them, are skipped: nothing in them
names a client, and TCP has a checksum. Pure.
"""

import ipaddress
import re
from enum import Enum, auto
from typing import Final

from msgspec import Struct

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
BEGINS_V1: Final = b"PROXY "
# The longest line of version 1, CR LF included (section 2.1).
MAX_V1_BYTES = 107
# The most bytes after the fixed part of version 2. A proxy that passes on all it knows of TLS sends a few hundred.
MAX_V2_BYTES = 4096
FIXED_BYTES = 16
# The address blocks of version 2 by family (the high half of byte 13): bytes of the block, bytes of one address.
BLOCKS: Final = {0x1: (12, 4), 0x2: (36, 16), 0x3: (216, 0)}
STREAM, LOCAL, PROXY = 0x1, 0x20, 0x21
PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")
MAX_PORT = 65_535


class ProxyHeaderError(Exception):
    """Bytes that begin like a header and are none. The text names what is wrong."""


class Kind(Enum):
    """The kind of the first bytes of a connection."""

    ABSENT = auto()  # no header
    UNNAMED = auto()  # a header without a client: LOCAL, UNKNOWN, or an address that is none of a network
    NAMED = auto()


class Header(Struct, frozen=True):
    """The header at the beginning of a connection. `size` is its length in bytes, `address` the client's address."""

    kind: Kind
    version: int = 0
    size: int = 0
    address: str = ""


ABSENT: Final = Header(Kind.ABSENT)


def plain_address(text: str) -> str:
    """Return an address in its usual form, an IPv4 address that is written as IPv6 as IPv4. Raises ValueError."""
    found = ipaddress.ip_address(text)
    if found.version == 6:
        if found.scope_id is not None:
            raise ValueError("an address with a zone")
        found = found.ipv4_mapped or found
    return str(found)


def read_header(data: bytes) -> Header | None:
    """Return the header at the beginning of `data`; None if more bytes are needed. Raises ProxyHeaderError."""
    if data.startswith(BEGINS_V1):
        return _version_1(data)
    if data.startswith(SIGNATURE):
        return _version_2(data)
    return None if SIGNATURE.startswith(data) or BEGINS_V1.startswith(data) else ABSENT


def _version_1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, MAX_V1_BYTES)
    if end < 0:
        if len(data) >= MAX_V1_BYTES:
            raise ProxyHeaderError(f"the line of version 1 has more than {MAX_V1_BYTES} bytes")
        return None
    size = end + 2
    try:
        words = data[:end].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise ProxyHeaderError("the line of version 1 is not ASCII") from None
    if words[1] == "UNKNOWN":
        return Header(Kind.UNNAMED, 1, size)  # whatever follows on the line is ignored (section 2.1)
    version = {"TCP4": 4, "TCP6": 6}.get(words[1])
    if version is None or len(words) != 6:
        raise ProxyHeaderError("version 1 is PROXY TCP4|TCP6 SOURCE DESTINATION SOURCE_PORT DESTINATION_PORT")
    _, _, source, destination, *ports = words
    for port in ports:
        if PORT.fullmatch(port) is None or int(port) > MAX_PORT:
            raise ProxyHeaderError("a port of version 1 is no number from 0 to 65535")
    try:
        if any(ipaddress.ip_address(address).version != version for address in (source, destination)):
            raise ProxyHeaderError(f"an address of version 1 is not of {words[1]}")
        return Header(Kind.NAMED, 1, size, plain_address(source))
    except ValueError:
        raise ProxyHeaderError("an address of version 1 is none") from None


def _version_2(data: bytes) -> Header | None:
    if len(data) < FIXED_BYTES:
        return None
    command, family, transport = data[12], data[13] >> 4, data[13] & 0xF
    length = int.from_bytes(data[14:16])
    if command not in {LOCAL, PROXY}:
        raise ProxyHeaderError("version 2 has an unknown version or command")
    if length > MAX_V2_BYTES:
        raise ProxyHeaderError(f"version 2 has more than {MAX_V2_BYTES} bytes after its first {FIXED_BYTES}")
    size = FIXED_BYTES + length
    if command == PROXY and data[13] != 0:
        if family not in BLOCKS or transport != STREAM:
            raise ProxyHeaderError("version 2 has an unknown address family, or names no TCP connection")
        if length < BLOCKS[family][0]:
            raise ProxyHeaderError("version 2 is shorter than the addresses of its family")
    if len(data) < size:
        return None
    address_bytes = BLOCKS[family][1] if command == PROXY and data[13] != 0 else 0
    if not address_bytes:
        return Header(Kind.UNNAMED, 2, size)
    packed = data[FIXED_BYTES : FIXED_BYTES + address_bytes]
    return Header(Kind.NAMED, 2, size, plain_address(str(ipaddress.ip_address(packed))))
