"""Transactions and blocks as the network serialises them (BIP 144): every id here is the hash of what it names."""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from whaled.simulator.chain import Block
from whaled.simulator.scripts import Spend, spend
from whaled.simulator.transactions import REPLACEABLE, Coin, Payment, Tx, TxKind

HEADER_BYTES = 80
BLOCK_VERSION = 0x30000000
# The witness of a coinbase: the reserved value of BIP 141.
COINBASE_WITNESS = "0" * 64
_NOWHERE = b"\0" * 32 + b"\xff" * 4


def twice(data: bytes) -> str:
    """Double SHA-256, written as ids are."""
    return sha256(sha256(data).digest()).digest()[::-1].hex()


def signature(coin: Coin, fee: int) -> Spend:
    """What the input that spends `coin` carries, in a transaction that pays `fee`."""
    return spend(coin.script.type, f"{coin.txid}/{coin.vout}/{fee}")


class Parts(NamedTuple):
    """A transaction's serialisation without its witnesses in four pieces, and its witnesses (empty for none)."""

    version: bytes
    body: bytes
    witnesses: bytes
    locktime: bytes

    @property
    def stripped(self) -> bytes:
        """Without witnesses: what the txid is the hash of."""
        return self.version + self.body + self.locktime

    @property
    def whole(self) -> bytes:
        """As it is sent and stored."""
        if not self.witnesses:
            return self.stripped
        return self.version + b"\0\1" + self.body + self.witnesses + self.locktime


def parts_of(tx: Tx) -> Parts:
    """The serialisation of a transaction."""
    return _parts(tx.inputs, tx.outputs, tx.fee, sequence=tx.sequence, version=tx.version, coinbase=tx.coinbase)


def assemble(
    kind: TxKind,
    inputs: Sequence[Coin],
    outputs: Sequence[Payment],
    fee: int,
    *,
    sent_at: float,
    sequence: int = REPLACEABLE,
    version: int = 2,
    coinbase: str = "",
) -> Tx:
    """A transaction with the txid, size and weight of its serialisation. `coinbase` is the scriptSig of one, in hex."""
    parts = _parts(inputs, outputs, fee, sequence=sequence, version=version, coinbase=coinbase)
    stripped, size = parts.stripped, len(parts.whole)
    return Tx(
        txid=twice(stripped),
        kind=kind,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        fee=fee,
        size=size,
        weight=len(stripped) * 3 + size,
        sent_at=sent_at,
        sequence=sequence,
        version=version,
        coinbase=coinbase,
    )


def _parts(
    inputs: Sequence[Coin], outputs: Sequence[Payment], fee: int, *, sequence: int, version: int, coinbase: str
) -> Parts:
    ending = sequence.to_bytes(4, "little")
    spends = [signature(coin, fee) for coin in inputs]
    if inputs:
        places = [bytes.fromhex(coin.txid)[::-1] + coin.vout.to_bytes(4, "little") for coin in inputs]
    else:
        places, spends = [_NOWHERE], [Spend(coinbase, "", (COINBASE_WITNESS,))]
    body = [_varint(len(places))]
    body += [place + _counted(each.scriptsig) + ending for place, each in zip(places, spends, strict=True)]
    body.append(_varint(len(outputs)))
    body += [payment.value.to_bytes(8, "little") + _counted(payment.script.hex) for payment in outputs]
    witnesses = b""
    if any(each.witness for each in spends):
        witnesses = b"".join(_varint(len(each.witness)) + b"".join(map(_counted, each.witness)) for each in spends)
    return Parts(version.to_bytes(4, "little"), b"".join(body), witnesses, bytes(4))


def _counted(text: str) -> bytes:
    return _varint(len(text) // 2) + bytes.fromhex(text)


def _varint(count: int) -> bytes:
    if count < 0xFD:
        return count.to_bytes(1, "little")
    return b"\xfd" + count.to_bytes(2, "little") if count <= 0xFFFF else b"\xfe" + count.to_bytes(4, "little")


# --- blocks ---


def merkle_root(txids: Sequence[str]) -> str:
    """Of the txids of a block."""
    level = [bytes.fromhex(txid)[::-1] for txid in txids]
    while len(level) > 1:
        if len(level) % 2:
            level.append(level[-1])
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [sha256(sha256(left + right).digest()).digest() for left, right in pairs]
    return level[0][::-1].hex()


def header(previous: str, root: str, timestamp: int, bits: int, nonce: int) -> bytes:
    """The 80 bytes that a block's hash is the hash of. No work is in it: the hash is not below the target."""
    fields = (timestamp, bits, nonce)
    return (
        BLOCK_VERSION.to_bytes(4, "little")
        + bytes.fromhex(previous)[::-1]
        + bytes.fromhex(root)[::-1]
        + b"".join(field.to_bytes(4, "little") for field in fields)
    )


def header_of(block: Block) -> bytes:
    """A block's header."""
    return header(block.previous, block.merkle_root, block.timestamp, block.bits, block.nonce)


def block_bytes(block: Block) -> bytes:
    """A whole block."""
    count = _varint(len(block.txs))
    return header_of(block) + count + b"".join(parts_of(tx).whole for tx in block.txs)


def block_size(block: Block) -> tuple[int, int]:
    """Its (size, weight)."""
    frame = HEADER_BYTES + len(_varint(len(block.txs)))
    return frame + sum(tx.size for tx in block.txs), frame * 4 + sum(tx.weight for tx in block.txs)
