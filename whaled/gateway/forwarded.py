"""The client's address in `X-Forwarded-For` or `Forwarded` (RFC 7239), as trusted proxies wrote it.

Each proxy appends the address that it was connected from, so only what trusted proxies appended counts: from the right,
up to the first address that is none of theirs. What is left of it may be invented. Pure.
"""

import re
from collections.abc import Callable, Sequence
from typing import Final

from whaled.config.sections import AddressHeader
from whaled.gateway.proxy_protocol import plain_address

# The most bytes of the header, all its lines together: what a genuine chain of MAX_HOPS proxies writes.
MAX_BYTES = 4096
# The most proxies in a row. A chain of a CDN, a load balancer and an ingress has three.
MAX_HOPS = 16


class ForwardedError(Exception):
    """A header that cannot be read. The text names what is wrong."""


def client_of(header: AddressHeader, lines: Sequence[str], is_trusted: Callable[[str], bool]) -> str | None:
    """Return the client's address from the lines of a header that a trusted proxy sent.

    It is the rightmost address that is not a trusted proxy's, or the leftmost of all if every one is. None if there is
    no address, or if a proxy hides it (`unknown`, `_hidden`). Raises ForwardedError.
    """
    if sum(map(len, lines)) > MAX_BYTES:
        raise ForwardedError(f"{header} has more than {MAX_BYTES} bytes")
    nodes = _forwarded(lines) if header is AddressHeader.FORWARDED else _x_forwarded_for(lines)
    client = None
    for hops, node in enumerate(reversed(nodes)):
        if hops >= MAX_HOPS:
            raise ForwardedError(f"{header} has more than {MAX_HOPS} proxies")
        client = _address(header, node)
        if client is None or not is_trusted(client):
            return client
    return client


def _x_forwarded_for(lines: Sequence[str]) -> list[str]:
    return [node for line in lines for item in line.split(",") if (node := item.strip(" \t"))]


TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a grammar (RFC 9110, 5.6.2), not a secret
PAIR: Final = re.compile(rf'({TOKEN})=(?:({TOKEN})|"((?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*)")')
SPACE: Final = re.compile(r"[ \t]*")
ESCAPE: Final = re.compile(r"\\(.)")


def _forwarded(lines: Sequence[str]) -> list[str]:
    """Return the `for` of each element, "unknown" for one without it. Each line is complete: no quote spans two."""
    nodes: list[str] = []
    for line in lines:
        nodes += _elements(line)
    return nodes


def _elements(line: str) -> list[str]:
    nodes: list[str] = []
    pairs: dict[str, str] = {}
    at = _skip(line, 0)
    while at < len(line):
        found = PAIR.match(line, at)
        if found is not None:
            name = found[1].lower()
            if name in pairs:
                raise ForwardedError(f"an element of forwarded has {name!r} twice")
            pairs[name] = found[2] if found[2] is not None else ESCAPE.sub(r"\1", found[3])
            at = _skip(line, found.end())
        if at < len(line):
            if line[at] not in ";,":
                raise ForwardedError("forwarded is no list of name=value pairs (RFC 7239)")
            if line[at] == "," and pairs:
                nodes.append(pairs.get("for", "unknown"))
                pairs = {}
            at = _skip(line, at + 1)
    return [*nodes, pairs.get("for", "unknown")] if pairs else nodes


def _skip(line: str, at: int) -> int:
    found = SPACE.match(line, at)
    assert found is not None
    return found.end()


BRACKETED: Final = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5}|:_[A-Za-z0-9._-]+)?")
IPV4: Final = re.compile(r"([0-9.]+)(?::[0-9]{1,5}|:_[A-Za-z0-9._-]+)?")
HIDDEN: Final = re.compile(r"(?:[Uu][Nn][Kk][Nn][Oo][Ww][Nn]|_[A-Za-z0-9._-]+)(?::[0-9]{1,5}|:_[A-Za-z0-9._-]+)?")


def _address(header: AddressHeader, node: str) -> str | None:
    """Return the address of a node (RFC 7239, 6), None if it is hidden. Raises ForwardedError."""
    if HIDDEN.fullmatch(node) is not None:
        return None
    found = BRACKETED.fullmatch(node) or IPV4.fullmatch(node)
    is_bracketed = node.startswith("[")
    text = found[1] if found is not None else node
    try:
        # An IPv6 address without brackets is not allowed in `Forwarded`, and usual in `X-Forwarded-For`.
        if (found is None and header is AddressHeader.FORWARDED) or is_bracketed != (":" in text and found is not None):
            raise ValueError(node)
        return plain_address(text)
    except ValueError:
        raise ForwardedError(f"an address in {header} is none") from None
