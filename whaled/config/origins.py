"""Validation of `gateway.origins`: it may hold the origins that a browser can send (RFC 6454, 6.1). Pure."""

import ipaddress
import re

from whaled.hosts import HOST_NAME, NUMERIC, in_ascii, split_authority

DEFAULT_PORTS = {"http": "80", "https": "443"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# The part after the scheme of an application or extension: `abcdefgh`, `localhost:3000`, or empty (`file://`).
OPAQUE_HOST = re.compile(r"[A-Za-z0-9._~-]*(:[0-9]{1,5})?")
# Schemes for which browsers send the origin `null`, or that of another URL.
OPAQUE_SCHEMES = ("about:", "blob:", "data:", "javascript:")
EXPECTED = 'expected an origin as browsers send it, like https://example.org, or "null", or "*" for all'


def origin_fault(origin: str) -> str | None:
    """Return why no browser can send an origin, with the origin probably meant; None for a valid origin or `*`."""
    if origin in {"*", "null"}:
        return None
    meant = _meant(origin)
    if meant == origin:
        return None
    if "*" in origin:
        return f'{EXPECTED}; a * inside is not supported: list each origin, or write "*" alone for all'
    if meant is not None:
        return f"{EXPECTED}; did you mean {meant!r}?"
    return EXPECTED


def _meant(text: str) -> str | None:
    """Return the origin that a browser would send for a text; None if there is none."""
    text = text.strip()
    if text.lower() == "null" or text.lower().startswith(OPAQUE_SCHEMES):
        return "null"
    match = SCHEME.fullmatch(text)
    if match is None:
        return _meant(f"https://{text}") if "." in text and ":/" not in text else None
    scheme = {"ws": "http", "wss": "https"}.get(match[1].lower(), match[1].lower())
    authority = re.split(r"[/?#]", match[2], maxsplit=1)[0].rpartition("@")[2]
    if scheme not in DEFAULT_PORTS:
        return f"{scheme}://{authority}" if OPAQUE_HOST.fullmatch(authority) else None
    return _web_origin(scheme, authority)


def _web_origin(scheme: str, authority: str) -> str | None:
    found = split_authority(authority)
    if found is None:
        return None
    host, port = found
    shown = _web_host(host)
    if shown is None or (port and not 0 < int(port) < 65536):
        return None
    if authority.partition(":")[0].endswith("."):
        shown += "."  # a page opened as https://example.org./ has another origin than https://example.org/
    return f"{scheme}://{shown}" + (f":{int(port)}" if port and port != DEFAULT_PORTS[scheme] else "")


def _web_host(host: str) -> str | None:
    """Return a host as browsers write it: IPv6 addresses shortened, names in Punycode; None if it is invalid."""
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        if NUMERIC.fullmatch(host):
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        return None
    name = in_ascii(host)
    return name if HOST_NAME.fullmatch(name) else None
