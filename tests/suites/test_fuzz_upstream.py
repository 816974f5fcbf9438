"""The backend's frames, mutated: whatever comes, the parser answers in bounds and in time, or with its one error.

What is well-formed beside what is not must survive: a reference of few lines, on Python's own JSON, says what that is.
"""

import json
import math
import sys
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest

from kit.fuzz import corpus, hunt, scaling
from kit.recordings import recorded_frames
from kit.whales import BTC, NOW, txid
from whaled.gateway import messages
from whaled.model import Draft, Event, Market, Source, Transaction
from whaled.sources.mempool_space.changes import change_of
from whaled.sources.mempool_space.dialect import Delta, DialectError, Frame, Snapshot, decode
from whaled.sources.mempool_space.snapshot import SnapshotRound
from whaled.sources.mempool_space.transactions import transaction_of
from whaled.whales import lifecycle, prices
from whaled.whales.detect import Detector, Rules

DELTA = "mempool-transactions"
SNAPSHOT = "projected-block-transactions"
COINS_SAT = 21_000_000 * BTC
UINT32 = 2**32 - 1
# Deeper, and which of two parsers gives up first depends on the stack they are called on.
DEPTH_COMPARED = 100
ITEMS_KEPT = 4
FIELD_OF = {
    "block": "block",
    "blocks": "blocks",
    "fees": "fees",
    "mempool-blocks": "projected",
    "conversions": "btc_usd",
    "loadingIndicators": "loading",
    "backendInfo": "backend",
}
WORDS = (
    *FIELD_OF, DELTA, SNAPSHOT, "sequence", "added", "removed", "mined", "replaced", "by", "txid", "vin", "vout",
    "value", "fee", "vsize", "weight", "effectiveFeePerVsize", "firstSeen", "status", "confirmed", "prevout", "height",
    "timestamp", "id", "previousblockhash", "USD", "mempool", "index", "blockTransactions", "da", "mempoolInfo",
    100 * BTC, 100 * BTC - 1, [100 * BTC], [["b" * 64, 1, 1.5, 100 * BTC, 2.5, 0, 1]],
    {"txid": "c" * 64, "version": 2, "vin": [], "vout": [{"value": 100 * BTC}]},
    {"txid": "c" * 64, "vout": [{"value": 1}]}, {"replaced": "d" * 64, "by": {"txid": "e" * 64, "vout": []}},
    {"txid": "c" * 64, "vout": 0, "vin": 1},
)  # fmt: skip


# --- what is tried ---------------------------------------------------------------------------------------------------


@cache
def seeds() -> tuple[bytes, ...]:
    """Recorded frames with short lists, one of each set of keys, and the shapes that were not recorded."""
    found: dict[tuple[str, ...], bytes] = {}
    for raw in recorded_frames():
        message = json.loads(raw)
        delta = message.get(DELTA)
        if delta is not None:
            for key in ("added", "removed", "mined", "replaced"):
                delta[key] = delta[key][:ITEMS_KEPT]
        kept = json.dumps(message, separators=(",", ":")).encode()
        keys = (*message, *(key for key, value in (delta or {}).items() if value))
        if len(kept) > len(found.get(keys, b"")):
            found[keys] = kept
    stripped = [[txid(number), 1470, 141.25, 100 * BTC + number, 10.5, 0, 1_700_000_000] for number in range(4)]
    snapshot = {SNAPSHOT: {"index": 0, "sequence": 7, "blockTransactions": stripped}, "pong": True}
    change = {SNAPSHOT: {"index": 1, "sequence": 8, "delta": {"added": stripped, "removed": [], "changed": []}}}
    return (*found.values(), json.dumps(snapshot).encode(), json.dumps(change).encode())


def plain(raw: bytes) -> Any:
    """The frame by Python's own JSON. Raises ValueError where the two need not agree on whether it is JSON."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise ValueError("beyond floats")
        return number

    def refused(text: str) -> None:
        raise ValueError(text)

    if b"\\ud" in raw.lower():
        raise ValueError("surrogates")
    depth = deepest = 0
    for byte in raw:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    if deepest > DEPTH_COMPARED:
        raise ValueError("deep")
    return json.loads(raw.decode(), object_pairs_hook=distinct, parse_float=finite, parse_constant=refused)


def is_txid(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def total_sat(value: Any) -> int | None:
    """The sum of a transaction's outputs, None if it is none."""
    if not isinstance(value, dict) or not is_txid(value.get("txid")) or not isinstance(value.get("vout"), list):
        return None
    values: list[Any] = [output.get("value") if isinstance(output, dict) else None for output in value["vout"]]
    return sum(map(round, values)) if all(is_number(each) and 0 <= each <= COINS_SAT for each in values) else None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def gross_sat(entry: Any, total: int) -> int:
    """With the fee, where that is known."""
    fee = entry.get("fee")
    return total + round(fee) if is_number(fee) and 0 < fee <= COINS_SAT else total


def entries(part: Any, key: str) -> list[Any]:
    value = part.get(key, [])
    return value if isinstance(value, list) else []


