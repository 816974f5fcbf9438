"""The mempool backend's WebSocket dialect: the frames to send, and received frames as typed values. Pure.

The backend merges everything due for a client into one JSON object, so a frame is a set of parts that are
distinguished by their keys, never by a message type. docs/upstream.md has the measurements; paths of the backend's
source below are relative to its `backend/src/`.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from whaled.errors import UpstreamError
from whaled.model import Block, FeeMarket, ProjectedBlock, Transaction
from whaled.source import Replacement
from whaled.sources.mempool_space.surrogates import repaired
from whaled.sources.mempool_space.transactions import (
    UNREADABLE,
    Glance,
    Number,
    Rate,
    Satoshi,
    Seconds,
    Signed,
    Txid,
    amount,
    at_least,
    glance,
    gross_sat,
    is_replacement,
    read,
    spending,
)

PING = '{"action":"ping"}'
# The only currency that whaled uses; the backend sends up to 34.
CURRENCY = "USD"
# A higher value is not a price, and computing with it would overflow.
MAX_USD = 1e12
# Maximum length quoted from an unreadable frame in a log line.
SAMPLE_LIMIT = 200


def subscribe_frames() -> tuple[str, ...]:
    """Return the frames to send after connecting, in order.

    Deltas follow without a further request; a snapshot must be requested (`track_block_frame`).
    """
    return (
        '{"action":"init"}',
        '{"action":"want","data":["blocks","stats","mempool-blocks"]}',
        '{"track-mempool":true}',
    )


def track_block_frame(index: int) -> str:
    """Return the frame that requests the transactions of the projected block `index` (0..7); -1 ends the tracking.

    The response arrives as `Frame.snapshot`.
    """
    return f'{{"track-mempool-block":{index}}}'


class DialectFault(StrEnum):
    """The reason a frame could not be read (a metric label)."""

    MALFORMED = "malformed"
    NOT_AN_OBJECT = "not_an_object"
    BAD_SHAPE = "bad_shape"


class DialectError(UpstreamError):
    """A frame without any usable part. `sample` is its beginning, at most 200 characters."""

    def __init__(self, reason: DialectFault, detail: str, sample: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.sample = sample


# --- the content of a frame ------------------------------------------------------------------------------------------


class Delta(Struct, frozen=True, kw_only=True):
    """A `mempool-transactions` part: a change of the mempool.

    `removed` does not mean dropped, and `mined` has every transaction of the block, coinbase included. `malformed`
    counts the transactions and ids that could not be read and are missing here. `added` and `replacers` hold the fields
    decoded of every transaction, `frame` the raw frame from which the other fields are decoded on demand.
    """

    sequence: int
    removed: tuple[str, ...] = ()
    mined: tuple[str, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    malformed: int = 0
    added: Sequence[Glance] = ()
    replacers: Sequence[Glance] = ()
    frame: bytes | str = b""

    @property
    def size_bytes(self) -> int:
        """The size of the raw frame."""
        return len(self.frame)

    def at_least(self, minimum_sat: int) -> list[Transaction]:
        """Return, in full, the transactions whose outputs and fee add up to at least `minimum_sat`, each once.

        They come from `added` and from `replaced[].by`: the frame reports the winner of a double spend in a block only
        in the latter. A field that cannot be read, other than the values of the outputs, is unknown in the result; the
        transaction is not lost.
        """
        return at_least(self.frame, minimum_sat, self.added, self.replacers)

    def spending(self, outpoints: Container[str]) -> dict[str, str]:
        """Return the transactions that entered the mempool and spend one of these outpoints: txid by outpoint."""
        return spending(self.frame, outpoints)


class Snapshot(Struct, frozen=True, kw_only=True):
    """The transactions of one projected block, with the sequence number of the last delta that they reflect.

    `malformed` counts the transactions that could not be read and are missing here.
    """

    index: int
    sequence: int
    transactions: Sequence["Stripped"] = ()
    malformed: int = 0

    def at_least(self, minimum_sat: int) -> list["Stripped"]:
        """Return the transactions whose outputs and fee add up to at least `minimum_sat`."""
        return [each for each in self.transactions if each.gross_sat >= minimum_sat]


class BackendInfo(Struct, frozen=True):
    """The identity of a backend. `backend` is its mode: none, electrum or esplora."""

    hostname: str = ""
    version: str = ""
    backend: str = ""


class Frame(Struct, frozen=True, kw_only=True):
    """The content of one message; a part that the message lacks is None.

    `price_known` is whether the message has a price part; if so, `btc_usd` None means that the backend does not know
    the price. `price_at` is the time of that price by the backend's clock, None if it gives none. `loading` is whether
    the backend reports that it is not in sync (it is starting, or bitcoind is gone). `skipped` has the keys of the
    parts that could not be read, `unknown` the keys that this dialect does not have.
    """

    delta: Delta | None = None
    snapshot: Snapshot | None = None
    block: Block | None = None
    blocks: tuple[Block, ...] | None = None
    fees: FeeMarket | None = None
    projected: tuple[ProjectedBlock, ...] | None = None
    price_known: bool = False
    btc_usd: float | None = None
    price_at: float | None = None
    loading: bool | None = None
    has_difficulty: bool = False
    is_init: bool = False
    backend: BackendInfo | None = None
    pong: bool = False
    skipped: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether this is an init object that reports the backend as in sync, so that its data is reliable."""
        return self.is_init and self.has_difficulty and self.loading is not True


