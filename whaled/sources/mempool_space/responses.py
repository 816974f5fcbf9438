"""REST responses about transactions and blocks: their wire shapes, and their values. Pure."""

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct, field
from msgspec.structs import replace

from whaled.addresses import address_of, network_of
from whaled.model import MAX_SAT, Block, Input, Output, Transaction
from whaled.source import Confirmation, Relative, Summary
from whaled.sources.mempool_space.fields import UNREADABLE, Number, Seconds, Signed, Txid, amount, is_replacement, read
from whaled.sources.mempool_space.rawblock import transaction_in
from whaled.sources.mempool_space.rbf import Tree, relatives

HASH_DIGITS = 64
Hash = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{HASH_DIGITS}}}$")]

_NULL = Raw(b"null")


class StatusResponse(Struct):
    """The response to `tx/:txid/status`."""

    confirmed: bool
    block_hash: Hash | None = None
    block_height: Number | None = None

    @property
    def confirmation(self) -> Confirmation | None:
        """The block that contains the transaction, None if it is not mined."""
        if not self.confirmed or self.block_hash is None or self.block_height is None:
            return None
        return Confirmation(self.block_hash, self.block_height)


class OutspendResponse(Struct):
    """The response to `tx/:txid/outspend/:vout`: the transaction that spends the output, if it is spent."""

    txid: Hash | None = None


class HeaderResponse(Struct):
    """The response to `block/:hash`."""

    id: Hash
    height: Number
    timestamp: Number
    previous: Hash | None = field(name="previousblockhash", default=None)

    @property
    def block(self) -> Block:
        """The block's position in the chain."""
        return Block(height=self.height, hash=self.id, previous_hash=self.previous, timestamp=self.timestamp)


class CpfpResponse(Struct):
    """The response to `cpfp/:txid`."""

    effective_rate: Raw = field(name="effectiveFeePerVsize", default=_NULL)

    @property
    def rate(self) -> float | None:
        """The fee rate with the ancestors that a miner includes for it, in sat/vB; None if unknown."""
        rate = read(self.effective_rate, _decode_signed, None)
        return rate if rate is not None and rate >= 0 else None


class RbfResponse(Struct):
    """The response to `tx/:txid/rbf`."""

    replacements: Tree | None


class _Entry(Struct, gc=False):
    """An entry of a block's summary. Fields are decoded one by one, so that a malformed one costs only itself."""

    txid: Raw = _NULL
    value: Raw = _NULL
    fee: Raw = _NULL
    vsize: Raw = _NULL
    time: Raw = _NULL
    flags: Raw = _NULL


_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_txid = msgspec.json.Decoder(Txid).decode
_decode_signed = msgspec.json.Decoder(Signed).decode
_decode_seconds = msgspec.json.Decoder(Seconds).decode
_decode_flags = msgspec.json.Decoder(int).decode
_decode_tree = msgspec.json.Decoder(Tree).decode


def summary_of(raw: Raw, index: int) -> Summary:
    """Decode the entry at `index` of a block's summary; what cannot be read is unknown."""
    try:
        fields = _decode_entry(raw)
    except UNREADABLE:
        fields = _Entry()
    fee = read(fields.fee, _decode_signed, None)
    vsize = read(fields.vsize, _decode_signed, None)
    return Summary(
        read(fields.txid, _decode_txid, None),
        read(fields.value, amount, None),
        round(fee) if fee is not None and fee >= 0 else None,
        max(vsize or 0.0, 0.0),
        index,
        read(fields.time, _decode_seconds, None) or None,
        is_replacement(read(fields.flags, _decode_flags, None)),
    )


def family_of(raw: Raw) -> list[Relative] | None:
    """Decode a tree of `replacements`, as its transactions; None if it cannot be read."""
    tree = read(raw, _decode_tree, None)
    return None if tree is None else relatives(tree)


def bare_transaction(text: str) -> Transaction:
    """Parse the response to `tx/:txid/hex`: outputs without addresses, no prevouts, no fee.

    Raises ValueError if it is not a transaction, or one with impossible outputs.
    """
    raw = transaction_in(bytes.fromhex(text))
    if sum(value for value, _ in raw.outputs) > MAX_SAT:
        raise ValueError("the outputs exceed all coins")
    return Transaction(
        txid=raw.txid,
        inputs=tuple(Input(*each) for each in raw.inputs),
        outputs=tuple(Output(*each) for each in raw.outputs),
        fee_sat=None,
        vsize=raw.vsize,
    )


def with_addresses(transaction: Transaction) -> Transaction:
    """Return a transaction with the addresses of its outputs, by the network of an address that it spends from.

    It is unchanged if no such address is known.
    """
    spent = (each.prevout for each in transaction.inputs if each.prevout is not None)
    networks = (network_of(output.address) for output in spent if output.address is not None)
    network = next((each for each in networks if each is not None and each.segwit is not None), None)
    if network is None:
        return transaction
    outputs = (replace(each, address=address_of(each.script, network)) for each in transaction.outputs)
    return replace(transaction, outputs=tuple(outputs))


def with_computed_fee(transaction: Transaction) -> Transaction:
    """Return a transaction with the fee that its prevouts and outputs yield; unchanged if a prevout is unknown."""
    spent = [each.prevout for each in transaction.inputs if each.prevout is not None]
    if len(spent) < len(transaction.inputs):
        return transaction
    fee = sum(output.value for output in spent) - transaction.value_sat
    return _with_fee(transaction, fee if fee >= 0 else None)


def as_mined(transaction: Transaction, entry: Summary) -> Transaction:
    """Return a transaction of a block with the fee and the size of its summary entry, where that has them."""
    found = replace(transaction, vsize=entry.vsize or transaction.vsize)
    return _with_fee(found, entry.fee if entry.fee is not None else transaction.fee_sat)


def _with_fee(transaction: Transaction, fee: int | None) -> Transaction:
    # No transaction is smaller than 1 vB; a smaller size is invalid, and dividing by it may overflow.
    rate = fee / transaction.vsize if fee is not None and transaction.vsize >= 1.0 else None
    return replace(transaction, fee_sat=fee, fee_rate=rate)
