"""The configuration as frozen values. Each key is declared once, here, with all that is known about it.

A declaration holds the type with its unit and bounds (`fields`), the meaning, `RELOAD` if a reload changes the key in a
running daemon, the `Option` of `whaled run` that sets the key if there is one, and the default. `keys` reads the
declarations; the example file and the tables of docs/configuration.md are written from them (`make configuration`).

Pure.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Struct, field

from whaled.config.fields import (
    RELOAD,
    AmountBtc,
    BookSize,
    Bytes,
    Count,
    FetchSeconds,
    Hosts,
    Leeway,
    MemorySize,
    Name,
    Option,
    Origin,
    Path,
    Paths,
    Port,
    Proxies,
    Rate,
    RefreshSeconds,
    RuleName,
    Seconds,
    Share,
    ShedShare,
    ShortSeconds,
    Text,
    ThresholdBtc,
    ThresholdUsd,
    ThrottleSeconds,
    Url,
)
from whaled.model import OwnerType


class Basis(StrEnum):
    """The amount that is compared with the threshold."""

    TOTAL = "total"
    MOVED = "moved"
    INPUTS = "inputs"


class ProxyProtocol(StrEnum):
    """Whether trusted proxies send the header of the PROXY protocol."""

    NEVER = "never"
    OPTIONAL = "optional"
    REQUIRED = "required"


class AddressHeader(StrEnum):
    """The header of a request in which trusted proxies name the client."""

    NONE = "none"
    X_FORWARDED_FOR = "x-forwarded-for"
    FORWARDED = "forwarded"


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

    url: Annotated[
        Url,
        "WebSocket of the backend: ws:// or wss://, any path",
        Option("--mempool-url", "WebSocket URL of the mempool backend", metavar="URL"),
    ] = "ws://127.0.0.1:8999/api/v1/ws"
    rest_url: Annotated[Url | None, "REST API of the backend; null: host and port of url, http(s)://.../api/v1"] = None
    esplora_url: Annotated[
        Url | None, "electrs of a backend in esplora mode; null: searched for next to rest_url and on this machine"
    ] = None
    proxy: Annotated[
        Url | None,
        "proxy for stream and REST: http://, https:// (CONNECT), socks5:// or socks5h://, "
        "[user:password@]host:port; the environment's proxy settings are ignored",
    ] = None
    unix_socket: Annotated[
        Path | None, "connect through this Unix socket instead (egress split); url still names the host"
    ] = None
    connect_timeout: Annotated[
        Seconds, "time limit for connecting, upgrade and first response, and for each request for a projected block"
    ] = 10.0
    rest_timeout: Annotated[Seconds, "time limit for one REST request"] = 10.0
    rest_concurrency: Annotated[
        Count, "concurrent REST requests; at least one is reserved for the inputs of live whales"
    ] = 6
    max_message: Annotated[Bytes, "largest message accepted; a burst of 2000 transactions has 3 MB"] = 256 * 1024 * 1024
    ping_interval: Annotated[Seconds, "ping the backend after this long without a message"] = 20.0
    stale_after: Annotated[Seconds, "give up the link after this long without a message or an answer to a ping"] = 60.0
    reconnect_initial: Annotated[
        Seconds, "longest first delay before a reconnect; later delays grow up to a quarter of the outage ..."
    ] = 0.5
    reconnect_max: Annotated[Seconds, "... but not beyond this; attempts never end"] = 30.0
    stable_after: Annotated[
        Seconds, "a link that lasts this long ends the outage; a shorter one shortens the outage by its duration"
    ] = 60.0


class WatchRule(Struct, frozen=True, kw_only=True):
    """Owners of the address book to watch, by label or type, with the amount from which their payments are alerted."""

    name: RuleName
    labels: tuple[Name, ...] = ()
    types: tuple[OwnerType, ...] = ()
    threshold_btc: AmountBtc = 0.0


class DetectionSettings(Struct, frozen=True, kw_only=True):
    """The rules by which a transaction is a whale."""

    threshold_btc: Annotated[
        ThresholdBtc | None,
        "BTC; a transaction of at least this amount is a whale; null: only other rules apply",
        RELOAD,
        Option("--whale-threshold", "minimum value of a whale", metavar="BTC"),
    ] = 100.0
    threshold_usd: Annotated[
        ThresholdUsd | None,
        "USD; a transaction of at least this amount is a whale too; matches nothing while the price is unknown",
        RELOAD,
    ] = None
    watch: Annotated[
        tuple[WatchRule, ...], "owners whose payments are alerted, and from which amount, see docs/detection.md", RELOAD
    ] = ()
    basis: Annotated[
        Basis,
        "amount that is compared: total (all outputs), moved (outputs that do not return) or inputs (all inputs)",
        RELOAD,
    ] = Basis.TOTAL
    price_max_age: Annotated[Seconds, "an older price counts as unknown", RELOAD] = 7200.0
    min_flow_share: Annotated[
        Share, "smallest share of the amount leaving its payers that counts as a flow; 0: any amount", RELOAD
    ] = 0.1
    fetch_inputs: Annotated[bool, "request a whale's inputs from the backend if its message lacks them"] = True
    inputs_wait: Annotated[
        Seconds, "longest time that an alert waits for its inputs; after that it is sent with moved_sat null"
    ] = 2.0
    address_book: Annotated[
        Path | Paths | None,
        "CSV file `label,address,type`, or several, of which the first has priority; null: every flow is unknown",
        RELOAD,
    ] = None
    max_book_addresses: Annotated[
        BookSize, "addresses in the book, each 21 bytes of memory; a larger book is refused", RELOAD
    ] = 1_000_000
    max_book_loss: Annotated[
        Share, "a reload of the same file that loses a greater share of its addresses is refused", RELOAD
    ] = 0.5
    seen_limit: Annotated[Count, "transactions remembered as already examined"] = 200_000

    @property
    def books(self) -> tuple[str, ...]:
        """Return the files of the address book, the one with the highest priority first."""
        if self.address_book is None:
            return ()
        return (self.address_book,) if isinstance(self.address_book, str) else self.address_book


class BackfillSettings(Struct, frozen=True, kw_only=True):
    """Requests to the backend for what its stream does not contain."""

    enabled: Annotated[bool, "false: transactions missing from the stream are not alerted"] = True
    first_mempool: Annotated[bool, "also alert whales that are in the mempool at the very first start"] = True
    max_blocks: Annotated[Count, "blocks scanned after an outage; older ones are skipped and counted"] = 1008
    requests_per_second: Annotated[Rate, "limit of REST requests per second"] = 50.0
    concurrency: Annotated[Count, "concurrent REST requests, within upstream.rest_concurrency"] = 4
    interval: Annotated[Seconds, "time between two mempool comparisons; each reconnect has one too"] = 300.0
    drop_after: Annotated[
        Seconds,
        "a whale in neither the mempool nor a block counts as dropped after this time, from when whaled "
        "noticed (or started)",
    ] = 600.0


class EventLogSettings(Struct, frozen=True, kw_only=True):
    """The durable event log."""

    path: Annotated[
        Path, "SQLite database; its directory must exist", Option("--db-path", "event log", metavar="FILE")
    ] = "/var/lib/whaled/whaled.db"
    retention: Annotated[
        Seconds, "older events are removed; a client that was away longer receives recovered: false"
    ] = 90 * 86400.0
    prune_interval: Annotated[Seconds, "time between two removals"] = 3600.0
    busy_timeout: Annotated[ShortSeconds, "longest wait for another program that has locked the database"] = 5.0


class TlsSettings(Struct, frozen=True, kw_only=True):
    """Certificate chain and private key, both PEM files. TLS is enabled if both are set."""

    certificate: Annotated[Path | None, "PEM file with the certificate chain", RELOAD] = None
    private_key: Annotated[Path | None, "PEM file with the private key", RELOAD] = None


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """The WebSocket server for clients."""

    host: Annotated[
        Hosts,
        'address to listen on, or a list of them; "::" for all of IPv4 and IPv6, 0.0.0.0 for all of IPv4',
        Option("--ws-host", "address for clients, or several separated by commas", metavar="HOST"),
    ] = ("127.0.0.1",)
    port: Annotated[
        Port, "port to listen on; 0: any free port", Option("--ws-port", "port for clients", metavar="PORT")
    ] = 8765
    backlog: Annotated[Count, "connections that the kernel queues until they are accepted"] = 4096
    origins: Annotated[
        tuple[Origin, ...],
        "browser origins that may connect, in addition to pages of whaled's own host and port, like "
        'https://example.org or chrome-extension://ID; "null" for pages without an origin; "*" for all',
        RELOAD,
    ] = ()
    trusted_proxies: Annotated[
        Proxies,
        'addresses or networks of proxies that name their clients, like 10.0.0.5 or 2001:db8::/32; "unix" for the '
        "peers of a Unix socket; see docs/proxy.md",
        RELOAD,
    ] = ()
    proxy_protocol: Annotated[
        ProxyProtocol,
        "whether trusted proxies send a PROXY protocol header (version 1 or 2): required refuses connections of "
        "theirs without it",
        RELOAD,
    ] = ProxyProtocol.NEVER
    client_address_header: Annotated[
        AddressHeader, "the header in which trusted proxies name the client; from others it is ignored", RELOAD
    ] = AddressHeader.X_FORWARDED_FOR
    max_connections: Annotated[Count, "connections in total; further ones receive 503", RELOAD] = 10_000
    max_connections_per_address: Annotated[
        Count, "connections per address (IPv6: per /64); further ones receive 429", RELOAD
    ] = 200
    max_connections_per_client: Annotated[
        Count, "connections per client_id; further ones are closed 1013, to be retried later", RELOAD
    ] = 1_000
    max_unauthenticated: Annotated[
        Count,
        "unauthenticated connections; beyond this, a new one displaces the oldest, or one of the busiest network",
        RELOAD,
    ] = 1_000
    max_failed_connects: Annotated[
        Count,
        "failed connections per network (/24, /48) in about a second; beyond this, and only while more "
        "connections arrive than can be accepted, new ones from the network are reset",
        RELOAD,
    ] = 20
    handshake_timeout: Annotated[Seconds, "time from accept to the WebSocket handshake", RELOAD] = 5.0
    auth_timeout: Annotated[Seconds, "time from the handshake to a valid token; then close 1008", RELOAD] = 5.0
    max_frame: Annotated[Bytes, "largest message from a client; a larger one: close 1009", RELOAD] = 16 * 1024
    compression: Annotated[bool, "permessage-deflate for clients that offer it; applies to new connections", RELOAD] = (
        True
    )
    max_addresses: Annotated[Count, "addresses per filter", RELOAD] = 1_000
    messages_per_second: Annotated[
        Rate, "average message rate per connection; large messages count more, see docs/protocol.md", RELOAD
    ] = 10.0
    message_burst: Annotated[
        Count, "messages per connection at once; as many again over the limit: close 1008", RELOAD
    ] = 40
    client_messages_per_second: Annotated[Rate, "average message rate of all connections of one client_id", RELOAD] = (
        100.0
    )
    client_message_burst: Annotated[Count, "messages of all connections of one client_id at once", RELOAD] = 400
    max_unsent: Annotated[
        Bytes, "unsent bytes per client; beyond this the client is served by replay from the log", RELOAD
    ] = 256 * 1024
    slow_timeout: Annotated[Seconds, "a client that accepts no data for this long is closed 1013", RELOAD] = 60.0
    replay_page: Annotated[
        Count, "events read from the log at a time; at most 100 while other replays wait", RELOAD
    ] = 500
    ping_interval: Annotated[Seconds, "time between two pings to a client", RELOAD] = 30.0
    ping_timeout: Annotated[
        Seconds, "a client that does not answer a ping within this time is disconnected", RELOAD
    ] = 30.0
    close_timeout: Annotated[
        Seconds, "a client that does not answer a close within this time is disconnected", RELOAD
    ] = 5.0
    position_interval: Annotated[Seconds, "how often clients without a matching event receive the position", RELOAD] = (
        30.0
    )
    drain_window: Annotated[
        Seconds, "longest duration of a stop, in which clients are notified, then closed, then disconnected", RELOAD
    ] = 10.0
    tls: TlsSettings = field(default_factory=TlsSettings)


class Algorithm(StrEnum):
    """A signature algorithm of access tokens (RFC 7518, RFC 8037), all with public keys."""

    RS256 = "RS256"
    RS384 = "RS384"
    RS512 = "RS512"
    PS256 = "PS256"
    PS384 = "PS384"
    PS512 = "PS512"
    ES256 = "ES256"
    ES384 = "ES384"
    ES512 = "ES512"
    EDDSA = "EdDSA"


class IssuerSettings(Struct, frozen=True, kw_only=True):
    """A trusted issuer of access tokens. docs/oidc.md explains each key.

    `read`, `write` and `admin` list claims, as `config.claims` reads them; any of them grants the permission.
    """

    name: RuleName
    issuer: Url
    audience: Text
    algorithms: tuple[Algorithm, ...] = (Algorithm.RS256,)
    client_id_claim: Text = "client_id"
    read: tuple[Text, ...] = ()
    write: tuple[Text, ...] = ()
    admin: tuple[Text, ...] = ()
    jwks_uri: Url | None = None
    leeway: Leeway = 30.0
    refresh_interval: RefreshSeconds = 600.0
    unknown_key_interval: ThrottleSeconds = 30.0
    timeout: FetchSeconds = 10.0


class AuthSettings(Struct, frozen=True, kw_only=True):
    """Authentication of clients."""

    enabled: Annotated[
        bool,
        "false: every client that can connect receives the alerts",
        Option("--no-auth", "no authentication; listens on loopback unless a host is given", sets=False),
    ] = True
    key_ring: Annotated[Path, "made by `whaled keys generate`; a systemd credential keys.json takes precedence"] = (
        "/etc/whaled/keys.json"
    )
    token_ttl: Annotated[Seconds, "default lifetime of a token", RELOAD] = 86400.0
    max_token_ttl: Annotated[
        Seconds, "longest lifetime of a token, including refreshes; a token with a longer one is refused", RELOAD
    ] = 90 * 86400.0
    expiry_grace: Annotated[Seconds, "a connection is closed this long after its token has expired", RELOAD] = 25.0
    leeway: Annotated[Leeway, "tolerated clock difference for iat, nbf and exp of a token; at most 30s", RELOAD] = 30.0
    failures_per_second: Annotated[
        Rate, "average rate of refused credentials per claimant and address; see docs/tokens.md", RELOAD
    ] = 0.2
    failure_burst: Annotated[
        Count, "refused credentials at once; further ones: `rate_limited`. A valid token is always accepted", RELOAD
    ] = 20
    issuer: Annotated[Text | None, "required `iss` of tokens; null: not checked", RELOAD] = None
    audience: Annotated[Text | None, "required `aud` of tokens; null: not checked", RELOAD] = None
    issuers: Annotated[
        tuple[IssuerSettings, ...],
        "OpenID Connect or OAuth 2.0 issuers whose access tokens are accepted as well, see docs/oidc.md",
        RELOAD,
    ] = ()
    audit_retention: Annotated[Seconds, "older records of the audit log are removed", RELOAD] = 365 * 86400.0
    audit_limit: Annotated[
        Count, "records in the audit log; beyond this the oldest ones are removed (about 300 bytes each)", RELOAD
    ] = 100_000


class HttpSettings(Struct, frozen=True, kw_only=True):
    """The plain HTTP server with /metrics and /healthz."""

    enabled: Annotated[bool, "false: no HTTP server"] = True
    host: Annotated[Hosts, "address to listen on, or a list of them, as for gateway.host"] = ("127.0.0.1",)
    port: Annotated[Port, "port to listen on; 0: any free port"] = 9108
    allowed_hosts: Annotated[
        tuple[str, ...],
        'names accepted in the Host header, in addition to IP addresses and localhost, else 421; "*" for all',
        RELOAD,
    ] = ()
    max_connections: Annotated[
        Count, "connections in total; beyond this the one that is idle longest is closed, or else the new one", RELOAD
    ] = 64
    max_connections_per_address: Annotated[Count, "connections per address (IPv6: per /64), likewise", RELOAD] = 16
    header_timeout: Annotated[
        Seconds, "time until the head of a request is complete; then the connection is cut off", RELOAD
    ] = 10.0
    idle_timeout: Annotated[Seconds, "a connection idle between two requests for this long is cut off", RELOAD] = 120.0
    write_timeout: Annotated[Seconds, "a client that does not read its response for this long is cut off", RELOAD] = (
        10.0
    )
    max_request: Annotated[Bytes, "largest head of a request; a larger one: 431", RELOAD] = 16 * 1024
    requests_per_second: Annotated[
        Rate, "average request rate of all clients together; further requests wait for their turn", RELOAD
    ] = 50.0
    render_interval: Annotated[
        Seconds, "the metrics are rendered at most once in this time and shared by all requests", RELOAD
    ] = 1.0


class AdminSettings(Struct, frozen=True, kw_only=True):
    """The admin API: HTTP on a Unix socket, for `whaled status`, `clients`, `disconnect` and `reload`."""

    enabled: Annotated[bool, "false: no admin API"] = True
    socket: Annotated[
        Path | None, "path of the socket; null: /run/whaled/admin.sock under systemd, else beside the event log"
    ] = None
    users: Annotated[
        tuple[Name, ...], "names or numbers of users who may use it, in addition to root and whaled's own user"
    ] = ()
    max_connections: Annotated[
        Count, "connections in total; beyond this the one that is idle longest is closed, or else the new one"
    ] = 16
    header_timeout: Annotated[Seconds, "time until the head, and then the body, of a request is complete"] = 5.0
    idle_timeout: Annotated[Seconds, "a connection idle between two requests for this long is cut off"] = 60.0
    write_timeout: Annotated[Seconds, "a program that does not read its response for this long is cut off"] = 10.0
    max_body: Annotated[Bytes, "largest body of a request; a larger one: 413"] = 64 * 1024
    requests_per_second: Annotated[
        Rate, "average request rate of all programs together; further requests wait for their turn"
    ] = 20.0


class CanarySettings(Struct, frozen=True, kw_only=True):
    """A synthetic transaction that passes through the whole pipeline, to prove that a whale would."""

    interval: Annotated[Seconds, "time between two canaries", RELOAD] = 30.0
    deadline: Annotated[Seconds, "a canary that takes longer is late: it is counted and logged", RELOAD] = 2.0
    lost_after: Annotated[
        Seconds, "a canary that takes longer is lost: the watchdog then waits for the next one", RELOAD
    ] = 10.0


class MemorySettings(Struct, frozen=True, kw_only=True):
    """The memory limit, and when load is shed so that the kernel does not end the process."""

    limit: Annotated[
        MemorySize | None, "memory that whaled may use; null: the limit of its cgroup (systemd's MemoryMax)", RELOAD
    ] = None
    shed_at: Annotated[
        ShedShare, "share of the limit above which new clients are refused and the slowest are disconnected", RELOAD
    ] = 0.85


class LogSettings(Struct, frozen=True, kw_only=True):
    """Log output."""

    level: Annotated[
        LogLevel,
        "debug, info, warning or error",
        RELOAD,
        Option("--log-level", "debug, info, warning or error", metavar="LEVEL"),
    ] = LogLevel.INFO
    format: Annotated[
        LogFormat,
        "text, json, journald; auto: text on a terminal, journald under systemd, otherwise json",
        RELOAD,
        Option("--log-format", "auto, text, json or journald", metavar="FORMAT"),
    ] = LogFormat.AUTO


class Config(Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    backfill: BackfillSettings = field(default_factory=BackfillSettings)
    eventlog: EventLogSettings = field(default_factory=EventLogSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    log: LogSettings = field(default_factory=LogSettings)