# --- the wire shapes, with the needed fields only --------------------------------------------------------------------
# gc=False: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

# JavaScript's numbers are exact integers up to 2**53.
_Sequence = Annotated[int, Meta(ge=0, le=2**53)]


class _Replaced(Struct, gc=False):
    replaced: Txid
    by: Glance


class _Pair(Struct):
    replaced: Txid
    by: Raw


class _Delta(Struct):
    sequence: _Sequence
    added: list[Glance] = []
    removed: list[Txid] = []
    mined: list[Txid] = []
    replaced: list[_Replaced] = []


class _DeltaParts(Struct):
    sequence: Raw = Raw(b"0")
    added: Raw = Raw(b"[]")
    removed: Raw = Raw(b"[]")
    mined: Raw = Raw(b"[]")
    replaced: Raw = Raw(b"[]")


class Stripped(Struct, array_like=True, gc=False):
    """A transaction of a snapshot: `[txid, fee, vsize, value, rate, flags, firstSeen(, 1 if accelerated)]`."""

    txid: Txid
    fee: Signed | None
    vsize: Signed | None
    value: Satoshi
    rate: Signed | None = None
    flags: _Sequence | None = None
    first_seen: Seconds | None = None

    @property
    def gross_sat(self) -> int:
        """The sum of all outputs, plus the fee if it is known, in satoshi."""
        return gross_sat(self.value, self.fee)

    @property
    def is_replacement(self) -> bool | None:
        """Whether the backend has seen it replace another transaction, None if the backend does not state it."""
        return is_replacement(self.flags)


class _Snapshot(Struct):
    index: Number
    sequence: _Sequence
    # Absent in the deltas that follow the first response.
    transactions: list[Stripped] | None = field(name="blockTransactions", default=None)


class _SnapshotParts(Struct):
    index: Number
    sequence: _Sequence
    transactions: Raw = field(name="blockTransactions")


class _Block(Struct, gc=False):
    id: Txid
    height: Number
    timestamp: Number
    previous: str | None = field(name="previousblockhash", default=None)


class _Fees(Struct, gc=False, rename="camel"):
    fastest_fee: Rate | None
    half_hour_fee: Rate | None
    hour_fee: Rate | None
    economy_fee: Rate | None
    minimum_fee: Rate | None


class _FeesParts(Struct, rename="camel"):
    fastest_fee: Raw = Raw(b"null")
    half_hour_fee: Raw = Raw(b"null")
    hour_fee: Raw = Raw(b"null")
    economy_fee: Raw = Raw(b"null")
    minimum_fee: Raw = Raw(b"null")


