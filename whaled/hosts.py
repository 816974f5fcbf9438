"""Host names and addresses as text: parsing of Host headers, and validation of hosts to listen on. Pure."""

import ipaddress
import re
import unicodedata

# The value of a Host header, and the part of a URL after `//`: a name or an address, and optionally a port.
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/?#@\s]+)(?::([0-9]*))?")
HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63}){0,31}")
# A name that the C library parses as an IPv4 address: "0", "127.1", "0x7f000001", "010.0.0.1" (octal).
# If the last label is a number, browsers and the C library accept only an address.
NUMERIC = re.compile(r"(?:.*\.)?(?:0[xX][0-9A-Fa-f]*|[0-9]+)\.?")
MAX_NAME = 253


def split_authority(text: str) -> tuple[str, str] | None:
    """Return the host in lower case without a final dot, and the port as digits ("" if there is none).

    None for a text of another form.
    """
    match = AUTHORITY.fullmatch(text)
    return (match[1].lower().rstrip("."), match[2] or "") if match is not None else None


def is_address_or_localhost(host: str) -> bool:
    """Return whether a host resolves without DNS. An IPv6 address is in brackets."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening_fault(host: str) -> str | None:  # noqa: C901 - one return for each mistake
    """Return why a host cannot be listened on, with the probable intention; None if it is an address or a name."""
    try:
        return _address_fault(ipaddress.ip_address(host))
    except ValueError:
        pass
    if "," in host:
        return "write several hosts as a list (`- 127.0.0.1`)"
    if host.strip() != host or not host:
        return f"did you mean {host.strip()!r}?" if host.strip() else "to listen everywhere, write '::' or '0.0.0.0'"
    if host == "*":
        return "to listen everywhere, write '::' (IPv4 and IPv6) or '0.0.0.0' (IPv4)"
    if "://" in host or "@" in host:
        return "write the host alone, without scheme, user or path"
    if "/" in host:
        return "this is a network or a path: write one address of this machine, or 0.0.0.0 for all"
    if host.startswith("["):
        return f"write an IPv6 address without brackets: {host.partition(']')[0][1:]!r}"
    if host.count(":") == 1:
        return f"expected no port: write {host.partition(':')[0]!r}, the port is set by the key `port`"
    if ":" in host:
        return "this is not an IPv6 address"
    if NUMERIC.fullmatch(host):
        return _numeric_fault(host)
    if not host.isascii():
        meant = in_ascii(host)
        return f"did you mean {meant!r}?" if HOST_NAME.fullmatch(meant) else "this is not a host name"
    if len(host) > MAX_NAME or not HOST_NAME.fullmatch(host.lower().removesuffix(".")):
        return "this is not a host name: letters, digits, hyphens and dots"
    return None


def _address_fault(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return f"write the IPv4 address: {str(address.ipv4_mapped)!r}"
        if address.is_link_local and address.scope_id is None:
            return f"a link-local address needs its interface, like {f'{address}%eth0'!r}"
    if address.is_multicast or str(address) == "255.255.255.255":
        return "nothing can listen on a multicast or broadcast address: write one address of this machine"
    return None


def _numeric_fault(host: str) -> str:
    """Return a fault that suggests, in dotted form, the address that the C library would parse from a number."""
    parts = []
    for part in host.removesuffix(".").split("."):
        try:
            parts.append(int(part, 16) if part[:2].lower() == "0x" else int(part, 8 if part[0] == "0" else 10))
        except ValueError:
            return "this is not an IPv4 address: four numbers from 0 to 255"
    *first, last = parts
    if len(parts) > 4 or any(part > 255 for part in first) or last >= 256 ** (4 - len(first)):
        return "this is not an IPv4 address: four numbers from 0 to 255"
    number = sum(part << 8 * (3 - index) for index, part in enumerate(first)) + last
    return f"did you mean {str(ipaddress.IPv4Address(number))!r}?"


def in_ascii(name: str) -> str:
    """Return a host name in Punycode (RFC 3492), the form of browsers and DNS servers.

    Python's `idna` codec implements the older IDNA 2003.
    """
    labels = unicodedata.normalize("NFC", name).lower().split(".")
    return ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)
