"""Validation of `gateway.trusted_proxies`. Pure."""

import ipaddress

UNIX = "unix"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EXPECTED = 'expected an address or a network, like 10.0.0.5 or 2001:db8::/32, or "unix"'


def proxy_fault(text: str) -> str | None:
    """Return why a text names no trusted proxy; None if it does."""
    if text == UNIX:
        return None
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return EXPECTED
    if "%" in text:
        return f"{EXPECTED}; an address without its zone"
    if network.prefixlen == 0:
        return "this trusts every address, and then anybody may pretend to be anybody: list the proxies"
    address = text.partition("/")[0]
    if "/" in text and network.network_address != ipaddress.ip_address(address):
        return f"{EXPECTED}; did you mean {network}, or {address} alone?"
    return None


def networks_of(proxies: tuple[str, ...]) -> tuple[Network, ...]:
    """Return the networks of valid trusted proxies, without `unix`."""
    return tuple(ipaddress.ip_network(text) for text in proxies if text != UNIX)
