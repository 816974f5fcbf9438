"""Which browser pages may connect. Pure.

A browser sends the origin of the page with the handshake (RFC 6455, 10.2); other clients send what they like, or none.
The check therefore protects the user of a browser, not whaled: it keeps pages of strangers from reading, through a
browser that can reach whaled, what the page's own server cannot reach.
"""

from collections.abc import Sequence

from msgspec import Struct
from websockets.datastructures import Headers

from whaled.config.origins import origin_fault
from whaled.hosts import is_address_or_localhost, split_authority

SCHEMES = {"http": "80", "https": "443"}
# Of a refused origin this much is answered and logged: whoever sent it chose it.
MAX_SHOWN = 200
KEY = "gateway.origins"
# A host name has 253 bytes at most.
MAX_ORIGIN = 300


class Origins(Struct, frozen=True):
    """The rule in force: origins that are listed, every one (`*`), and that of whaled's own address."""

    listed: frozenset[str]
    allows_all: bool
    allows_named_own: bool

    @classmethod
    def of(cls, origins: Sequence[str], *, needs_token: bool) -> "Origins":
        """`needs_token`: clients authenticate, so that a page which may connect still reads nothing without a token."""
        return cls(frozenset(origins), "*" in origins, needs_token)

    def refusal(self, headers: Headers, *, is_tls: bool) -> str | None:
        """The answer to a request whose page may not connect, None if it may or there is no page."""
        found = headers.get_all("Origin")
        if not found or self.allows_all:
            return None
        if len(found) > 1:
            return f"the Origin header came {len(found)} times: a page has one origin"
        origin = found[0]
        if self._is_listed(origin):
            return None
        own = is_own(origin, headers.get("Host", ""), is_tls=is_tls)
        if own and (self.allows_named_own or is_address_or_localhost(_host(origin))):
            return None
        if own:
            return (
                f"pages of {shown(origin)} may not connect: without authentication a name is not let in by its own "
                f"Host header (DNS rebinding). The operator of this whaled can add it to {KEY}"
            )
        if not origin:
            return "the Origin header is empty: a page sends its origin, and a program may leave the header out"
        if not _can_be_listed(origin):
            return f"the Origin header is no origin as browsers send it, like https://example.org: {shown(origin)}"
        return f"pages of {shown(origin)} may not connect: the operator of this whaled can add it to {KEY}"

    def _is_listed(self, origin: str) -> bool:
        # Programs that are no browsers may write it in capitals.
        return origin in self.listed or origin.lower() in self.listed


def is_own(origin: str, host: str, *, is_tls: bool) -> bool:
    """Whether a page came from the host and port that the request names, as whaled's own page would.

    Over TLS only https pages are: on the network anybody can answer plain http in the server's name. Without TLS https
    pages are too, since a proxy that ends TLS passes their requests on.
    """
    scheme, separator, authority = origin.lower().partition("://")
    if not separator or scheme not in SCHEMES or (is_tls and scheme != "https"):
        return False
    theirs, ours = split_authority(authority), split_authority(host.strip())
    if theirs is None or ours is None:
        return False
    default = SCHEMES[scheme]
    return (theirs[0], theirs[1] or default) == (ours[0], ours[1] or default)


def _can_be_listed(origin: str) -> bool:
    return len(origin) <= MAX_ORIGIN and origin != "*" and origin_fault(origin.lower()) is None


def shown(origin: str) -> str:
    """An origin as it may be answered and logged: ASCII, and not longer than a line."""
    text = origin.encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _host(origin: str) -> str:
    found = split_authority(origin.lower().partition("://")[2])
    return found[0] if found is not None else ""
