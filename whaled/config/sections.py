"""The configuration as frozen values: every key with its default and its unit.

The annotations define what the parser accepts: `Seconds` are written "30s", "5m", "90d"; `Bytes` "16KiB", "1MiB".
`config/whaled.example.yaml` documents the same keys for the operator, and a test compares the two.

Pure.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct, field

from whaled.model import OwnerType

# The upper bounds are far above any sensible value; they only prevent overflows in later calculations.
Seconds = Annotated[float, Meta(ge=0.001, le=36_525 * 86400.0, extra={"unit": "duration"})]
# How far the clocks of the token issuer and of this machine may differ. More would extend the life of expired tokens.
MAX_LEEWAY_S = 30.0
Leeway = Annotated[float, Meta(ge=0, le=MAX_LEEWAY_S, extra={"unit": "duration"})]
Bytes = Annotated[int, Meta(ge=1, le=1024**4, extra={"unit": "size"})]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Rate = Annotated[float, Meta(ge=0.001, le=1_000_000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Text = Annotated[str, Meta(min_length=1)]
Path = Annotated[str, Meta(min_length=1, extra={"unit": "path"})]
# Names of rules appear in log lines and filters; with these characters they need no quotes there.
RULE_NAME = r"^[A-Za-z0-9._-]+\Z"
MAX_WATCH_RULES = 100
MAX_BOOKS = 16
Url = Annotated[str, Meta(min_length=1, extra={"unit": "url"})]
# A machine usually serves one or two networks; each address needs a listening socket.
MAX_HOSTS = 16
Host = Annotated[str, Meta(extra={"unit": "host"})]
Hosts = Annotated[tuple[Host, ...], Meta(min_length=1, max_length=MAX_HOSTS, extra={"unit": "hosts"})]
Origin = Annotated[str, Meta(extra={"unit": "origin"})]


class Basis(StrEnum):
    """The amount that is compared with the threshold."""

    TOTAL = "total"
    MOVED = "moved"
    INPUTS = "inputs"


class LogFormat(StrEnum):
    """The format of log lines. `auto` means text on a terminal, journald's protocol under systemd, otherwise JSON."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"
    JOURNALD = "journald"


class LogLevel(StrEnum):
    """The lowest severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class UpstreamSettings(Struct, frozen=True, kw_only=True):
    """The mempool backend."""

    url: Url = "ws://127.0.0.1:8999/api/v1/ws"
    rest_url: Url | None = None
    esplora_url: Url | None = None
    proxy: Url | None = None
    unix_socket: Path | None = None
    connect_timeout: Seconds = 10.0
    rest_timeout: Seconds = 10.0
    rest_concurrency: Count = 6
    max_message: Bytes = 256 * 1024 * 1024
    ping_interval: Seconds = 20.0
    stale_after: Seconds = 60.0
    reconnect_initial: Seconds = 0.5
    reconnect_max: Seconds = 30.0
    stable_after: Seconds = 60.0


class WatchRule(Struct, frozen=True, kw_only=True):
    """Owners of the address book to watch, by label or type, with the amount from which their payments are alerted."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=RULE_NAME)]
    labels: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] = ()
    types: tuple[OwnerType, ...] = ()
    threshold_btc: Annotated[float, Meta(ge=0, le=21_000_000)] = 0.0


class DetectionSettings(Struct, frozen=True, kw_only=True):
    """The rules by which a transaction is a whale."""

    threshold_btc: Annotated[float, Meta(ge=0.000_000_01, le=21_000_000)] | None = 100.0
    threshold_usd: Annotated[float, Meta(ge=0.01, le=1e15)] | None = None
    watch: tuple[WatchRule, ...] = ()
    basis: Basis = Basis.TOTAL
    price_max_age: Seconds = 7200.0
    min_flow_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    fetch_inputs: bool = True
    inputs_wait: Seconds = 2.0
    address_book: Path | Annotated[tuple[Path, ...], Meta(max_length=MAX_BOOKS)] | None = None
    max_book_addresses: Annotated[int, Meta(ge=1, le=10_000_000)] = 1_000_000
    max_book_loss: Annotated[float, Meta(ge=0, le=1)] = 0.5
    seen_limit: Count = 200_000

    @property
    def books(self) -> tuple[str, ...]:
        """Return the files of the address book, the one with the highest priority first."""
        if self.address_book is None:
            return ()
        return (self.address_book,) if isinstance(self.address_book, str) else self.address_book


