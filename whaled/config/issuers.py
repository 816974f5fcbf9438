"""Issuers of access tokens as the configuration names them: what each needs, and conflicts between them. Pure."""

from collections.abc import Callable, Iterator
from urllib.parse import SplitResult

from whaled.config.claims import claim_path, claim_rule
from whaled.config.sections import AuthSettings, IssuerSettings
from whaled.hosts import is_loopback
from whaled.urls import redacted, usable

ISSUERS = "auth.issuers"


def trusted_url(url: str) -> SplitResult | None:
    """Return the parts of a URL whose answers can be trusted: https://, or http:// on this machine; None for others."""
    parts = usable(url, ("https", "http"))
    if parts is None or parts.username is not None or parts.password is not None:
        return None
    is_safe = parts.scheme == "https" or is_loopback(parts.hostname or "")
    return parts if is_safe and url.isascii() and url.isprintable() else None


def issuer_faults(auth: AuthSettings) -> Iterator[tuple[str, str]]:
    """Yield the key and the problem of each fault in the list of issuers."""
    first: dict[tuple[str, str], int] = {}
    for index, issuer in enumerate(auth.issuers):
        path = f"{ISSUERS}[{index}]"
        yield from ((f"{path}.{name}", problem) for name, problem in _faults(issuer, auth))
        for name, value in (("name", issuer.name), ("issuer", issuer.issuer)):
            if first.setdefault((name, value), index) != index:
                yield f"{path}.{name}", f"{value!r} is also that of {ISSUERS}[{first[name, value]}]: it must be unique"


def _faults(issuer: IssuerSettings, auth: AuthSettings) -> Iterator[tuple[str, str]]:
    """Yield the faults of one issuer, with the name of the key."""
    parts = trusted_url(issuer.issuer)
    expected = "expected https://host[:port][/...], or http:// with an address of this machine, without a user"
    if parts is None or parts.query:
        yield "issuer", f"found {redacted(issuer.issuer)!r}, {expected} and without a query"
    if issuer.issuer == auth.issuer:
        yield "issuer", "is also auth.issuer, which tokens of the key ring state: they could not be told apart"
    if issuer.jwks_uri is not None and trusted_url(issuer.jwks_uri) is None:
        yield "jwks_uri", f"found {redacted(issuer.jwks_uri)!r}, {expected}"
    if not issuer.algorithms:
        yield "algorithms", "needs at least one algorithm"
    if not (issuer.read or issuer.write or issuer.admin):
        yield (
            "read",
            "its tokens would grant nothing: list claims in `read`, `write` or `admin`, such as scope=whales:read",
        )
    yield from _claims("client_id_claim", (issuer.client_id_claim,), claim_path)
    for name, texts in (("read", issuer.read), ("write", issuer.write), ("admin", issuer.admin)):
        yield from _claims(name, texts, claim_rule)


def _claims(name: str, texts: tuple[str, ...], read: Callable[[str], object]) -> Iterator[tuple[str, str]]:
    for text in texts:
        try:
            read(text)
        except ValueError as error:
            yield name, f"found {text[:80]!r}, {error}"
