"""Routing of REST calls to the backend itself or, for some calls in esplora mode, to electrs. Pure.

With BACKEND "esplora" a backend does not register the routes that its electrs answers (`bitcoin.routes.ts`); nginx
serves both under one host, the backend at `/api/v1/` and electrs at `/api/` (`production/nginx/location-api.conf`).
"""

import re
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from whaled.config.sections import UpstreamSettings
from whaled.hosts import is_loopback
from whaled.sources.mempool_space.address import REST_PREFIX, esplora_base, rest_base

ESPLORA = "esplora"
# Number of transactions in a response of `block/:hash/txs/:index`. electrs accepts only multiples of it as the index.
PAGE = 10
ESPLORA_PAGE = 25
# The default ports of electrs, one for each network (its config.rs).
ELECTRS_PORTS = (3000, 3001, 3002, 3003, 3004)

# The calls that only electrs answers in esplora mode. The backend itself answers `tx/:txid/rbf` and `tx/:txid/cached`.
_ELECTRS = re.compile(
    r"mempool(/.*)?|tx/[^/]+(/(status|hex|raw|outspends|outspend/.*|merkle-proof))?|txs/outspends|"
    r"block-height/.*|blocks/tip/hash|block/[^/]+/(txids|txs(/.*)?|header|raw|status|txid/.*)"
)


class Routes(Struct):
    """The base URLs of one backend's calls.

    `mode` is none, electrum or esplora; "" until the backend has reported it. `esplora` is the base URL of electrs,
    None while it is unknown.
    """

    base: str
    mode: str = ""
    esplora: str | None = None

    @classmethod
    def of(cls, settings: UpstreamSettings) -> "Routes":
        """Return the routes as known before the first connect. Raises ConfigError."""
        return cls(rest_base(settings), esplora=esplora_base(settings))

    @property
    def is_esplora(self) -> bool:
        """True if electrs, not the backend, answers the calls for blocks and transactions."""
        return self.mode == ESPLORA

    def url(self, path: str) -> str | None:
        """Return the URL of a path below `/api/v1/`; None if no server is known that answers it."""
        if self.is_electrs(path):
            return None if self.esplora is None else self.esplora + path
        return self.base + path

    def is_electrs(self, path: str) -> bool:
        """Return whether electrs answers a path."""
        return self.is_esplora and _ELECTRS.fullmatch(path) is not None

    @property
    def page(self) -> int:
        """The number of transactions in one page of a block."""
        return ESPLORA_PAGE if self.is_esplora else PAGE

    def page_of(self, index: int) -> int:
        """Return the index for `block/:hash/txs/:index` whose response contains the transaction at `index`."""
        return index - index % ESPLORA_PAGE if self.is_esplora else index


def candidates(settings: UpstreamSettings) -> tuple[str, ...]:
    """Return the base URLs at which to look for electrs, in order: only the configured one, or the usual places."""
    configured = esplora_base(settings)
    if configured is not None:
        return (configured,)
    parts = urlsplit(rest_base(settings))
    beside = parts.path.removesuffix(REST_PREFIX) + "/api/" if parts.path.endswith(REST_PREFIX) else None
    found = [] if beside is None else [urlunsplit((parts.scheme, parts.netloc, beside, "", ""))]
    is_direct = settings.proxy is None and settings.unix_socket is None
    if is_direct and is_loopback(parts.hostname or ""):
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        found += [f"http://{host}:{port}/" for port in ELECTRS_PORTS]
    return tuple(found)