class _ProjectedBlock(Struct, gc=False):
    vsize: Rate = field(name="blockVSize")
    rates: list[Rate] = field(name="feeRange")


class _ProjectedParts(Struct):
    vsize: Rate = field(name="blockVSize")
    rates: Raw = field(name="feeRange", default=Raw(b"[]"))


class _Conversions(Struct, gc=False):
    """The price and the time at which the backend fetched it; time 0 means never. Other currencies are not read."""

    usd: float = field(name=CURRENCY, default=-1.0)
    time: Seconds | UnsetType = UNSET


_NOT_READ = Raw()


class _Parts(Struct, kw_only=True, forbid_unknown_fields=True):
    """Every key that a backend is known to send. Keys that whaled does not read are skipped without being parsed."""

    delta: _Delta | UnsetType = field(name="mempool-transactions", default=UNSET)
    snapshot: _Snapshot | UnsetType = field(name="projected-block-transactions", default=UNSET)
    block: _Block | UnsetType = UNSET
    blocks: list[_Block] | UnsetType = UNSET
    fees: _Fees | UnsetType = UNSET
    projected: list[_ProjectedBlock] | UnsetType = field(name="mempool-blocks", default=UNSET)
    conversions: _Conversions | UnsetType = UNSET
    # In addition to "mempool" there can be entries left over from REST calls, "blocktxs-<hash>".
    loading: dict[str, Any] | UnsetType = field(name="loadingIndicators", default=UNSET)
    difficulty: dict[str, Raw] | UnsetType = field(name="da", default=UNSET)
    backend_info: BackendInfo | UnsetType = field(name="backendInfo", default=UNSET)
    pong: bool | UnsetType = UNSET

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


_decode_frame = msgspec.json.Decoder(_Parts).decode
_decode_keys = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_delta_parts = msgspec.json.Decoder(_DeltaParts).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_sequence = msgspec.json.Decoder(_Sequence).decode
_decode_txid = msgspec.json.Decoder(Txid).decode
_decode_snapshot_parts = msgspec.json.Decoder(_SnapshotParts).decode
_decode_stripped = msgspec.json.Decoder(Stripped).decode
_decode_pair = msgspec.json.Decoder(_Pair).decode
_decode_block = msgspec.json.Decoder(_Block).decode
_decode_projected_parts = msgspec.json.Decoder(_ProjectedParts).decode
_decode_fees_parts = msgspec.json.Decoder(_FeesParts).decode
_decode_rate = msgspec.json.Decoder(Rate).decode
_decode_signed = msgspec.json.Decoder(Signed).decode
_STRIPPED_LEAST = 4
_STRIPPED_REST = (_decode_signed, _decode_sequence, msgspec.json.Decoder(Seconds).decode)
_TYPES = get_type_hints(_Parts, include_extras=True)
_PARTS = {
    key: (name, msgspec.json.Decoder(_TYPES[name]).decode)
    for key, name in zip(_Parts.__struct_encode_fields__, _Parts.__struct_fields__, strict=True)
}


def decode(raw: bytes | str) -> Frame:
    """Decode a frame of the backend.

    The frame is decoded in one pass. If that fails, each part is decoded separately, and the transactions of a delta
    one by one, so that a malformed item costs only itself. Raises DialectError if no part is usable.
    """
    try:
        return _frame(raw, _decode_frame(raw))
    except UNREADABLE:
        return _decode_apart(raw)


def _decode_apart(raw: bytes | str) -> Frame:
    raw = repaired(raw.encode() if isinstance(raw, str) else raw)
    try:
        keys = _decode_keys(raw)
    except msgspec.ValidationError as error:
        raise DialectError(DialectFault.NOT_AN_OBJECT, str(error), _sample(raw)) from error
    except UNREADABLE as error:
        raise DialectError(DialectFault.MALFORMED, str(error), _sample(raw)) from error
    parts: dict[str, Any] = {}
    skipped: list[str] = []
    unknown: list[str] = []
    malformed: dict[str, int] = {}
    problem: Exception | None = None
    for key, value in keys.items():
        if key not in _PARTS:
            unknown.append(key)
            continue
        name, decoder = _PARTS[key]
        try:
            parts[name] = decoder(value)
        except UNREADABLE as error:
            problem = error
            rescue = _RESCUES.get(name)
            rescued = rescue(value) if rescue is not None else None
            if rescued is not None:
                parts[name], malformed[name] = rescued
            if rescued is None or malformed[name]:
                skipped.append(key)
    if problem is not None and not parts:
        raise DialectError(DialectFault.BAD_SHAPE, f"{skipped[-1]}: {problem}", _sample(raw)) from problem
    return _frame(raw, _Parts(**parts), tuple(skipped), tuple(unknown), malformed)


