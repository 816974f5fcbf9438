"""The values that whaled's packages exchange. They are frozen; money is integer satoshi, time is Unix seconds.

The garbage collector does not track the types with many instances (`gc=False`): they cannot be part of a reference
cycle, and a collection that traverses the events of a replay blocks the event loop for tens of milliseconds.

Pure.
"""

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

SAT_PER_BTC = 100_000_000
# No amount exceeds all coins that will ever exist.
MAX_BTC: Final = 21_000_000
MAX_SAT: Final = MAX_BTC * SAT_PER_BTC
# The txid of the outpoint that a coinbase input names.
NULL_TXID = "0" * 64
# The maximum number of blocks that the backend projects, which is also its default (MEMPOOL.MEMPOOL_BLOCKS_AMOUNT).
PROJECTED_BLOCKS = 8


class Permission(StrEnum):
    """A permission of a token.

    It is `read` for alerts and history, `write` for state kept on the server, `admin` for keys and tokens.
    """

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


class CredentialKind(StrEnum):
    """The kind of a credential."""

    TOKEN = "token"  # noqa: S105 - no password
    API_KEY = "api_key"
    OIDC = "oidc"


class Grant(Struct, frozen=True, kw_only=True):
    """A client's identity and permissions, as its credential proves them.

    `authenticated_at` is the time of issue of the first token in a chain of refreshed tokens, `family` the identifier
    that the chain shares. `key_mark` distinguishes the signing key from another key with the same id.
    `issuer` is the `iss` of an access token of another issuer.
    `networks` are the CIDR blocks that the client may connect from, empty for any. `fixed_filter` is a filter as JSON
    that applies in addition to the client's own; `rate` replaces the configured number of messages a second.
    """

    client_id: str
    permissions: frozenset[Permission]
    issued_at: float | None = None
    authenticated_at: float | None = None
    expires_at: float | None = None
    token_id: str | None = None
    family: str | None = None
    key_id: str | None = None
    key_mark: str | None = None
    kind: CredentialKind = CredentialKind.TOKEN
    issuer: str | None = None
    networks: tuple[str, ...] = ()
    fixed_filter: str | None = None
    rate: float | None = None


class Position(Struct, frozen=True, gc=False):
    """A position in the event log: `offset` counts 1, 2, 3 ... within one `epoch`."""

    epoch: str
    offset: Annotated[int, Meta(ge=0)]


# --- what the mempool backend reports -------------------------------------------------------------------------------


class Output(Struct, frozen=True, gc=False):
    """A transaction output. `script` is the scriptPubKey in hex; `address` is None if the script has no address."""

    value: int
    script: str
    address: str | None = None


class Input(Struct, frozen=True, gc=False):
    """A transaction input: the outpoint it spends, its nSequence, and the spent output if the backend sent it."""

    txid: str
    vout: int
    sequence: int
    prevout: Output | None = None


def outpoint(txid: str, vout: int) -> str:
    """Return the textual form `txid:vout` of a transaction output."""
    return f"{txid}:{vout}"


class Transaction(Struct, frozen=True, kw_only=True):
    """A transaction as the mempool backend sends it in full.

    `fee_sat` is None if the backend does not know the fee (it sends a confirmed transaction with fee 0). `fee_rate` is
    the effective rate in sat/vB, ancestors included, at the time of sending. `first_seen` is by the backend's clock.
    """

    txid: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    fee_sat: int | None
    vsize: float
    fee_rate: float | None = None
    first_seen: int | None = None
    is_confirmed: bool = False

    @property
    def value_sat(self) -> int:
        """The sum of all outputs, in satoshi."""
        return sum(output.value for output in self.outputs)

    @property
    def gross_sat(self) -> int:
        """The sum of all outputs, plus the fee if it is known, in satoshi."""
        return self.value_sat + (self.fee_sat or 0)

    @property
    def outpoints(self) -> tuple[str, ...]:
        """The outpoints that the transaction spends."""
        return tuple(outpoint(spent.txid, spent.vout) for spent in self.inputs)


class FeeMarket(Struct, frozen=True):
    """The backend's recommended fee rates in sat/vB, fractional; None for a rate that could not be read."""

    fastest: float | None
    half_hour: float | None
    hour: float | None
    economy: float | None
    minimum: float | None


class ProjectedBlock(Struct, frozen=True):
    """A block that the backend projects: its total size in vB and its lowest and highest fee rate in sat/vB.

    `min_rate` is None if the backend gives no usable rates: it sends only zeros for a block that a single transaction
    fills.
    """

    vsize: float
    min_rate: float | None
    max_rate: float


class Price(Struct, frozen=True):
    """US dollars per bitcoin.

    `at` is the time at which the price applied, never later than its receipt. `stated_at` is that time by the backend's
    clock, None if the backend gave none.
    """

    usd: float
    at: float
    stated_at: float | None = None


class Market(Struct, frozen=True, kw_only=True):
    """The known fees, chain tip and price; None means unknown.

    `moment` is the block's time if the transaction is evaluated as part of a block: the price must be of that time.
    """

    fees: FeeMarket | None = None
    projected: tuple[ProjectedBlock, ...] | None = None
    tip_height: int | None = None
    price: Price | None = None
    moment: float | None = None


class Block(Struct, frozen=True, kw_only=True):
    """A block's position in the chain."""

    height: int
    hash: str
    previous_hash: str | None
    timestamp: int


