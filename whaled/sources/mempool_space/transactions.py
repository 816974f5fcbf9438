"""Decoding of the backend's transactions: a few fields of every one, all fields of those that matter. Pure."""

from collections.abc import Container, Iterator, Mapping, Sequence, Set

import msgspec
from msgspec import Raw, Struct, field

from whaled.model import Input, Output, Transaction, outpoint
from whaled.sources.mempool_space.fields import (
    UNREADABLE,
    Number,
    Satoshi,
    Seconds,
    Signed,
    Txid,
    amount,
    gross_sat,
    read,
)

# gc=False below: these hold strings, numbers and lists of each other, so they cannot be part of a cycle.

DELTA_KEY = b'"mempool-transactions"'
# Follows the txid of a transaction, but not the txid of an input or a summary, which begin in the same way.
VERSION = b',"version":'
# After this many failures `_cut` gives up: a backend that serialises differently does so for every transaction, and
# searching the whole frame for each one is quadratic.
NOT_FOUND_LIMIT = 8
# Used for an input whose nSequence cannot be read: it does not signal RBF.
FINAL_SEQUENCE = 0xFFFFFFFF


class _Value(Struct, gc=False):
    value: Satoshi


class Glance(Struct, gc=False):
    """The fields that decide whether a transaction matters.

    The other fields are decoded only of those that do: decoding every transaction in full takes 1.5 times as long.
    """

    txid: Txid
    vout: list[_Value]
    fee: Signed | None = None

    @property
    def value_sat(self) -> int:
        """The sum of all outputs, in satoshi."""
        # A plain loop is twice as fast here as sum() over a generator or a comprehension.
        total = 0
        for output in self.vout:
            total += output.value
        return total

    @property
    def gross_sat(self) -> int:
        """The sum of all outputs, plus the fee if it is known, in satoshi: the value of the inputs."""
        return gross_sat(self.value_sat, self.fee)


class _Output(Struct, gc=False):
    value: Satoshi
    script: str = field(name="scriptpubkey", default="")
    # For a script without an address: "" in none mode, absent in esplora mode.
    address: str | None = field(name="scriptpubkey_address", default=None)


class _Input(Struct, gc=False):
    txid: str
    vout: Number
    sequence: Number
    # null in none and electrum mode, present in esplora mode; always null for a coinbase.
    prevout: _Output | None = None


class _Status(Struct, gc=False):
    confirmed: bool = False


class _Whole(Struct, gc=False):
    """Every field of a transaction that whaled decodes."""

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
    """A transaction whose fields are decoded one by one."""

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
    replaced: Txid  # required, as in the dialect's own decoder: a pair without it is invalid
    by: Raw


_NONE = _DeltaOnly(_Lists())
_decode_spender = msgspec.json.Decoder(_Spender).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_glance = msgspec.json.Decoder(Glance).decode
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_lists = msgspec.json.Decoder(_DeltaOnly).decode
_decode_replacer = msgspec.json.Decoder(_Replacer).decode
_decode_output_fields = msgspec.json.Decoder(_OutputFields).decode
_decode_inputs = msgspec.json.Decoder(list[_Input]).decode
_decode_input_fields = msgspec.json.Decoder(_InputFields).decode
_decode_signed = msgspec.json.Decoder(Signed).decode
_decode_number = msgspec.json.Decoder(Number).decode
_decode_seconds = msgspec.json.Decoder(Seconds).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_status = msgspec.json.Decoder(_Status).decode


def glance(entry: Raw) -> Glance:
    """Decode the fields of one transaction that decide whether it matters.

    Raises one of UNREADABLE if it has no txid, or an output whose value cannot be read: a sum is exact or absent.
    """
    try:
        return _decode_glance(entry)
    except UNREADABLE:
        fields = _decode_fields(entry)
    values = [_Value(amount(_decode_output_fields(each).value)) for each in _decode_items(fields.vout)]
    return Glance(fields.txid, values, read(fields.fee, _decode_signed, None))


def at_least(frame: bytes | str, minimum_sat: int, *parts: Sequence[Glance]) -> list[Transaction]:
    """Return, in full, the transactions of a frame whose outputs and fee add up to at least `minimum_sat`, each once.

    A field that cannot be read, other than the values of the outputs, is unknown in the result (no inputs, fee None, no
    script); the transaction is not lost.
    """
    # Each wanted txid, with the txid that follows it in its list.
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
    """Return the transactions of a frame that spend one of these outpoints (`model.outpoint`): txid by outpoint."""
    found: dict[str, str] = {}
    for entry in _entries(read(Raw(frame.encode() if isinstance(frame, str) else frame), _decode_lists, _NONE).delta):
        spender = read(entry, _decode_spender, None)
        for spent in spender.vin if spender is not None else ():
            key = outpoint(spent.txid, spent.vout)
            if key in outpoints:
                found[key] = spender.txid
    return found


def _cut(raw: bytes, wanted: Mapping[str, str | None], minimum_sat: int) -> dict[str, _Whole]:
    """Decode the wanted transactions of a frame without parsing the others.

    A backend begins a transaction with its txid and version, so a transaction ends where the next one begins. One that
    is serialised differently, or has an unreadable field, is left out here.
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
        # If a txid occurs twice in the frame, this may be the other occurrence.
        if _gross_sat(whole) >= minimum_sat:
            found[txid] = whole
    return found


def _opening(txid: str) -> bytes:
    return b'{"txid":"%s"' % txid.encode()


def _search(raw: bytes, missing: Set[str], minimum_sat: int) -> dict[str, _Whole]:
    """Decode the missing transactions in one pass over the delta, field by field."""
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
    """Yield every transaction of a delta, undecoded."""
    yield from read(lists.added, _decode_items, [])
    for pair in read(lists.replaced, _decode_items, []):
        replacer = read(pair, _decode_replacer, None)
        if replacer is not None:
            yield replacer.by


def _whole(entry: Raw | bytes) -> _Whole:
    """Decode a transaction, field by field if necessary: an unreadable field is unknown.

    Raises one of UNREADABLE if it has no txid, or an output whose value cannot be read.
    """
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


def _output_apart(raw: Raw) -> _Output:
    fields = _decode_output_fields(raw)
    return _Output(
        amount(fields.value), read(fields.script, _decode_text, ""), read(fields.address, _decode_text, None)
    )


def _inputs(raw: Raw) -> list[_Input]:
    """Decode all inputs or none: a part of them would understate what the transaction spends."""
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


def transaction_of(raw: Raw | bytes) -> Transaction:
    """Decode a transaction as REST sends it, in full; an unreadable field is unknown.

    Raises one of UNREADABLE if it has no txid, or an output whose value cannot be read.
    """
    return _transaction(_whole(raw))


def _transaction(whole: _Whole) -> Transaction:
    # The fee is -1 if the backend does not know the value of every input (api/bitcoin/bitcoin-api.ts, above 12 inputs).
    fee, rate = whole.fee, _known(whole.rate)
    # A block that arrives between two of the backend's calls leaves fee 0 and rate 0 (api/bitcoin/bitcoin-api.ts).
    if fee is not None and (fee < 0 or (whole.status.confirmed and fee == 0)):
        fee = rate = None
    vsize = _known(whole.vsize)
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


def _known(number: float | None) -> float | None:
    return number if number is not None and number >= 0 else None


def _output(output: _Output) -> Output:
    return Output(output.value, output.script, output.address or None)