def pairs_of(part: Any) -> list[Any]:
    return [
        pair
        for pair in entries(part, "replaced")
        if isinstance(pair, dict) and is_txid(pair.get("replaced")) and total_sat(pair.get("by")) is not None
    ]


def expected(part: Any, minimum_sat: int) -> dict[str, list[int]]:
    """Every transaction of the delta that can be read and is large enough, with its outputs."""
    found: dict[str, list[int]] = {}
    for entry in (*entries(part, "added"), *(pair["by"] for pair in pairs_of(part))):
        if (total := total_sat(entry)) is not None and gross_sat(entry, total) >= minimum_sat:
            found.setdefault(entry["txid"], [round(output["value"]) for output in entry["vout"]])
    return found


# --- what must hold --------------------------------------------------------------------------------------------------


def check(raw: bytes) -> None:
    """Everything that holds of every input."""
    try:
        frame = decode(raw)
    except DialectError:
        frame = None
    if frame is not None:
        check_bounds(frame)
        if frame.delta is not None:
            check_whales(frame, frame.delta)
    try:
        message = plain(raw)
    except (ValueError, RecursionError):
        return
    check_against(message, frame)


def check_bounds(frame: Frame) -> None:
    blocks = [*(frame.blocks or ()), *([frame.block] if frame.block else ())]
    for block in blocks:
        assert 0 <= block.height <= UINT32
        assert 0 <= block.timestamp <= UINT32
        assert len(block.hash) == 64
    if frame.fees is not None:
        rates = msgspec.structs.astuple(frame.fees)
        assert all(rate is None or 0 <= rate <= COINS_SAT for rate in rates)
    for projected in frame.projected or ():
        assert 0 <= projected.max_rate <= COINS_SAT
        assert projected.min_rate is None or 0 <= projected.min_rate <= projected.max_rate
        assert 0 <= projected.vsize <= COINS_SAT
    assert frame.btc_usd is None or 0 < frame.btc_usd <= 1e12
    assert frame.price_at is None or (frame.btc_usd is not None and 0 < frame.price_at <= UINT32)
    if frame.snapshot is not None:
        assert 0 <= frame.snapshot.index <= UINT32
        assert 0 <= frame.snapshot.sequence <= 2**53
        question = SnapshotRound(1.0)
        question.begin(NOW)
        question.answered(frame.snapshot, NOW)
    if frame.delta is not None:
        assert 0 <= frame.delta.sequence <= 2**53
        assert all(len(each) == 64 for each in (*frame.delta.removed, *frame.delta.mined))


def check_transaction(found: Transaction) -> None:
    assert all(0 <= output.value <= COINS_SAT for output in found.outputs)
    assert found.fee_sat is None or 0 <= found.fee_sat <= COINS_SAT
    assert found.fee_rate is None or 0 <= found.fee_rate <= COINS_SAT
    assert 0 <= found.vsize <= COINS_SAT
    assert found.first_seen is None or 0 < found.first_seen <= UINT32
    assert all(0 <= spent.vout <= UINT32 and 0 <= spent.sequence <= UINT32 for spent in found.inputs)


def check_whales(frame: Frame, delta: Delta) -> None:
    """All the way to a client's frame nothing that was read makes anything fail."""
    found: list[Transaction] = []
    for minimum_sat in (0, 100 * BTC):
        found = delta.at_least(minimum_sat)
        assert len({each.txid for each in found}) == len(found)
        for each in found:
            check_transaction(each)
            assert each.value_sat + (each.fee_sat or 0) >= minimum_sat
    price = prices.received(None, frame.btc_usd, frame.price_at, NOW)
    market = Market(fees=frame.fees, projected=frame.projected, tip_height=100, price=price)
    detector = Detector(Rules(100 * BTC))
    change = change_of(frame, received_at=NOW, received_monotonic=0.0)
    for each in detector.candidates(found):
        whale = detector.assess(
            each, market=market, now=NOW, source=Source.LIVE, replaces=change.predecessor(each.txid)
        )
        assert whale is not None
        drafts: list[Draft] = [lifecycle.alerted(whale, NOW)]
        if frame.block is not None:
            drafts.append(lifecycle.confirmed(whale, frame.block, NOW))
        for draft in drafts:
            event = Event(**{**msgspec.structs.asdict(draft), "offset": 1})
            assert msgspec.json.decode(messages.event(event, "e"))


def check_against(message: Any, frame: Frame | None) -> None:
    """Nothing well-formed was lost, and nothing came of what is not."""
    if not isinstance(message, dict):
        assert frame is None
        return
    part = message.get(DELTA)
    if isinstance(part, dict):
        assert frame is not None
        assert frame.delta is not None
        read = frame.delta
        assert list(read.removed) == [each for each in entries(part, "removed") if is_txid(each)]
        assert list(read.mined) == [each for each in entries(part, "mined") if is_txid(each)]
        assert [(each.replaced, each.by) for each in read.replaced] == [
            (pair["replaced"], pair["by"]["txid"]) for pair in pairs_of(part)
        ]
        assert len(read.added) == sum(total_sat(each) is not None for each in entries(part, "added"))
        for minimum_sat in (0, 100 * BTC):
            found = {each.txid: [output.value for output in each.outputs] for each in read.at_least(minimum_sat)}
            assert found == expected(part, minimum_sat)
    elif frame is not None:
        assert frame.delta is None
    check_parts(message, frame)