class UpstreamState(StrEnum):
    """The state of the link to the mempool backend, as whaled reports it to clients."""

    CONNECTED = "connected"
    DEGRADED = "degraded"
    DISCONNECTED = "disconnected"


class Ending(StrEnum):
    """The end of a run of the daemon (a metric label): `clean` if it was stopped, `unclean` in any other case."""

    CLEAN = "clean"
    UNCLEAN = "unclean"


class Scan(Struct, frozen=True, kw_only=True):
    """The result of one block scan: how many of the block's whales were alerted before the block, and how many not.

    `seen` whales were alerted before the block, by a median of `lead_s` seconds. `late` ones were alerted after it,
    the `missed_*` ones only because of the scan.
    """

    height: int
    hash: str
    mined_at: float
    scanned_at: float
    seen: int
    late: int
    missed_down: int
    missed_gap: int
    missed_never_relayed: int
    lead_s: float | None = None


# --- what whaled reports about a whale -------------------------------------------------------------------------------


class Shape(StrEnum):
    """The shape of a transaction."""

    TRANSFER = "transfer"
    SELF_TRANSFER = "self_transfer"
    CONSOLIDATION = "consolidation"
    BATCH = "batch"
    COINJOIN = "coinjoin"


class Flow(StrEnum):
    """The direction of the money, by the operator's address book."""

    INFLOW = "inflow"
    OUTFLOW = "outflow"
    INTERNAL = "internal"
    UNKNOWN = "unknown"


class OwnerType(StrEnum):
    """The kind of owner of an address in the address book."""

    EXCHANGE = "exchange"  # a trading venue: deposit, hot and cold wallets
    CUSTODIAN = "custodian"  # holds coins for others: custodians of funds, prime brokers
    SERVICE = "service"  # payment processors, bridges, lenders, gambling
    MINER = "miner"  # miners and mining pools
    FUND = "fund"  # funds and companies that hold their own coins
    GOVERNMENT = "government"
    OWN = "own"  # the operator's wallets
    OTHER = "other"


class Status(StrEnum):
    """The status of a whale: pending, or one of its outcomes."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    DROPPED = "dropped"


class Source(StrEnum):
    """The source from which whaled detected a whale."""

    LIVE = "live"
    SNAPSHOT = "snapshot"
    BLOCK = "block"


class Alert(Struct, frozen=True, gc=False, kw_only=True):
    """The `data` of a whale_alert frame, with the fields that docs/protocol.md lists."""

    transaction_id: str
    btc_value: float
    value_sat: int
    moved_sat: int | None
    fee_sat: int | None
    usd_value: float | None
    btc_usd: float | None
    fee_rate: float | None
    vsize: float
    urgency_score: float | None
    flow_type: Flow
    exchange_addresses: tuple[str, ...]
    confidence_score: float | None
    from_labels: tuple[str, ...]
    to_labels: tuple[str, ...]
    shape: Shape
    reasons: tuple[str, ...]
    input_count: int
    output_count: int
    rbf_enabled: bool
    predicted_confirmation_block: int | None
    detection_timestamp: str
    status: Status
    source: Source
    replaces: str | None = None
    # Rows stored by older versions lack the fields from here on.
    price_timestamp: str | None = None
    matched_rules: tuple[str, ...] = ()
    # The amount that flows in the direction `flow_type`; None if that is unknown.
    flow_sat: int | None = None
    # The second and further labels of each address: `from_labels` and `to_labels` have only the first.
    from_other_labels: tuple[str, ...] = ()
    to_other_labels: tuple[str, ...] = ()


class Update(Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The `data` of a whale_update frame: the outcome of an alerted whale. Absent fields do not apply."""

    transaction_id: str
    status: Status
    btc_value: float
    block_height: int | None = None
    block_hash: str | None = None
    replaced_by: str | None = None
    seconds_to_confirmation: float | None = None
    predicted_confirmation_block: int | None = None
    blocks_off: int | None = None


class Kind(StrEnum):
    """The kind of an event in the log.

    (txid, kind, ref, repeat) is unique; `ref` is the block hash or the replacing txid.
    """

    ALERT = "alert"
    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    DROPPED = "dropped"
    PENDING = "pending"


class Whale(Struct, frozen=True, gc=False):
    """An alert with the addresses and outpoints of its transaction.

    Filters match against `addresses`, which has every address of the transaction; frames do not carry them, because
    there may be thousands. `outpoints` has what the transaction spends, in the form that `outpoint` returns: another
    transaction that spends one of them replaces this one. The event log stores the outpoints separately and does not
    return them with the whale.
    """

    alert: Alert
    addresses: tuple[str, ...] = ()
    outpoints: tuple[str, ...] = ()


class Draft(Struct, frozen=True, gc=False, kw_only=True):
    """An event that is not in the log yet. `whale` is its subject; `update` is None for the alert itself.

    `repeat` is 1, or counts the events about the whale with the same kind and ref: it was confirmed twice in one block.
    """

    kind: Kind
    at: float
    whale: Whale
    ref: str = ""
    update: Update | None = None
    repeat: int = 1


class Event(Struct, frozen=True, gc=False, kw_only=True):
    """An event in the log: a Draft and its offset."""

    offset: int
    kind: Kind
    at: float
    whale: Whale
    ref: str = ""
    update: Update | None = None
    repeat: int = 1
