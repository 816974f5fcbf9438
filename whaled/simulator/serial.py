"""Transactions and blocks as the network serialises them (BIP 144). Every txid and block hash is a real hash."""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from whaled.simulator.chain import Block
from whaled.simulator.scripts import Spend, spend
from whaled.simulator.transactions import REPLACEABLE, Coin, Payment, Tx, TxKind

HEADER_BYTES = 80
BLOCK_VERSION = 0x30000000
# Witness of a coinbase: the reserved value of BIP 141.
COINBASE_WITNESS = "0" * 64
_NOWHERE = b"\0" * 32 + b"\xff" * 4


def twice(data: bytes) -> str:
    """Return the double SHA-256 in the byte order of txids and block hashes, in hex."""
    return sha256(sha256(data).digest()).digest()[::-1].hex()


def signature(coin: Coin, fee: int) -> Spend:
    """Return the signature data of the input that spends `coin`, in a transaction with this fee."""
    return spend(coin.script.type, f"{coin.txid}/{coin.vout}/{fee}")


class Parts(NamedTuple):
    """The pieces of a transaction's serialisation. `witnesses` is empty if no input has one."""

    version: bytes
    body: bytes
    witnesses: bytes
    locktime: bytes

    @property
    def stripped(self) -> bytes:
        """Return the serialisation without witnesses, whose hash is the txid."""
        return self.version + self.body + self.locktime

    @property
    def whole(self) -> bytes:
        """Return the complete serialisation."""
        if not self.witnesses:
            return self.stripped
        return self.version + b"\0\1" + self.body + self.witnesses + self.locktime


def parts_of(tx: Tx) -> Parts:
    """Serialise a transaction."""
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
    """Return a transaction with the txid, size and weight of its serialisation.

    `coinbase` is the scriptSig of a coinbase in hex, empty for other transactions.
    """
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
    """Return the merkle root of a block's txids."""
    level = [bytes.fromhex(txid)[::-1] for txid in txids]
    while len(level) > 1:
        if len(level) % 2:
            level.append(level[-1])
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [sha256(sha256(left + right).digest()).digest() for left, right in pairs]
    return level[0][::-1].hex()


def header(previous: str, root: str, timestamp: int, bits: int, nonce: int) -> bytes:
    """Return the 80 bytes of a block header. There is no proof of work: its hash is not below the target."""
    fields = (timestamp, bits, nonce)
    return (
        BLOCK_VERSION.to_bytes(4, "little")
        + bytes.fromhex(previous)[::-1]
        + bytes.fromhex(root)[::-1]
        + b"".join(field.to_bytes(4, "little") for field in fields)
    )


def header_of(block: Block) -> bytes:
    """Return the header of a block."""
    return header(block.previous, block.merkle_root, block.timestamp, block.bits, block.nonce)


def block_bytes(block: Block) -> bytes:
    """Serialise a block."""
    count = _varint(len(block.txs))
    return header_of(block) + count + b"".join(parts_of(tx).whole for tx in block.txs)


def block_size(block: Block) -> tuple[int, int]:
    """Return the (size, weight) of a block."""
    frame = HEADER_BYTES + len(_varint(len(block.txs)))
    return frame + sum(tx.size for tx in block.txs), frame * 4 + sum(tx.weight for tx in block.txs)