def check_parts(message: dict[str, Any], frame: Frame | None) -> None:
    """A part reads alike alone and beside whatever others."""
    for key, name in FIELD_OF.items():
        if key not in message:
            continue
        try:
            alone = decode(json.dumps({key: message[key]}).encode())
        except DialectError:
            continue
        assert frame is not None
        assert getattr(frame, name) == getattr(alone, name)
    part = message.get(SNAPSHOT)
    if isinstance(part, dict) and isinstance(rows := part.get("blockTransactions"), list):
        numbers = [part.get("index"), part.get("sequence")]
        if all(type(each) is int and 0 <= each <= UINT32 for each in numbers):
            assert frame is not None
            assert isinstance(frame.snapshot, Snapshot)
            assert [each.txid for each in frame.snapshot.at_least(0)] == [row[0] for row in rows if is_stripped(row)]


def is_stripped(row: Any) -> bool:
    return (
        isinstance(row, list) and len(row) >= 4 and is_txid(row[0]) and is_number(row[3]) and 0 <= row[3] <= COINS_SAT
    )


@pytest.mark.parametrize("raw", corpus("upstream"))
def test_every_kept_frame_is_answered_within_bounds(raw: bytes) -> None:
    check(raw)


def test_every_seed_passes_the_check_that_mutations_have_to_pass() -> None:
    assert len(seeds()) >= 8
    for raw in seeds():
        check(raw)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_mutation_of_a_frame_gets_more_than_the_one_error_out_of_the_parser() -> None:
    hunt("upstream", check, seeds(), WORDS)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_mutation_of_a_transaction_from_rest_gets_more_than_a_decode_error() -> None:
    def check_rest(raw: bytes) -> None:
        try:
            check_transaction(transaction_of(raw))
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return

    deltas = [json.loads(raw).get(DELTA) for raw in seeds()]
    transactions = [json.dumps(each).encode() for delta in deltas if delta for each in delta["added"]]
    hunt("rest", check_rest, transactions, WORDS)


# --- time and memory -------------------------------------------------------------------------------------------------


def many(entry: Callable[[int], str], key: str = "added") -> Callable[[int], bytes]:
    def make(count: int) -> bytes:
        entries = ",".join(map(entry, range(count)))
        return f'{{"{DELTA}":{{"sequence":1,"{key}":[{entries}]}}}}'.encode()

    return make


def escaped(text: str) -> str:
    """Return a text with an escape for its first letter, as JSON allows."""
    return f"\\u{ord(text[0]):04x}{text[1:]}"


def whale_json(number: int, rest: str = "", opening: str = '{"txid":', written: Callable[[str], str] = str) -> str:
    return f'{opening}"{written(txid(number))}","version":2,"vin":[],"vout":[{{"value":{100 * BTC}}}]{rest}}}'


def pair(number: int) -> str:
    return f'{{"replaced":"{txid(2 * number)}","by":{whale_json(2 * number + 1)}}}'


FAMILIES: dict[str, Callable[[int], bytes]] = {
    "whales": many(whale_json),
    "whales with spaces": many(lambda number: whale_json(number, opening='{ "txid":')),
    "whales whose fee is a text": many(lambda number: whale_json(number, ',"fee":"x"')),
    "whales with an escaped txid": many(lambda number: whale_json(number, written=escaped)),
    "the same whale": many(lambda number: whale_json(1)),
    "bad transactions": many(lambda number: '{"txid":1}'),
    "replacements": many(pair, "replaced"),
    "replacements by the same": many(lambda number: pair(1), "replaced"),
    "unknown keys": lambda count: ("{" + ",".join(f'"k{number}":0' for number in range(count)) + "}").encode(),
    "one key again and again": lambda count: (
        "{" + ",".join(f'"block":{number}' for number in range(count)) + "}"
    ).encode(),
    "a long number": lambda count: b'{"%s":{"sequence":%s}}' % (DELTA.encode(), b"9" * 40 * count),
    "a long text": lambda count: b'{"%s":{"sequence":"%s"}}' % (DELTA.encode(), b"\\u0000" * 40 * count),
}


def read_all(raw: bytes) -> None:
    try:
        change = change_of(decode(raw), received_at=NOW, received_monotonic=0.0)
    except DialectError:
        return
    for found in change.entered.at_least(0):
        change.predecessor(found.txid)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_times_the_frame_takes_about_eight_times_as_long(family: str) -> None:
    # 64 times would be quadratic.
    assert scaling(FAMILIES[family], read_all, 400) < 28


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_stays_in_proportion_to_the_frame(family: str) -> None:
    raw = FAMILIES[family](1_000)
    tracemalloc.start()
    try:
        read_all(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(raw) + 100_000
