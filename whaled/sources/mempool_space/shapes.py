"""The wire shapes of a frame's parts, with the fields that whaled reads. Pure.

Shapes that hold only strings, numbers and lists of each other have `gc=False`: they cannot be part of a cycle.
"""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from whaled.sources.mempool_space.fields import Number, Rate, Satoshi, Seconds, Signed, Txid, gross_sat, is_replacement
from whaled.sources.mempool_space.transactions import Glance

# The only currency that whaled uses; the backend sends up to 34.
CURRENCY = "USD"
# JavaScript's numbers are exact integers up to 2**53.
Integer = Annotated[int, Meta(ge=0, le=2**53)]


class BackendInfo(Struct, frozen=True):
    """The identity of a backend. `backend` is its mode: none, electrum or esplora."""

    hostname: str = ""
    version: str = ""
    backend: str = ""


class ReplacedShape(Struct, gc=False):
    """A replaced transaction with the one that replaced it."""

    replaced: Txid
    by: Glance


class DeltaShape(Struct):
    """A change of the mempool."""

    sequence: Integer
    added: list[Glance] = []
    removed: list[Txid] = []
    mined: list[Txid] = []
    replaced: list[ReplacedShape] = []


class Stripped(Struct, array_like=True, gc=False):
    """A transaction of a snapshot: `[txid, fee, vsize, value, rate, flags, firstSeen(, 1 if accelerated)]`."""

    txid: Txid
    fee: Signed | None
    vsize: Signed | None
    value: Satoshi
    rate: Signed | None = None
    flags: Integer | None = None
    first_seen: Seconds | None = None

    @property
    def gross_sat(self) -> int:
        """The sum of all outputs, plus the fee if it is known, in satoshi."""
        return gross_sat(self.value, self.fee)

    @property
    def is_replacement(self) -> bool | None:
        """True if the backend has seen it replace another transaction, None if the backend does not state it."""
        return is_replacement(self.flags)


class SnapshotShape(Struct):
    """The transactions of a projected block, or their changes."""

    index: Number
    sequence: Integer
    # Absent in the deltas that follow the first response.
    transactions: list[Stripped] | None = field(name="blockTransactions", default=None)


class BlockShape(Struct, gc=False):
    """A block's position in the chain."""

    id: Txid
    height: Number
    timestamp: Number
    previous: str | None = field(name="previousblockhash", default=None)


class FeesShape(Struct, gc=False, rename="camel"):
    """The recommended fee rates, in sat/vB."""

    fastest_fee: Rate | None
    half_hour_fee: Rate | None
    hour_fee: Rate | None
    economy_fee: Rate | None
    minimum_fee: Rate | None


class ProjectedShape(Struct, gc=False):
    """A projected block: its size in vB and its fee rates in sat/vB."""

    vsize: Rate = field(name="blockVSize")
    rates: list[Rate] = field(name="feeRange")


class ConversionsShape(Struct, gc=False):
    """The price and the time at which the backend fetched it; time 0 means never. Other currencies are not read."""

    usd: float = field(name=CURRENCY, default=-1.0)
    time: Seconds | UnsetType = UNSET


_NOT_READ = Raw()


class Parts(Struct, kw_only=True, forbid_unknown_fields=True):
    """Every key that a backend is known to send. Keys that whaled does not read are skipped without being parsed."""

    delta: DeltaShape | UnsetType = field(name="mempool-transactions", default=UNSET)
    snapshot: SnapshotShape | UnsetType = field(name="projected-block-transactions", default=UNSET)
    block: BlockShape | UnsetType = UNSET
    blocks: list[BlockShape] | UnsetType = UNSET
    fees: FeesShape | UnsetType = UNSET
    projected: list[ProjectedShape] | UnsetType = field(name="mempool-blocks", default=UNSET)
    conversions: ConversionsShape | UnsetType = UNSET
    # In addition to "mempool" there can be entries left over from REST calls, "blocktxs-<hash>".
    loading: dict[str, Any] | UnsetType = field(name="loadingIndicators", default=UNSET)
    difficulty: dict[str, Raw] | UnsetType = field(name="da", default=UNSET)
    backend_info: BackendInfo | UnsetType = field(name="backendInfo", default=UNSET)

    backend: Raw = _NOT_READ
    mempool_info: Raw = field(name="mempoolInfo", default=_NOT_READ)
    transactions: Raw = _NOT_READ
    growth: Raw = field(name="vBytesPerSecond", default=_NOT_READ)
    rbf_summary: Raw = field(name="rbfSummary", default=_NOT_READ)
    rbf_latest: Raw = field(name="rbfLatest", default=_NOT_READ)
    rbf_latest_summary: Raw = field(name="rbfLatestSummary", default=_NOT_READ)
    rbf_info: Raw = field(name="rbfInfo", default=_NOT_READ)
    rbf_transaction: Raw = field(name="rbfTransaction", default=_NOT_READ)
    txids: Raw = field(name="mempool-txids", default=_NOT_READ)
    position: Raw = field(name="txPosition", default=_NOT_READ)
    confirmed: Raw = field(name="txConfirmed", default=_NOT_READ)
    spent: Raw = field(name="utxoSpent", default=_NOT_READ)
    chart: Raw = field(name="live-2h-chart", default=_NOT_READ)
    # Sent by backends with STRATUM enabled.
    stratum_jobs: Raw = field(name="stratumJobs", default=_NOT_READ)
    stratum_job: Raw = field(name="stratumJob", default=_NOT_READ)
    tomahawk: Raw = _NOT_READ
    pong: Raw = _NOT_READ