class BackfillSettings(Struct, frozen=True, kw_only=True):
    """Requests to the backend for what its stream does not contain."""

    enabled: bool = True
    first_mempool: bool = True
    max_blocks: Count = 1008
    requests_per_second: Rate = 50.0
    concurrency: Count = 4
    interval: Seconds = 300.0
    drop_after: Seconds = 600.0


class EventLogSettings(Struct, frozen=True, kw_only=True):
    """The durable event log."""

    path: Path = "/var/lib/whaled/whaled.db"
    retention: Seconds = 90 * 86400.0
    prune_interval: Seconds = 3600.0
    busy_timeout: Annotated[float, Meta(ge=0.001, le=3600.0, extra={"unit": "duration"})] = 5.0


class TlsSettings(Struct, frozen=True, kw_only=True):
    """Certificate chain and private key, both PEM files. TLS is enabled if both are set."""

    certificate: Path | None = None
    private_key: Path | None = None


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """The WebSocket server for clients."""

    host: Hosts = ("127.0.0.1",)
    port: Port = 8765
    backlog: Count = 4096
    origins: tuple[Origin, ...] = ()
    max_connections: Count = 10_000
    max_connections_per_address: Count = 200
    max_connections_per_client: Count = 1_000
    max_unauthenticated: Count = 1_000
    max_failed_connects: Count = 20
    handshake_timeout: Seconds = 5.0
    auth_timeout: Seconds = 5.0
    max_frame: Bytes = 16 * 1024
    compression: bool = True
    max_addresses: Count = 1_000
    messages_per_second: Rate = 10.0
    message_burst: Count = 40
    client_messages_per_second: Rate = 100.0
    client_message_burst: Count = 400
    max_unsent: Bytes = 256 * 1024
    slow_timeout: Seconds = 60.0
    replay_page: Count = 500
    ping_interval: Seconds = 30.0
    ping_timeout: Seconds = 30.0
    close_timeout: Seconds = 5.0
    position_interval: Seconds = 30.0
    drain_window: Seconds = 10.0
    tls: TlsSettings = field(default_factory=TlsSettings)


class AuthSettings(Struct, frozen=True, kw_only=True):
    """Authentication of clients."""

    enabled: bool = True
    key_ring: Path = "/etc/whaled/keys.json"
    token_ttl: Seconds = 86400.0
    max_token_ttl: Seconds = 90 * 86400.0
    expiry_grace: Seconds = 25.0
    leeway: Leeway = 30.0
    failures_per_second: Rate = 0.2
    failure_burst: Count = 20
    issuer: Text | None = None
    audience: Text | None = None


class HttpSettings(Struct, frozen=True, kw_only=True):
    """The plain HTTP server with /metrics and /healthz."""

    enabled: bool = True
    host: Hosts = ("127.0.0.1",)
    port: Port = 9108
    allowed_hosts: tuple[str, ...] = ()
    max_connections: Count = 64
    max_connections_per_address: Count = 16
    header_timeout: Seconds = 10.0
    idle_timeout: Seconds = 120.0
    write_timeout: Seconds = 10.0
    max_request: Bytes = 16 * 1024
    requests_per_second: Rate = 50.0
    render_interval: Seconds = 1.0


class CanarySettings(Struct, frozen=True, kw_only=True):
    """A synthetic transaction that passes through the whole pipeline, to prove that a whale would."""

    interval: Seconds = 30.0
    deadline: Seconds = 2.0
    lost_after: Seconds = 10.0


class MemorySettings(Struct, frozen=True, kw_only=True):
    """The memory limit, and when load is shed so that the kernel does not end the process."""

    limit: Annotated[int, Meta(ge=128 * 1024**2, le=1024**4, extra={"unit": "size"})] | None = None
    shed_at: Annotated[float, Meta(ge=0.1, le=1)] = 0.85


class LogSettings(Struct, frozen=True, kw_only=True):
    """Log output."""

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.AUTO


class Config(Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    backfill: BackfillSettings = field(default_factory=BackfillSettings)
    eventlog: EventLogSettings = field(default_factory=EventLogSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    log: LogSettings = field(default_factory=LogSettings)
