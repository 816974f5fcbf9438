"""A transaction as the backend writes it: a glance at every one, the whole of those that matter. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct, field

from whaled.model import SAT_PER_BTC, Input, Output, Transaction

# gc=False below: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

Txid = Annotated[str, Meta(min_length=64, max_length=64)]
# Above all coins there will ever be, a value is not one; sums stay far within 64 bits.
MAX_SAT: Final = 21_000_000 * SAT_PER_BTC
Satoshi = Annotated[int, Meta(ge=0, le=MAX_SAT)]
# A rate of all coins for one vB, or so many vB: what is beyond is no measure, and what follows would overflow.
Rate = Annotated[float, Meta(ge=0, le=MAX_SAT)]
# Heights, times, positions and nSequence: 32 bits in a block or a transaction.
Number = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
# A time in seconds that need not be whole.
Seconds = Annotated[float, Meta(ge=0, le=0xFFFFFFFF)]
DELTA_KEY = b'"mempool-transactions"'
# What follows the txid of a transaction, but not of an input or a summary that begins alike.
VERSION = b',"version":'
# A backend that writes otherwise does so always: looking for each transaction through all of a frame is quadratic.
NOT_FOUND_LIMIT = 8
UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError)


class _Value(Struct, gc=False):
    value: Satoshi


class Glance(Struct, gc=False):
    """What tells whether a transaction matters. The rest is read of those that do: reading all of every transaction
    takes 1.5 times as long.
    """

    txid: Txid
    vout: list[_Value]

    @property
    def value_sat(self) -> int:
        """Sum of all outputs, in satoshi."""
        # A plain loop: twice as fast here as sum() over a generator or comprehension.
        total = 0
        for output in self.vout:
            total += output.value
        return total


class _Output(Struct, gc=False):
    value: Satoshi
    script: str = field(name="scriptpubkey", default="")
    # "" where there is no address in none mode; the key is absent in esplora mode.
    address: str | None = field(name="scriptpubkey_address", default=None)


class _Input(Struct, gc=False):
    txid: str
    vout: Number
    sequence: Number
    # null in none and electrum mode; filled in esplora mode; null for a coinbase.
    prevout: _Output | None = None


class _Status(Struct, gc=False):
    confirmed: bool = False


# Negative is what a backend computes where it does not know the inputs; see `_transaction`.
Fee = Annotated[int, Meta(ge=-MAX_SAT, le=MAX_SAT)]


class _Whole(Struct, gc=False):
    """Everything that is read of a transaction."""

    txid: Txid
    vin: list[_Input]
    vout: list[_Output]
    fee: Fee | None = None
    rate: Rate | None = field(name="effectiveFeePerVsize", default=None)
    vsize: Rate | None = None
    weight: Rate = 0.0
    first_seen: Number | None = field(name="firstSeen", default=None)
    status: _Status = field(default_factory=_Status)


_MISSING = Raw(b"null")


class _Fields(Struct):
    """A transaction whose fields are read one by one."""

    vout: Raw
    vin: Raw = _MISSING
    fee: Raw = _MISSING
    rate: Raw = field(name="effectiveFeePerVsize", default=_MISSING)
    vsize: Raw = _MISSING
    weight: Raw = _MISSING
    first_seen: Raw = field(name="firstSeen", default=_MISSING)
    status: Raw = _MISSING


class _Lists(Struct):
    added: Raw = _MISSING
    replaced: Raw = _MISSING


class _DeltaOnly(Struct):
    delta: _Lists = field(name="mempool-transactions")


class _Replacer(Struct):
    replaced: Txid  # as the first look has it: a pair without one is none
    by: Raw


_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_glance = msgspec.json.Decoder(Glance).decode
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_lists = msgspec.json.Decoder(_DeltaOnly).decode
_decode_replacer = msgspec.json.Decoder(_Replacer).decode
_decode_value = msgspec.json.Decoder(_Value).decode
_decode_output = msgspec.json.Decoder(_Output).decode
_decode_inputs = msgspec.json.Decoder(list[_Input]).decode
_decode_fee = msgspec.json.Decoder(Fee).decode
_decode_rate = msgspec.json.Decoder(Rate).decode
_decode_number = msgspec.json.Decoder(Number).decode
_decode_status = msgspec.json.Decoder(_Status).decode


def at_least(frame: bytes | str, minimum_sat: int, *parts: Sequence[Glance]) -> list[Transaction]:
    """The transactions of a frame in full whose outputs add up to `minimum_sat` or more, each once.

    What cannot be read of a transaction beside its outputs' values is unknown in the result (no inputs, fee None, no
    script); the transaction is not lost.
    """
    # Each wanted txid, and the txid that stands behind it in its list.
    wanted: dict[str, str | None] = {}
    for part in parts:
        for index, transaction in enumerate(part):
            if transaction.value_sat >= minimum_sat:
                wanted[transaction.txid] = part[index + 1].txid if index + 1 < len(part) else None
    if not wanted:
        return []
    raw = frame.encode() if isinstance(frame, str) else frame
    found = _cut(raw, wanted, minimum_sat)
    missing = wanted.keys() - found.keys()
    if missing:
        found |= _search(raw, missing, minimum_sat)
    return [_transaction(found[txid]) for txid in wanted]


def _cut(raw: bytes, wanted: Mapping[str, str | None], minimum_sat: int) -> dict[str, _Whole]:
    """The wanted transactions out of a frame, without parsing the others.

    A backend begins a transaction with its txid and version, so it ends where the next one begins. What does not hold
    to that, or is not in every field as it should be, is left out here.
    """
    at = max(0, raw.find(DELTA_KEY))
    found = {}
    not_found = 0
    for txid, following in wanted.items():
        if following is None:
            continue
        begin = raw.find(_opening(txid) + VERSION, at)
        end = raw.find(_opening(following) + VERSION, begin) if begin >= 0 else -1
        if end < 0:
            not_found += 1
            if not_found == NOT_FOUND_LIMIT:
                break
            continue
        at = end
        try:
            whole = _decode_whole(raw[begin:end].rstrip(b", \n\r\t"))
        except UNREADABLE:
            continue
        # A txid that comes twice may be the other one here.
        if sum(output.value for output in whole.vout) >= minimum_sat:
            found[txid] = whole
    return found


def _opening(txid: str) -> bytes:
    return b'{"txid":"%s"' % txid.encode()


def _search(raw: bytes, missing: Set[str], minimum_sat: int) -> dict[str, _Whole]:
    """The same in one walk through the delta, whatever else is wrong with them."""
    found: dict[str, _Whole] = {}
    for entry in _entries(_decode_lists(raw).delta):
        try:
            glance = _decode_glance(entry)
        except UNREADABLE:
            continue
        if glance.txid in missing and glance.txid not in found and glance.value_sat >= minimum_sat:
            found[glance.txid] = _whole(glance.txid, entry)
    return found


def _entries(lists: _Lists) -> Iterator[Raw]:
    """Every transaction of a delta, unread."""
    yield from _read(lists.added, _decode_items, [])
    for pair in _read(lists.replaced, _decode_items, []):
        replacer = _read(pair, _decode_replacer, None)
        if replacer is not None:
            yield replacer.by


def _whole(txid: str, entry: Raw) -> _Whole:
    """A transaction field by field: one that cannot be read is unknown, the values of the outputs are known."""
    try:
        return _decode_whole(entry)
    except UNREADABLE:
        fields = _decode_fields(entry)
    return _Whole(
        txid=txid,
        vin=_read(fields.vin, _decode_inputs, []),
        vout=[
            _read(each, _decode_output, None) or _Output(_decode_value(each).value)
            for each in _decode_items(fields.vout)
        ],
        fee=_read(fields.fee, _decode_fee, None),
        rate=_read(fields.rate, _decode_rate, None),
        vsize=_read(fields.vsize, _decode_rate, None),
        weight=_read(fields.weight, _decode_rate, 0.0),
        first_seen=_read(fields.first_seen, _decode_number, None),
        status=_read(fields.status, _decode_status, _Status()),
    )


def _read(raw: Raw, decoder: Callable[[Raw], Any], otherwise: Any) -> Any:
    try:
        return decoder(raw)
    except UNREADABLE:
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