def _decode_snapshot_apart(raw: Raw) -> tuple[_Snapshot, int] | None:
    """Return a snapshot without its unreadable transactions, and their number. None if it is not a snapshot."""
    try:
        parts = _decode_snapshot_parts(raw)
    except UNREADABLE:
        return None
    good, bad = _each(parts.transactions, _stripped)
    return _Snapshot(parts.index, parts.sequence, good), bad


def _decode_delta_apart(raw: Raw) -> tuple[_Delta, int] | None:
    """Return a delta without its unreadable items, and their number. None if it is not an object.

    An unreadable sequence number becomes 0, which makes no claim: it means "not in sync".
    """
    try:
        parts = _decode_delta_parts(raw)
    except UNREADABLE:
        return None
    malformed = 0
    try:
        sequence = _decode_sequence(parts.sequence)
    except UNREADABLE:
        sequence = 0
        malformed += 1
    lists = []
    for value, decoder in (
        (parts.added, glance),
        (parts.removed, _decode_txid),
        (parts.mined, _decode_txid),
        (parts.replaced, _replaced),
    ):
        good, bad = _each(value, decoder)
        lists.append(good)
        malformed += bad
    return _Delta(sequence, *lists), malformed


def _decode_fees_apart(raw: Raw) -> tuple[_Fees, int] | None:
    """Return the recommended rates without the unreadable ones, and their number. None if no rate is readable."""
    try:
        parts = msgspec.structs.astuple(_decode_fees_parts(raw))
    except UNREADABLE:
        return None
    rates = [read(part, _decode_rate, None) for part in parts]
    return (_Fees(*rates), rates.count(None)) if any(rate is not None for rate in rates) else None


def _decode_blocks_apart(raw: Raw) -> tuple[list[_Block], int] | None:
    """Return the blocks without the unreadable ones, and their number. None if no block is readable."""
    good, bad = _each(raw, _decode_block)
    return (good, bad) if good else None


def _decode_projected_apart(raw: Raw) -> tuple[list[_ProjectedBlock], int] | None:
    """Return the projected blocks without the unreadable rates, and the number of these rates.

    None if the size of a block cannot be read: leaving the block out would make the later ones look earlier.
    """
    try:
        parts = [_decode_projected_parts(each) for each in _decode_items(raw)]
    except UNREADABLE:
        return None
    blocks, malformed = [], 0
    for part in parts:
        rates, bad = _each(part.rates, _decode_rate)
        blocks.append(_ProjectedBlock(part.vsize, rates))
        malformed += bad
    return blocks, malformed


_RESCUES: dict[str, Callable[[Raw], tuple[Any, int] | None]] = {
    "delta": _decode_delta_apart,
    "snapshot": _decode_snapshot_apart,
    "fees": _decode_fees_apart,
    "blocks": _decode_blocks_apart,
    "projected": _decode_projected_apart,
}


def _stripped(raw: Raw) -> Stripped:
    """Decode a transaction of a snapshot. Its id and value are required; other unreadable fields are unknown.

    Raises one of UNREADABLE.
    """
    try:
        return _decode_stripped(raw)
    except UNREADABLE:
        items = _decode_items(raw)
    if len(items) < _STRIPPED_LEAST:
        raise msgspec.ValidationError("too short")
    rest = [read(item, decoder, None) for item, decoder in zip(items[4:], _STRIPPED_REST, strict=False)]
    fee, vsize = (read(item, _decode_signed, None) for item in items[1:3])
    return Stripped(_decode_txid(items[0]), fee, vsize, amount(items[3]), *rest)


