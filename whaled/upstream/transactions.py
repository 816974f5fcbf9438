"""A transaction as the backend writes it: a glance at every one, the whole of those that matter. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from whaled.model import SAT_PER_BTC, Input, Output, Transaction

# gc=False below: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

Txid = Annotated[str, Meta(min_length=64, max_length=64)]
# Above all coins there will ever be, a value is not one; sums stay far within 64 bits.
Satoshi = Annotated[int, Meta(ge=0, le=21_000_000 * SAT_PER_BTC)]
Rate = Annotated[float, Meta(ge=0)]
DELTA_KEY = b'"mempool-transactions"'
# What follows the txid of a transaction, but not of an input or a summary that begins alike.
VERSION = b',"version":'
# As tolerant as the first look: control characters in strings do not matter.
_JSON = json.JSONDecoder(strict=False)


class _Value(Struct, gc=False):
    value: Satoshi


class Glance(Struct, gc=False):
    """What tells whether a transaction matters. The rest is read of those that do: reading all of every transaction
    takes 1.5 times as long.
    """

    txid: Txid
    vout: list[_Value]


class _Output(Struct, gc=False):
    value: Satoshi
    script: str = field(name="scriptpubkey", default="")
    # "" where there is no address in none mode; the key is absent in esplora mode.
    address: str | None = field(name="scriptpubkey_address", default=None)


class _Input(Struct, gc=False):
    txid: str
    vout: int
    sequence: int
    # null in none and electrum mode; filled in esplora mode; null for a coinbase.
    prevout: _Output | None = None


class _Status(Struct, gc=False):
    confirmed: bool = False


class _Whole(Struct, gc=False):
    """Everything that is read of a transaction."""

    txid: Txid
    vin: list[_Input]
    vout: list[_Output]
    fee: int | None = None
    rate: Rate | None = field(name="effectiveFeePerVsize", default=None)
    vsize: Rate | None = None
    weight: Rate = 0.0
    first_seen: int | None = field(name="firstSeen", default=None)
    status: _Status = field(default_factory=_Status)


_decode_whole = msgspec.json.Decoder(_Whole).decode


def at_least(frame: bytes | str, minimum_sat: int, *parts: Sequence[Glance]) -> list[Transaction]:
    """The transactions of a frame in full whose outputs add up to `minimum_sat` or more, each once.

    What cannot be read of a transaction beside its outputs' values is unknown in the result (no inputs, fee None, no
    script); the transaction is not lost.
    """
    # Each wanted txid, and the txid that stands behind it in its list.
    wanted: dict[str, str | None] = {}
    for part in parts:
        for index, transaction in enumerate(part):
            # A plain loop: twice as fast here as sum() over a generator or comprehension.
            total = 0
            for output in transaction.vout:
                total += output.value
            if total >= minimum_sat:
                wanted[transaction.txid] = part[index + 1].txid if index + 1 < len(part) else None
    if not wanted:
        return []
    raw = frame.encode() if isinstance(frame, str) else frame
    found = _cut(raw, wanted)
    missing = [txid for txid in wanted if txid not in found]
    if missing:
        found |= _search(raw, missing)
    return [_transaction(found[txid]) for txid in wanted]


def _cut(raw: bytes, wanted: Mapping[str, str | None]) -> dict[str, _Whole]:
    """The wanted transactions out of a frame, without parsing the others.

    A backend begins a transaction with its txid and version, so it ends where the next one begins. What does not hold
    to that, or is not in every field as it should be, is left out here.
    """
    at = max(0, raw.find(DELTA_KEY))
    found = {}
    for txid, following in wanted.items():
        begin = raw.find(_opening(txid) + VERSION, at)
        end = raw.find(_opening(following) + VERSION, begin) if following is not None and begin >= 0 else -1
        if end < 0:
            continue
        try:
            found[txid] = _decode_whole(raw[begin:end].rstrip(b", \n\r\t"))
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            continue
        at = end
    return found


def _opening(txid: str) -> bytes:
    return b'{"txid":"%s"' % txid.encode()


def _search(raw: bytes, missing: Iterable[str]) -> dict[str, _Whole]:
    """The same, slower and whatever else is wrong with them: first where they should begin, then anywhere."""
    text = str(raw, "utf-8", "replace")
    at = max(0, text.find(DELTA_KEY.decode()))
    found: dict[str, _Whole] = {}
    elsewhere = []
    for txid in missing:
        fields = _find(text, at, txid)
        if fields is None:
            elsewhere.append(txid)
        else:
            found[txid] = _whole(fields)
    if elsewhere:
        delta = _JSON.decode(text)["mempool-transactions"]
        pairs = [pair for pair in delta.get("replaced", ()) if isinstance(pair, dict)]
        everything = (*delta.get("added", ()), *(pair.get("by") for pair in pairs))
        by_txid = {fields.get("txid"): fields for fields in everything if isinstance(fields, dict)}
        found |= {txid: _whole(by_txid[txid]) for txid in elsewhere}
    return found


def _find(text: str, begin: int, txid: str) -> dict[str, Any] | None:
    """The first transaction from `begin` on that starts with this txid.

    Inputs (in esplora mode) and summaries may start alike, but have no outputs.
    """
    opening = _opening(txid).decode()
    at = text.find(opening, begin)
    while at >= 0:
        fields: dict[str, Any]
        fields, end = _JSON.raw_decode(text, at)
        if "vout" in fields and "vin" in fields:
            return fields
        at = text.find(opening, end)
    return None


def _whole(fields: dict[str, Any]) -> _Whole:
    """A transaction field by field: one that cannot be read is unknown, the values of the outputs are known."""
    return _Whole(
        txid=fields["txid"],
        vin=_read(fields.get("vin"), list[_Input], []),
        vout=[_read(output, _Output, None) or _Output(int(output["value"])) for output in fields["vout"]],
        fee=_read(fields.get("fee"), int | None, None),
        rate=_read(fields.get("effectiveFeePerVsize"), Rate | None, None),
        vsize=_read(fields.get("vsize"), Rate | None, None),
        weight=_read(fields.get("weight"), Rate, 0.0),
        first_seen=_read(fields.get("firstSeen"), int | None, None),
        status=_read(fields.get("status"), _Status, _Status()),
    )


def _read(value: Any, shape: Any, otherwise: Any) -> Any:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError:
        return otherwise


def transaction_of(raw: bytes) -> Transaction:
    """A transaction as REST sends one in full. Raises msgspec.DecodeError."""
    return _transaction(_decode_whole(raw))


def _transaction(whole: _Whole) -> Transaction:
    fee, rate = whole.fee, whole.rate
    # A block that came between two of the backend's calls leaves fee 0 and rate 0 (api/bitcoin/bitcoin-api.ts).
    if fee is not None and (fee < 0 or (whole.status.confirmed and fee == 0)):
        fee = rate = None
    return Transaction(
        txid=whole.txid,
        inputs=tuple(
            Input(spent.txid, spent.vout, spent.sequence, _output(spent.prevout) if spent.prevout else None)
            for spent in whole.vin
        ),
        outputs=tuple(map(_output, whole.vout)),
        fee_sat=fee,
        vsize=whole.vsize if whole.vsize is not None else whole.weight / 4,
        fee_rate=rate,
        first_seen=whole.first_seen or None,
        is_confirmed=whole.status.confirmed,
    )


def _output(output: _Output) -> Output:
    return Output(output.value, output.script, output.address or None)
