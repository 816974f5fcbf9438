"""The values that travel between the rooms of whaled. Frozen; money is integer satoshi, time is Unix seconds.

What there are many of is hidden from the garbage collector (`gc=False`): nothing in it can be part of a cycle, and a
collection that looks at what a replay reads stops the loop for tens of milliseconds.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

SAT_PER_BTC = 100_000_000


class Permission(StrEnum):
    """What a token allows: `read` alerts and history, `write` state kept on the server, `admin` keys and tokens."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


class Grant(Struct, frozen=True, kw_only=True):
    """Who a client is and what it may do, as proven by its credential.

    `authenticated_at` is when the first token of a chain of refreshed ones was issued, `family` the name they share.
    `key_mark` tells the key from another one of the same id.
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


class Position(Struct, frozen=True, gc=False):
    """A place in the event log: `offset` counts 1, 2, 3 ... within one `epoch`."""

    epoch: str
    offset: Annotated[int, Meta(ge=0)]


# --- what the mempool backend tells ---------------------------------------------------------------------------------


class Output(Struct, frozen=True, gc=False):
    """A transaction output. `script` is the scriptPubKey in hex; `address` is None where there is none."""

    value: int
    script: str
    address: str | None = None


class Input(Struct, frozen=True, gc=False):
    """A transaction input: the outpoint it spends, its nSequence, and the spent output where the backend gave it."""

    txid: str
    vout: int
    sequence: int
    prevout: Output | None = None


def outpoint(txid: str, vout: int) -> str:
    """An output of a transaction as text."""
    return f"{txid}:{vout}"


class Transaction(Struct, frozen=True, kw_only=True):
    """A transaction as the mempool backend sends it in full.

    `fee_sat` is None where the backend does not know it (a confirmed transaction is sent with fee 0). `fee_rate` is
    the effective rate in sat/vB, ancestors included, as of the sending. `first_seen` is the backend's clock.
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
        """Sum of all outputs, in satoshi."""
        return sum(output.value for output in self.outputs)

    @property
    def gross_sat(self) -> int:
        """Sum of all outputs and the fee, as far as it is known, in satoshi."""
        return self.value_sat + (self.fee_sat or 0)

    @property
    def outpoints(self) -> tuple[str, ...]:
        """What it spends."""
        return tuple(outpoint(spent.txid, spent.vout) for spent in self.inputs)


class FeeMarket(Struct, frozen=True):
    """Recommended fee rates in sat/vB, fractional, as the backend gives them; None is one that cannot be read."""

    fastest: float | None
    half_hour: float | None
    hour: float | None
    economy: float | None
    minimum: float | None


class ProjectedBlock(Struct, frozen=True):
    """A block the backend expects: total size in vB and its lowest and highest fee rate in sat/vB.

    `min_rate` is None where the backend gives no rates: all of them are 0 for a block that one transaction fills.
    """

    vsize: float
    min_rate: float | None
    max_rate: float


class Price(Struct, frozen=True):
    """US dollars per bitcoin. `at` is the time the price is of, never later than its receipt; `stated_at` is that time
    by the backend's clock, None where the backend gave none.
    """

    usd: float
    at: float
    stated_at: float | None = None


class Market(Struct, frozen=True, kw_only=True):
    """What is known about fees, the chain tip and the price; None is unknown.

    `moment` is the time of the block for a transaction that is judged by its block: the price must be of that time.
    """

    fees: FeeMarket | None = None
    projected: tuple[ProjectedBlock, ...] | None = None
    tip_height: int | None = None
    price: Price | None = None
    moment: float | None = None


class Block(Struct, frozen=True, kw_only=True):
    """A block's place in the chain."""

    height: int
    hash: str
    previous_hash: str | None
    timestamp: int


class UpstreamState(StrEnum):
    """The link to the mempool backend, as clients are told."""

    CONNECTED = "connected"
    DEGRADED = "degraded"
    DISCONNECTED = "disconnected"


class Ending(StrEnum):
    """How a run of the daemon ended (a metric label): it was stopped, or anything else."""

    CLEAN = "clean"
    UNCLEAN = "unclean"


class Scan(Struct, frozen=True, kw_only=True):
    """A block that was looked through: how its whales were known before it. `lead_s` is the median time by which those
    `seen` were ahead of the block; the others were alerted after it (`late`), or only because of it.
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


# --- what whaled says about a whale ----------------------------------------------------------------------------------


class Shape(StrEnum):
    """What a transaction looks like."""

    TRANSFER = "transfer"
    SELF_TRANSFER = "self_transfer"
    CONSOLIDATION = "consolidation"
    BATCH = "batch"
    COINJOIN = "coinjoin"


class Flow(StrEnum):
    """Where the money goes, seen from the operator's address book."""

    INFLOW = "inflow"
    OUTFLOW = "outflow"
    INTERNAL = "internal"
    UNKNOWN = "unknown"


class OwnerType(StrEnum):
    """Who an address of the address book belongs to."""

    EXCHANGE = "exchange"  # trading venue: deposit, hot and cold wallets
    CUSTODIAN = "custodian"  # holds coins for others: funds' custodians, prime brokers
    SERVICE = "service"  # payment processors, bridges, lenders, gambling
    MINER = "miner"  # pools and miners
    FUND = "fund"  # funds and companies that hold coins themselves
    GOVERNMENT = "government"
    OWN = "own"  # the operator's wallets
    OTHER = "other"


class Status(StrEnum):
    """Where a whale is in its life."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    DROPPED = "dropped"


class Source(StrEnum):
    """How whaled came to know a whale."""

    LIVE = "live"
    SNAPSHOT = "snapshot"
    BLOCK = "block"


class Alert(Struct, frozen=True, gc=False, kw_only=True):
    """`data` of a whale_alert frame, field by field as docs/protocol.md lists them."""

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
    # Rows that older versions stored do not have these.
    price_timestamp: str | None = None
    matched_rules: tuple[str, ...] = ()
    # How much flows as `flow_type` says; None where that is unknown. Alerts of older versions have none.
    flow_sat: int | None = None
    # Further labels of addresses that have several: `from_labels` and `to_labels` have the first of each address.
    from_other_labels: tuple[str, ...] = ()
    to_other_labels: tuple[str, ...] = ()


class Update(Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """`data` of a whale_update frame: what became of a whale that was alerted. Absent fields do not apply."""

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
    """What an event in the log says. (txid, kind, ref) is unique: ref is the block hash or the replacing txid."""

    ALERT = "alert"
    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    DROPPED = "dropped"
    PENDING = "pending"


class Whale(Struct, frozen=True, gc=False):
    """An alert, and every address in its transaction: filters look at these, frames do not carry them (there may be
    thousands).

    `outpoints` is what the transaction spends, as `outpoint` writes it: another transaction that spends one of them
    replaces this one. The event log keeps them beside the whale, and does not give them back with it.
    """

    alert: Alert
    addresses: tuple[str, ...] = ()
    outpoints: tuple[str, ...] = ()


class Draft(Struct, frozen=True, gc=False, kw_only=True):
    """An event that is not in the log yet. `whale` is what it is about; `update` is None for the alert itself."""

    kind: Kind
    at: float
    whale: Whale
    ref: str = ""
    update: Update | None = None


class Event(Struct, frozen=True, gc=False, kw_only=True):
    """An event in the log: a Draft with its offset."""

    offset: int
    kind: Kind
    at: float
    whale: Whale
    ref: str = ""
    update: Update | None = None