def _replaced(raw: Raw) -> _Replaced:
    pair = _decode_pair(raw)
    return _Replaced(pair.replaced, glance(pair.by))


def _each(raw: Raw, decoder: Any) -> tuple[list[Any], int]:
    try:
        items = _decode_items(raw)
    except UNREADABLE:
        return [], 1
    good = []
    for item in items:
        try:
            good.append(decoder(item))
        except UNREADABLE:
            continue
    return good, len(items) - len(good)


def _sample(raw: bytes | str) -> str:
    head = raw[:SAMPLE_LIMIT]
    return head if isinstance(head, str) else bytes(head).decode("utf-8", "replace")


# --- from wire shapes to values --------------------------------------------------------------------------------------


_NO_COUNTS: Mapping[str, int] = {}


def _frame(
    raw: bytes | str,
    parts: _Parts,
    skipped: tuple[str, ...] = (),
    unknown: tuple[str, ...] = (),
    malformed: Mapping[str, int] = _NO_COUNTS,
) -> Frame:
    snapshot = parts.snapshot
    usd, price_at = _price(parts.conversions) if parts.conversions is not UNSET else (None, None)
    return Frame(
        delta=_delta(raw, parts.delta, malformed.get("delta", 0)) if parts.delta is not UNSET else None,
        snapshot=Snapshot(
            index=snapshot.index,
            sequence=snapshot.sequence,
            transactions=snapshot.transactions,
            malformed=malformed.get("snapshot", 0),
        )
        if snapshot is not UNSET and snapshot.transactions is not None
        else None,
        block=_block(parts.block) if parts.block is not UNSET else None,
        blocks=tuple(map(_block, parts.blocks)) if parts.blocks is not UNSET else None,
        fees=_fees(parts.fees) if parts.fees is not UNSET else None,
        projected=tuple(map(_projected, parts.projected)) if parts.projected is not UNSET else None,
        price_known=parts.conversions is not UNSET,
        btc_usd=usd,
        price_at=price_at,
        loading="mempool" in parts.loading if parts.loading is not UNSET else None,
        has_difficulty=parts.difficulty is not UNSET,
        is_init=parts.backend_info is not UNSET or "backendInfo" in skipped,
        backend=parts.backend_info if parts.backend_info is not UNSET else None,
        pong=parts.pong is True,
        skipped=skipped,
        unknown=unknown,
    )


def _delta(raw: bytes | str, delta: _Delta, malformed: int) -> Delta:
    return Delta(
        sequence=delta.sequence,
        removed=tuple(delta.removed),
        mined=tuple(delta.mined),
        # A transaction cannot replace itself; a pair that claims so is invalid.
        replaced=tuple(
            Replacement(pair.replaced, pair.by.txid) for pair in delta.replaced if pair.replaced != pair.by.txid
        ),
        malformed=malformed,
        added=delta.added,
        replacers=[pair.by for pair in delta.replaced],
        frame=raw,
    )


def _block(block: _Block) -> Block:
    return Block(height=block.height, hash=block.id, previous_hash=block.previous or None, timestamp=block.timestamp)


def _price(conversions: _Conversions) -> tuple[float | None, float | None]:
    """Return the price and its time. A price that the backend never fetched, or an impossible one, is unknown."""
    if not 0 < conversions.usd <= MAX_USD or conversions.time == 0:
        return None, None
    return conversions.usd, conversions.time if conversions.time is not UNSET else None


def _projected(block: _ProjectedBlock) -> ProjectedBlock:
    highest = max(block.rates, default=0.0)
    return ProjectedBlock(block.vsize, min(block.rates) if highest else None, highest)


def _fees(fees: _Fees) -> FeeMarket:
    return FeeMarket(
        fastest=fees.fastest_fee,
        half_hour=fees.half_hour_fee,
        hour=fees.hour_fee,
        economy=fees.economy_fee,
        minimum=fees.minimum_fee,
    )
