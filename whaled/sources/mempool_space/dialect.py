"""The mempool backend's WebSocket dialect: the frames to send, and received frames as typed values. Pure.

The backend merges everything due for a client into one JSON object, so a frame is a set of parts that are
distinguished by their keys, never by a message type. docs/upstream.md has the measurements; paths of the backend's
source below are relative to its `backend/src/`.
"""

from collections.abc import Container, Mapping, Sequence
from enum import StrEnum
from typing import Any, get_type_hints

import msgspec
from msgspec import UNSET, Raw, Struct

from whaled.errors import UpstreamError
from whaled.model import Block, FeeMarket, ProjectedBlock, Transaction
from whaled.source import Replacement
from whaled.sources.mempool_space.fields import UNREADABLE
from whaled.sources.mempool_space.rescue import rescued
from whaled.sources.mempool_space.shapes import (
    BackendInfo,
    BlockShape,
    ConversionsShape,
    DeltaShape,
    FeesShape,
    Parts,
    ProjectedShape,
    Stripped,
)
from whaled.sources.mempool_space.surrogates import repaired
from whaled.sources.mempool_space.transactions import Glance, at_least, spending

PING = '{"action":"ping"}'
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
    transactions: Sequence[Stripped] = ()
    malformed: int = 0

    def at_least(self, minimum_sat: int) -> list[Stripped]:
        """Return the transactions whose outputs and fee add up to at least `minimum_sat`."""
        return [each for each in self.transactions if each.gross_sat >= minimum_sat]


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
    skipped: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """True for an init object that reports the backend as in sync, so that its data is reliable."""
        return self.is_init and self.has_difficulty and self.loading is not True


_decode_frame = msgspec.json.Decoder(Parts).decode
_decode_keys = msgspec.json.Decoder(dict[str, Raw]).decode
_TYPES = get_type_hints(Parts, include_extras=True)
_PARTS = {
    key: (name, msgspec.json.Decoder(_TYPES[name]).decode)
    for key, name in zip(Parts.__struct_encode_fields__, Parts.__struct_fields__, strict=True)
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
            found = rescued(name, value)
            if found is not None:
                parts[name], malformed[name] = found
            if found is None or malformed[name]:
                skipped.append(key)
    if problem is not None and not parts:
        raise DialectError(DialectFault.BAD_SHAPE, f"{skipped[-1]}: {problem}", _sample(raw)) from problem
    return _frame(raw, Parts(**parts), tuple(skipped), tuple(unknown), malformed)


def _sample(raw: bytes | str) -> str:
    head = raw[:SAMPLE_LIMIT]
    return head if isinstance(head, str) else bytes(head).decode("utf-8", "replace")


# --- from wire shapes to values --------------------------------------------------------------------------------------


_NO_COUNTS: Mapping[str, int] = {}


def _frame(
    raw: bytes | str,
    parts: Parts,
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
        skipped=skipped,
        unknown=unknown,
    )


def _delta(raw: bytes | str, delta: DeltaShape, malformed: int) -> Delta:
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


def _block(block: BlockShape) -> Block:
    return Block(height=block.height, hash=block.id, previous_hash=block.previous or None, timestamp=block.timestamp)


def _price(conversions: ConversionsShape) -> tuple[float | None, float | None]:
    """Return the price and its time. A price that the backend never fetched, or an impossible one, is unknown."""
    if not 0 < conversions.usd <= MAX_USD or conversions.time == 0:
        return None, None
    return conversions.usd, conversions.time if conversions.time is not UNSET else None


def _projected(block: ProjectedShape) -> ProjectedBlock:
    highest = max(block.rates, default=0.0)
    return ProjectedBlock(block.vsize, min(block.rates) if highest else None, highest)


def _fees(fees: FeesShape) -> FeeMarket:
    return FeeMarket(
        fastest=fees.fastest_fee,
        half_hour=fees.half_hour_fee,
        hour=fees.hour_fee,
        economy=fees.economy_fee,
        minimum=fees.minimum_fee,
    )
