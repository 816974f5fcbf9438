"""A transaction as the backend writes it: a glance at every one, the whole of those that matter. Pure."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from whaled.model import SAT_PER_BTC, Input, Output, Transaction

# gc=False below: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

Txid = Annotated[str, Meta(min_length=64, max_length=64)]
# Above all coins there will ever be, a value is not one; sums stay far within 64 bits.
Satoshi = Annotated[int, Meta(ge=0, le=21_000_000 * SAT_PER_BTC)]
Rate = Annotated[float, Meta(ge=0)]
DELTA_KEY = '"mempool-transactions"'
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


def at_least(frame: bytes | str, minimum_sat: int, *parts: Sequence[Glance]) -> list[Transaction]:
    """The transactions of a frame in full whose outputs add up to `minimum_sat` or more, each once.

    What cannot be read of a transaction beside its outputs' values is unknown in the result (no inputs, fee None, no
    script); the transaction is not lost.
    """
    wanted: dict[str, None] = {}
    for part in parts:
        for transaction in part:
            # A plain loop: twice as fast here as sum() over a generator or comprehension.
            total = 0
            for output in transaction.vout:
                total += output.value
            if total >= minimum_sat:
                wanted[transaction.txid] = None
    return [_transaction(fields) for fields in _cut(frame, wanted)] if wanted else []


def _cut(frame: bytes | str, wanted: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The wanted transactions out of a frame, without parsing the others.

    A backend begins a transaction with its txid, so it can be found, and the next one behind it. Where that does not
    hold, the frame is parsed whole: slower, same result.
    """
    text = frame if isinstance(frame, str) else str(frame, "utf-8", "replace")
    at = max(0, text.find(DELTA_KEY))
    missing = []
    for txid in wanted:
        found = _find(text, at, txid)
        if found is None:
            missing.append(txid)
        else:
            fields, at = found
            yield fields
    if missing:
        delta = _JSON.decode(text)["mempool-transactions"]
        pairs = [pair for pair in delta.get("replaced", ()) if isinstance(pair, dict)]
        everything = (*delta.get("added", ()), *(pair.get("by") for pair in pairs))
        by_txid = {fields.get("txid"): fields for fields in everything if isinstance(fields, dict)}
        yield from (by_txid[txid] for txid in missing)


def _find(text: str, begin: int, txid: str) -> tuple[dict[str, Any], int] | None:
    """The first transaction from `begin` on that starts with this txid, and where it ends.

    Inputs (in esplora mode) and summaries may start alike, but have no outputs.
    """
    opening = f'{{"txid":"{txid}"'
    at = text.find(opening, begin)
    while at >= 0:
        fields, end = _JSON.raw_decode(text, at)
        if "vout" in fields and "vin" in fields:
            return fields, end
        at = text.find(opening, end)
    return None


def _transaction(fields: dict[str, Any]) -> Transaction:
    status = _read(fields.get("status"), _Status, _Status())
    fee = _read(fields.get("fee"), int | None, None)
    rate = _read(fields.get("effectiveFeePerVsize"), Rate | None, None)
    # A block that came between two of the backend's calls leaves fee 0 and rate 0 (api/bitcoin/bitcoin-api.ts).
    if fee is not None and (fee < 0 or (status.confirmed and fee == 0)):
        fee = rate = None
    vsize = _read(fields.get("vsize"), Rate | None, None)
    return Transaction(
        txid=fields["txid"],
        inputs=tuple(
            Input(spent.txid, spent.vout, spent.sequence, _output(spent.prevout) if spent.prevout else None)
            for spent in _read(fields.get("vin"), list[_Input], [])
        ),
        outputs=tuple(
            _output(_read(output, _Output, None) or _Output(int(output["value"]))) for output in fields["vout"]
        ),
        fee_sat=fee,
        vsize=vsize if vsize is not None else _read(fields.get("weight"), Rate, 0.0) / 4,
        fee_rate=rate,
        first_seen=_read(fields.get("firstSeen"), int | None, None) or None,
        is_confirmed=status.confirmed,
    )


def _read(value: Any, shape: Any, otherwise: Any) -> Any:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError:
        return otherwise


def _output(output: _Output) -> Output:
    return Output(output.value, output.script, output.address or None)
