"""A transaction as the backend writes it: a glance at every one, the whole of those that matter. Pure."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct, field

from whaled.model import SAT_PER_BTC, Input, Output, Transaction, outpoint

# A backend computes with doubles and writes what comes of it: a fee of 13,229 sat is 13229.999999999998 where it was
# multiplied from BTC, and a fee of -1 (not known) makes a rate of -0.00098. So every number that may come out of a
# computation is read as a number and rounded here; what cannot be read is unknown, and costs nothing else.

# gc=False below: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

Txid = Annotated[str, Meta(min_length=64, max_length=64)]
# Above all coins there will ever be, a value is not one; sums stay far within 64 bits.
MAX_SAT: Final = 21_000_000 * SAT_PER_BTC
Satoshi = Annotated[int, Meta(ge=0, le=MAX_SAT)]
# A rate of all coins for one vB, or so many vB: what is beyond is no measure, and what follows would overflow.
Rate = Annotated[float, Meta(ge=0, le=MAX_SAT)]
# The same where the backend computes with what it does not know: negative means unknown.
Signed = Annotated[float, Meta(ge=-MAX_SAT, le=MAX_SAT)]
# Heights, times, positions and nSequence: 32 bits in a block or a transaction.
Number = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
# A time in seconds that need not be whole.
Seconds = Annotated[float, Meta(ge=0, le=0xFFFFFFFF)]
DELTA_KEY = b'"mempool-transactions"'
# What follows the txid of a transaction, but not of an input or a summary that begins alike.
VERSION = b',"version":'
# A backend that writes otherwise does so always: looking for each transaction through all of a frame is quadratic.
NOT_FOUND_LIMIT = 8
# `TransactionFlags.replacement` (mempool.interfaces.ts).
REPLACEMENT_FLAG = 1 << 18
# Of an input whose nSequence cannot be read: it claims nothing.
FINAL_SEQUENCE = 0xFFFFFFFF
UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError)


def gross_sat(value_sat: int, fee: float | None) -> int:
    """Sum of all outputs and the fee, as far as it is known, in satoshi."""
    return value_sat + round(fee) if fee is not None and fee > 0 else value_sat


def is_replacement(flags: int | None) -> bool | None:
    """Whether a backend's flags say that it has seen a transaction replace another one; None where it gives none."""
    return None if not flags else bool(flags & REPLACEMENT_FLAG)


class _Value(Struct, gc=False):
    value: Satoshi


class Glance(Struct, gc=False):
    """What tells whether a transaction matters. The rest is read of those that do: reading all of every transaction
    takes 1.5 times as long.
    """

    txid: Txid
    vout: list[_Value]
    fee: Signed | None = None

    @property
    def value_sat(self) -> int:
        """Sum of all outputs, in satoshi."""
        # A plain loop: twice as fast here as sum() over a generator or comprehension.
        total = 0
        for output in self.vout:
            total += output.value
        return total

    @property
    def gross_sat(self) -> int:
        """Sum of all outputs and the fee, as far as it is known: what the inputs put in, in satoshi."""
        return gross_sat(self.value_sat, self.fee)


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


class _Whole(Struct, gc=False):
    """Everything that is read of a transaction."""

    txid: Txid
    vin: list[_Input]
    vout: list[_Output]
    fee: Signed | None = None
    rate: Signed | None = field(name="effectiveFeePerVsize", default=None)
    vsize: Signed | None = None
    weight: Signed = 0.0
    first_seen: Seconds | None = field(name="firstSeen", default=None)
    status: _Status = field(default_factory=_Status)


_MISSING = Raw(b"null")


class _Fields(Struct):
    """A transaction whose fields are read one by one."""

    txid: Txid
    vout: Raw
    vin: Raw = _MISSING
    fee: Raw = _MISSING
    rate: Raw = field(name="effectiveFeePerVsize", default=_MISSING)
    vsize: Raw = _MISSING
    weight: Raw = _MISSING
    first_seen: Raw = field(name="firstSeen", default=_MISSING)
    status: Raw = _MISSING


class _OutputFields(Struct):
    value: Raw
    script: Raw = field(name="scriptpubkey", default=_MISSING)
    address: Raw = field(name="scriptpubkey_address", default=_MISSING)


class _InputFields(Struct):
    txid: str
    vout: Number
    sequence: Raw = _MISSING
    prevout: Raw = _MISSING


