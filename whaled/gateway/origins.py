"""The check of browser origins: which web pages may connect.

A browser sends the origin of the page with the handshake (RFC 6455, 10.2); other clients may send any origin, or none.
The check therefore protects the user of a browser, not whaled. It keeps a foreign page from reading through the browser
what the page's own server cannot reach.
"""

from collections.abc import Sequence

from msgspec import Struct
from websockets.datastructures import Headers

from whaled.config.origins import origin_fault
from whaled.hosts import is_address_or_localhost, split_authority

SCHEMES = {"http": "80", "https": "443"}
# Responses and log lines contain at most this many characters of a refused origin, since the sender chose it.
MAX_SHOWN = 200
KEY = "gateway.origins"
# No valid origin is longer: a host name has at most 253 bytes.
MAX_ORIGIN = 300


class Origins(Struct, frozen=True):
    """The configured rule: listed origins, all origins (`*`), and the origin of whaled's own address."""

    listed: frozenset[str]
    allows_all: bool
    allows_named_own: bool

    @classmethod
    def of(cls, origins: Sequence[str], *, needs_token: bool) -> "Origins":
        """Return the rule for these configured origins. `needs_token` is True if clients must authenticate.

        Then pages of whaled's own host name may connect too, since without a token they can read nothing.
        """
        return cls(frozenset(origins), "*" in origins, needs_token)

    def refusal(self, headers: Headers, *, is_tls: bool) -> str | None:
        """Return the text that refuses a page, or None if the page may connect or there is no Origin header."""
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
        # Programs other than browsers may send it in capitals.
        return origin in self.listed or origin.lower() in self.listed


def is_own(origin: str, host: str, *, is_tls: bool) -> bool:
    """Return whether an origin has the host and port of the request's Host header.

    Over TLS the origin must be https, since an attacker on the network can serve plain http in the server's name.
    Without TLS both http and https are accepted, since a proxy may terminate TLS.
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
    """Return an origin in a form safe to send and log: ASCII, and shortened to MAX_SHOWN characters."""
    text = origin.encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _host(origin: str) -> str:
    found = split_authority(origin.lower().partition("://")[2])
    return found[0] if found is not None else ""
