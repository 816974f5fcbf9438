"""Conflicts between keys of one configuration, and keys whose URL or host name cannot be used. Pure."""

from collections.abc import Iterator
from urllib.parse import SplitResult, unquote_to_bytes

from msgspec import Struct

from whaled.config.issuers import issuer_faults
from whaled.config.sections import Config, DetectionSettings, ProxyProtocol
from whaled.hosts import HOST_NAME
from whaled.urls import redacted, usable

PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


class Conflict(Struct, frozen=True):
    """A problem of a key in combination with others: `path` is the key to change, `others` are involved.

    `found` is the value of the key, without possible secrets of a URL, if it helps to quote it.
    """

    path: str
    problem: str
    others: tuple[str, ...] = ()
    found: str | None = None


def conflicts(config: Config) -> Iterator[Conflict]:
    """Yield the conflicts in a configuration whose keys are valid on their own."""
    yield from _urls(config)
    yield from _hosts(config)
    yield from _times(config)
    yield from _ways(config)
    yield from _whales(config.detection)
    yield from (Conflict(path, problem, ("auth.issuers",)) for path, problem in issuer_faults(config.auth))
    yield from _proxies(config)
    tls = config.gateway.tls
    if (tls.certificate is None) != (tls.private_key is None):
        given, missing = ("certificate", "private_key") if tls.private_key is None else ("private_key", "certificate")
        yield Conflict(
            f"gateway.tls.{missing}",
            "missing: TLS needs both `certificate` and `private_key`",
            (f"gateway.tls.{given}",),
        )


def _urls(config: Config) -> Iterator[Conflict]:
    upstream = config.upstream
    for path, url, schemes in (
        ("upstream.url", upstream.url, ("ws", "wss")),
        ("upstream.rest_url", upstream.rest_url, ("http", "https")),
        ("upstream.esplora_url", upstream.esplora_url, ("http", "https")),
        ("upstream.proxy", upstream.proxy, PROXY_SCHEMES),
    ):
        if url is not None and usable(url, schemes) is None:
            forms = " or ".join(f"{scheme}://host[:port]/..." for scheme in schemes)
            yield Conflict(path, f"expected {forms}", found=redacted(url))
    yield from _proxy(config)


def _proxy(config: Config) -> Iterator[Conflict]:
    upstream = config.upstream
    proxy = upstream.proxy
    parts = usable(proxy, PROXY_SCHEMES) if proxy is not None else None
    if proxy is not None and parts is not None:
        if parts.path.strip("/") or parts.query:
            yield Conflict("upstream.proxy", "expected no path after host and port", found=redacted(proxy))
        elif parts.scheme.startswith("socks") and parts.username is not None and not _is_socks_login(parts):
            yield Conflict("upstream.proxy", "SOCKS5 needs a user and a password of 1 to 255 bytes each (RFC 1929)")
    if upstream.unix_socket is not None or (proxy is not None and not proxy.startswith("socks5://")):
        return
    for path, url in (
        ("upstream.url", upstream.url),
        ("upstream.rest_url", upstream.rest_url),
        ("upstream.esplora_url", upstream.esplora_url),
    ):
        found = usable(url, ("ws", "wss", "http", "https")) if url is not None else None
        if found is not None and (found.hostname or "").rstrip(".").endswith(".onion"):
            yield Conflict(
                path,
                "a .onion name cannot be resolved on this machine (RFC 7686), only by Tor: set upstream.proxy to "
                "socks5h://127.0.0.1:9050 (the h lets the proxy resolve it)",
                ("upstream.proxy",),
            )


def _is_socks_login(parts: SplitResult) -> bool:
    return all(1 <= len(unquote_to_bytes(text or "")) <= 255 for text in (parts.username, parts.password))


def _hosts(config: Config) -> Iterator[Conflict]:
    gateway, http = config.gateway, config.http
    for name in http.allowed_hosts:
        if name != "*" and not HOST_NAME.fullmatch(name):
            yield Conflict(
                "http.allowed_hosts",
                "expected a host name in lower case, without scheme and port, or *",
                found=redacted(name),
            )
    if http.enabled and gateway.port and gateway.port == http.port:
        yield Conflict("http.port", "must not be the same as gateway.port", ("gateway.port", "http.enabled"))


def _ways(config: Config) -> Iterator[Conflict]:
    if config.upstream.unix_socket is not None and config.upstream.proxy is not None:
        yield Conflict(
            "upstream.unix_socket", "cannot be combined with upstream.proxy: set only one of them", ("upstream.proxy",)
        )


def _proxies(config: Config) -> Iterator[Conflict]:
    gateway = config.gateway
    if gateway.proxy_protocol is not ProxyProtocol.NEVER and not gateway.trusted_proxies:
        yield Conflict(
            "gateway.proxy_protocol",
            "needs gateway.trusted_proxies: the header is accepted from these peers only",
            ("gateway.trusted_proxies",),
        )


def _whales(detection: DetectionSettings) -> Iterator[Conflict]:
    watch = "detection.watch"
    if detection.threshold_btc is None and detection.threshold_usd is None and not detection.watch:
        yield Conflict(
            "detection.threshold_btc",
            "null needs another rule, detection.threshold_usd or detection.watch: without one nothing is a whale",
            ("detection.threshold_usd", watch),
        )
    if detection.watch and not detection.books:
        yield Conflict(
            watch,
            "needs detection.address_book, which defines labels and types",
            ("detection.address_book",),
        )
    first: dict[str, int] = {}
    for index, rule in enumerate(detection.watch):
        path = f"{watch}[{index}]"
        if not (rule.labels or rule.types):
            yield Conflict(path, "matches nothing: set `labels` or `types`", (watch,))
        if first.setdefault(rule.name, index) != index:
            yield Conflict(
                f"{path}.name",
                f"{rule.name!r} is also the name of {watch}[{first[rule.name]}]: names must be unique",
                (watch,),
            )


def _times(config: Config) -> Iterator[Conflict]:
    upstream, auth = config.upstream, config.auth
    for shorter, short_s, longer, long_s in (
        ("upstream.reconnect_initial", upstream.reconnect_initial, "upstream.reconnect_max", upstream.reconnect_max),
        ("auth.token_ttl", auth.token_ttl, "auth.max_token_ttl", auth.max_token_ttl),
    ):
        if short_s > long_s:
            yield Conflict(shorter, f"must not be longer than {longer}", (longer,))
    if upstream.ping_interval >= upstream.stale_after:
        yield Conflict(
            "upstream.stale_after", "must be longer than upstream.ping_interval", ("upstream.ping_interval",)
        )