class _Spent(Struct, gc=False):
    txid: str
    vout: Number


class _Spender(Struct, gc=False):
    txid: Txid
    vin: list[_Spent]


class _Lists(Struct):
    added: Raw = _MISSING
    replaced: Raw = _MISSING


class _DeltaOnly(Struct):
    delta: _Lists = field(name="mempool-transactions")


class _Replacer(Struct):
    replaced: Txid  # as the first look has it: a pair without one is none
    by: Raw


_NONE = _DeltaOnly(_Lists())
_decode_spender = msgspec.json.Decoder(_Spender).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_glance = msgspec.json.Decoder(Glance).decode
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_lists = msgspec.json.Decoder(_DeltaOnly).decode
_decode_replacer = msgspec.json.Decoder(_Replacer).decode
_decode_value = msgspec.json.Decoder(Rate).decode
_decode_output = msgspec.json.Decoder(_Output).decode
_decode_output_fields = msgspec.json.Decoder(_OutputFields).decode
_decode_inputs = msgspec.json.Decoder(list[_Input]).decode
_decode_input_fields = msgspec.json.Decoder(_InputFields).decode
_decode_signed = msgspec.json.Decoder(Signed).decode
_decode_number = msgspec.json.Decoder(Number).decode
_decode_seconds = msgspec.json.Decoder(Seconds).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_status = msgspec.json.Decoder(_Status).decode


def glance(entry: Raw) -> Glance:
    """The first look at one transaction, field by field. Raises one of UNREADABLE where there is no txid, or an output
    whose value cannot be read: the sum is exact or there is none.
    """
    try:
        return _decode_glance(entry)
    except UNREADABLE:
        fields = _decode_fields(entry)
    values = [_Value(amount(_decode_output_fields(each).value)) for each in _decode_items(fields.vout)]
    return Glance(fields.txid, values, read(fields.fee, _decode_signed, None))


def at_least(frame: bytes | str, minimum_sat: int, *parts: Sequence[Glance]) -> list[Transaction]:
    """The transactions of a frame in full whose outputs and fee add up to `minimum_sat` or more, each once.

    What cannot be read of a transaction beside its outputs' values is unknown in the result (no inputs, fee None, no
    script); the transaction is not lost.
    """
    # Each wanted txid, and the txid that stands behind it in its list.
    wanted: dict[str, str | None] = {}
    for part in parts:
        for index, transaction in enumerate(part):
            if transaction.gross_sat >= minimum_sat:
                wanted[transaction.txid] = part[index + 1].txid if index + 1 < len(part) else None
    if not wanted:
        return []
    raw = frame.encode() if isinstance(frame, str) else frame
    found = _cut(raw, wanted, minimum_sat)
    missing = wanted.keys() - found.keys()
    if missing:
        found |= _search(raw, missing, minimum_sat)
    return [_transaction(found[txid]) for txid in wanted]


def spending(frame: bytes | str, outpoints: Container[str]) -> dict[str, str]:
    """The transactions of a frame that spend one of these outpoints (`model.outpoint`): its txid by outpoint."""
    found: dict[str, str] = {}
    for entry in _entries(read(Raw(frame.encode() if isinstance(frame, str) else frame), _decode_lists, _NONE).delta):
        spender = read(entry, _decode_spender, None)
        for spent in spender.vin if spender is not None else ():
            key = outpoint(spent.txid, spent.vout)
            if key in outpoints:
                found[key] = spender.txid
    return found


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
        if _gross_sat(whole) >= minimum_sat:
            found[txid] = whole
    return found


def _opening(txid: str) -> bytes:
    return b'{"txid":"%s"' % txid.encode()


def _search(raw: bytes, missing: Set[str], minimum_sat: int) -> dict[str, _Whole]:
    """The same in one walk through the delta, whatever else is wrong with them."""
    found: dict[str, _Whole] = {}
    for entry in _entries(_decode_lists(raw).delta):
        try:
            seen = glance(entry)
        except UNREADABLE:
            continue
        if seen.txid in missing and seen.txid not in found and seen.gross_sat >= minimum_sat:
            found[seen.txid] = _whole(entry)
    return found


def _gross_sat(whole: _Whole) -> int:
    return gross_sat(sum(output.value for output in whole.vout), whole.fee)


