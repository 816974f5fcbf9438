"""Where each REST call goes: to the backend itself, or in esplora mode for some of them to electrs. Pure.

With BACKEND "esplora" a backend does not register the routes that its electrs answers (`bitcoin.routes.ts`); nginx puts
both under one host, the backend at `/api/v1/` and electrs at `/api/` (`production/nginx/location-api.conf`).
"""

import re
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from whaled.config.rules import is_loopback
from whaled.config.sections import Upstream
from whaled.upstream.address import REST_PREFIX, esplora_base, rest_base

ESPLORA = "esplora"
# Transactions in an answer of `block/:hash/txs/:index`. electrs takes multiples of its page as an index only.
PAGE = 10
ESPLORA_PAGE = 25
# electrs listens on these by default, one port for each network (its config.rs).
ELECTRS_PORTS = (3000, 3001, 3002, 3003, 3004)

# What only electrs answers in esplora mode. `tx/:txid/rbf` and `tx/:txid/cached` stay with the backend.
_ELECTRS = re.compile(
    r"mempool(/.*)?|tx/[^/]+(/(status|hex|raw|outspends|outspend/.*|merkle-proof))?|txs/outspends|"
    r"block-height/.*|blocks/tip/hash|block/[^/]+/(txids|txs(/.*)?|header|raw|status|txid/.*)"
)


class Routes(Struct):
    """The bases of one backend's calls. `mode` is none, electrum or esplora; "" until the backend has named it.

    `esplora` is the base of electrs, None while none is known.
    """

    base: str
    mode: str = ""
    esplora: str | None = None

    @classmethod
    def of(cls, settings: Upstream) -> "Routes":
        """Before the first connect. Raises ConfigError."""
        return cls(rest_base(settings), esplora=esplora_base(settings))

    @property
    def is_esplora(self) -> bool:
        """Whether the backend leaves blocks and transactions to electrs."""
        return self.mode == ESPLORA

    def url(self, path: str) -> str | None:
        """Where to ask for a path below `/api/v1/`; None if nothing is known that answers it."""
        if self.is_electrs(path):
            return None if self.esplora is None else self.esplora + path
        return self.base + path

    def is_electrs(self, path: str) -> bool:
        """Whether a path is electrs' to answer."""
        return self.is_esplora and _ELECTRS.fullmatch(path) is not None

    @property
    def page(self) -> int:
        """How many transactions of a block come at a time."""
        return ESPLORA_PAGE if self.is_esplora else PAGE

    def page_of(self, index: int) -> int:
        """The index to ask `block/:hash/txs/:index` for, so that the answer holds the transaction at `index`."""
        return index - index % ESPLORA_PAGE if self.is_esplora else index


def candidates(settings: Upstream) -> tuple[str, ...]:
    """Bases where electrs may be, to try in this order: the configured one only, or the usual places."""
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