def _entries(lists: _Lists) -> Iterator[Raw]:
    """Every transaction of a delta, unread."""
    yield from read(lists.added, _decode_items, [])
    for pair in read(lists.replaced, _decode_items, []):
        replacer = read(pair, _decode_replacer, None)
        if replacer is not None:
            yield replacer.by


def _whole(entry: Raw | bytes) -> _Whole:
    """A transaction field by field: one that cannot be read is unknown, the values of the outputs are known."""
    try:
        return _decode_whole(entry)
    except UNREADABLE:
        fields = _decode_fields(entry)
    return _Whole(
        txid=fields.txid,
        vin=_inputs(fields.vin),
        vout=[_output_apart(each) for each in _decode_items(fields.vout)],
        fee=read(fields.fee, _decode_signed, None),
        rate=read(fields.rate, _decode_signed, None),
        vsize=read(fields.vsize, _decode_signed, None),
        weight=read(fields.weight, _decode_signed, 0.0),
        first_seen=read(fields.first_seen, _decode_seconds, None),
        status=read(fields.status, _decode_status, _Status()),
    )


def amount(raw: Raw) -> int:
    """Satoshi, from a number that may have come out of a computation. Raises one of UNREADABLE."""
    return round(_decode_value(raw))


def _output_apart(raw: Raw) -> _Output:
    fields = _decode_output_fields(raw)
    return _Output(
        amount(fields.value), read(fields.script, _decode_text, ""), read(fields.address, _decode_text, None)
    )


def _inputs(raw: Raw) -> list[_Input]:
    """All inputs or none: what is left of them would look like less than was spent."""
    try:
        return _decode_inputs(raw)
    except UNREADABLE:
        try:
            entries = [_decode_input_fields(each) for each in _decode_items(raw)]
        except UNREADABLE:
            return []
    return [
        _Input(
            each.txid,
            each.vout,
            read(each.sequence, _decode_number, FINAL_SEQUENCE),
            read(each.prevout, _output_apart, None),
        )
        for each in entries
    ]


def read(raw: Raw, decoder: Callable[[Raw], Any], otherwise: Any) -> Any:
    """The value of one field, `otherwise` where it cannot be read."""
    try:
        return decoder(raw)
    except UNREADABLE:
        return otherwise


def transaction_of(raw: bytes) -> Transaction:
    """A transaction as REST sends one in full; what cannot be read of it is unknown. Raises one of UNREADABLE where it
    has no txid, or an output whose value cannot be read.
    """
    return _transaction(_whole(raw))


def _transaction(whole: _Whole) -> Transaction:
    # -1 where the backend does not know what all inputs were worth (api/bitcoin/bitcoin-api.ts, above 12 inputs).
    fee, rate = whole.fee, _known(whole.rate)
    # A block that came between two of the backend's calls leaves fee 0 and rate 0 (api/bitcoin/bitcoin-api.ts).
    if fee is not None and (fee < 0 or (whole.status.confirmed and fee == 0)):
        fee = rate = None
    vsize = _known(whole.vsize)
    if fee == 0 and (paid := _fee_paid(whole)):
        # The same after a reorganisation took the block away: the transaction is pending, and the backend keeps its 0.
        fee, rate = paid, paid / vsize if vsize is not None and vsize >= 1.0 else None
    return Transaction(
        txid=whole.txid,
        inputs=tuple(
            Input(spent.txid, spent.vout, spent.sequence, _output(spent.prevout) if spent.prevout else None)
            for spent in whole.vin
        ),
        outputs=tuple(map(_output, whole.vout)),
        fee_sat=None if fee is None else round(fee),
        vsize=vsize if vsize is not None else (_known(whole.weight) or 0.0) / 4,
        fee_rate=rate,
        first_seen=int(whole.first_seen) or None if whole.first_seen is not None else None,
        is_confirmed=whole.status.confirmed,
    )


def _fee_paid(whole: _Whole) -> int | None:
    """What the inputs put in beyond the outputs; None where not all that is spent is known."""
    spent = [each.prevout.value for each in whole.vin if each.prevout is not None]
    if not spent or len(spent) < len(whole.vin):
        return None
    return max(0, sum(spent) - sum(output.value for output in whole.vout))


def _known(number: float | None) -> float | None:
    return number if number is not None and number >= 0 else None


def _output(output: _Output) -> Output:
    return Output(output.value, output.script, output.address or None)
